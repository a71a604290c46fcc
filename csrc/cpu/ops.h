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

Halted halting_step(const Tensor& tokens, std::optional<Tensor> rows, const Tensor& cu_seqlens,
                    const Tensor& readout_rows, const Tensor& cumulative, const Tensor& remainder, const Tensor& ponder,
                    const Tensor& counters, const Tensor& output, double gate_scale, double gate_center, double eps,
                    bool last);

// What it asks of readout rows and state.
void check_halting(const Tensor& x, const Tensor& readout_rows, const Tensor& cumulative, const Tensor& remainder,
                   const Tensor& ponder, const Tensor& counters, const Tensor& output);

// Both halves of a block in place; returns the scores asked for.
Tensor block_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
              const Tensor& norm1_weight, const Tensor& norm1_bias, double norm1_eps, const Tensor& qkv_weight,
              std::optional<Tensor> qkv_bias, int64_t heads, double scale, int64_t scores, const Tensor& proj_weight,
              std::optional<Tensor> proj_bias, const Tensor& norm2_weight, const Tensor& norm2_bias, double norm2_eps,
              const Tensor& fc1_weight, std::optional<Tensor> fc1_bias, const Tensor& fc2_weight,
              std::optional<Tensor> fc2_bias, bool panels);

// Whatever a block would refuse but for offsets and rows.
void check_block(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& norm1_weight,
                 const Tensor& norm1_bias, const Tensor& qkv_weight, const std::optional<Tensor>& qkv_bias,
                 int64_t heads, const Tensor& proj_weight, const std::optional<Tensor>& proj_bias,
                 const Tensor& norm2_weight, const Tensor& norm2_bias, const Tensor& fc1_weight,
                 const std::optional<Tensor>& fc1_bias, const Tensor& fc2_weight, const std::optional<Tensor>& fc2_bias,
                 bool panels);

// out (T, H, d), lse (T, H), scores (T, H) or (0, H)
using Attended = std::tuple<Tensor, Tensor, Tensor>;

// varlen_attention of the three parts of qkv (T, 3 * H * d), contiguous; out lies in memory that this thread keeps.
Attended packed_attention(const Tensor& qkv, int64_t heads, const Tensor& cu_seqlens, int64_t max_seqlen, double scale,
                          int64_t scores);

// a @ weight^T + bias, then erf-GELU on request, by ragged_linear.cpp; weight (N, K), or packed by pack_panels.
Tensor panel_linear(const Tensor& a, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu = false);

// What these ask of weight and bias, for rows of k numbers of a dtype; returns N.
int64_t check_panels(int64_t k, ScalarType dtype, const Tensor& weight, const std::optional<Tensor>& bias);

// The same of layer_norm(x[rows]), which is written nowhere; the result lies in memory of `place`.
Tensor panel_linear_of_norm(const Tensor& x, const std::optional<Tensor>& rows, const Tensor& norm_weight,
                            const Tensor& norm_bias, double eps, const Tensor& weight,
                            const std::optional<Tensor>& bias, bool gelu, Place place);

// x[rows] += a @ weight^T + bias.
void panel_linear_residual_(Tensor x, const std::optional<Tensor>& rows, const Tensor& a, const Tensor& weight,
                            const std::optional<Tensor>& bias);

// x @ weight^T + bias, then erf-GELU on request, by PyTorch's oneDNN kernel; weight plain or packed.
Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu = false);

// What it asks of weight and bias, for `tokens` rows of `features` numbers of a dtype.
void check_linear(int64_t tokens, int64_t features, ScalarType dtype, const Tensor& weight,
                  const std::optional<Tensor>& bias);

// Why this PyTorch has no such kernel; empty: it has.
const std::string& onednn_linear_missing();

}  // namespace mtvit_ops
