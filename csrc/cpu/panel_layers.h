// Layer norms and linear layers by our own kernel, and the rows they read and write, without the tensors they came in:
// to ask a tensor for sizes, dtype and memory at each step takes a small block longer than its steps.
#pragma once
#include <optional>
#include <utility>

#include "../checks.h"
#include "memory.h"

namespace mtvit_ops {

// A vector (n,) of float32, or of the dtype of what it is added to; lives as long as its tensor.
class Vector {
 public:
  Vector() = default;  // none
  Vector(const char* name, const Tensor& given);
  Vector(const float* data, int64_t size) : data_(data), size_(size) {}

  int64_t size() const { return size_; }
  // As float32: where it lies, or converted into `scratch`, which then goes on behind it; null: there is none.
  const float* floats(float*& scratch) const;

 private:
  const void* data_ = nullptr;
  int64_t size_ = 0;
  Dtype dtype_ = Dtype::f32;
  std::optional<Tensor> packed_;
};

struct PanelNorm {
  Vector weight, bias;
  float eps;

  PanelNorm(const Tensor& weight, const Tensor& bias, double eps);
  PanelNorm(Vector weight, Vector bias, double eps)
      : weight(std::move(weight)), bias(std::move(bias)), eps(static_cast<float>(eps)) {}
};

struct PanelLayer {
  const Tensor* plain = nullptr;  // a weight to be packed at each use; null: `panels` are it
  const void* panels = nullptr;
  int64_t n, k;
  Vector bias;

  // Of what check_panels let through.
  PanelLayer(const Tensor& weight, const Tensor* bias);
  PanelLayer(const void* panels, int64_t n, int64_t k, Vector bias)
      : panels(panels), n(n), k(k), bias(std::move(bias)) {}
};

// The live rows of a residual stream x (R, D): rows (T,), or all where there is none.
struct Stream {
  Dtype dtype;
  char* x;
  int64_t num_rows, width, stride, tokens;
  const int32_t* rows = nullptr;
  Tensor list;  // whose memory `rows` is

  // `written`: rows that overlap are refused.
  Stream(const Tensor& x, const std::optional<Tensor>& rows, bool written = true);
  int64_t bytes(int64_t columns) const { return tokens * columns * static_cast<int64_t>(element_size(dtype)); }
};

// out (T, n) = linear(layer_norm(x[rows])), then erf-GELU on request; zeros of a dead entry are normalised, too.
void linear_of_norm(const Stream& stream, const PanelNorm& norm, const PanelLayer& layer, bool gelu, void* out);

// x[rows] += linear(a), a (T, k), as if the linear layer were an operator of its own.
void linear_residual(const Stream& stream, const void* a, const PanelLayer& layer);

// A task's rows [0, tokens), by all threads.
void run_linear(const LinearTask& t, int64_t tokens);

// The weight in panels: the layer's own memory where it is packed, else a copy.
class Panels {
 public:
  explicit Panels(const PanelLayer& layer);

  // Of a weight (n, k).
  static void pack(const Tensor& weight, void* panels);

  const void* data;

 private:
  Buffer copy_;
};

}  // namespace mtvit_ops
