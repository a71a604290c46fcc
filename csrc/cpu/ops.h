// Operators that other operators call: as their namesakes in Python, with the same checks.
#pragma once
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>

#include "../checks.h"
#include "memory.h"

namespace mtvit_ops {

// gather_layer_norm without what only its gradient needs: out (T, D).
Tensor layer_norm_rows(const Tensor& tokens, const std::optional<Tensor>& rows, const Tensor& weight,
                       const Tensor& bias, double eps);

// What it asks of weight and bias, for those who must know before they write.
void check_layer_norm(const Tensor& x, const Tensor& weight, const Tensor& bias);

void scatter_residual_(Tensor x, std::optional<Tensor> rows, const Tensor& y, std::optional<Tensor> scale);

// State, scores, rows and offsets after a layer.
using Halted = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Queries, keys and values of all heads, (T, 3 * H * d), contiguous, and where images begin, (batch + 1,).
struct PackedQkv {
  Dtype dtype;
  const void* data;
  int64_t tokens, heads, d;
  const int32_t* cu_seqlens;
  int64_t batch;
};

// Refuses what asks for no kind of scores.
void check_scores(int64_t scores);

// varlen_attention into out (T, H, d) and, where scores asks for them, received (T, H).
void packed_attention(const PackedQkv& qkv, double scale, int64_t scores, void* out, float* received);

// a @ weight^T + bias, then erf-GELU on request, by ragged_linear.cpp; weight (N, K), or packed by pack_panels.
Tensor panel_linear(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu = false);

// What these ask of weight and bias, for rows of k numbers of `like`'s dtype; returns N.
int64_t check_panels(int64_t k, const Tensor& like, const Tensor& weight, const std::optional<Tensor>& bias);

// x[rows] += a @ weight^T + bias.
void panel_linear_residual_(Tensor x, const std::optional<Tensor>& rows, const Tensor& a, const Tensor& weight,
                            const std::optional<Tensor>& bias);

// x @ weight^T + bias, then erf-GELU on request, by PyTorch's oneDNN kernel; weight plain or packed.
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu = false);

// What it asks of weight and bias, for `tokens` rows of `features` numbers of `like`'s dtype.
void check_linear(int64_t tokens, int64_t features, const Tensor& like, const Tensor& weight,
                  const std::optional<Tensor>& bias);

// Why this PyTorch has no such kernel; empty: it has.
const std::string& onednn_linear_missing();

}  // namespace mtvit_ops
