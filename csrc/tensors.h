// New tensors and views without the dispatcher, whose lookup by name costs a small operator as much as its work.
#pragma once
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <cstdint>
#include <cstring>

namespace mtvit_ops {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <size_t N>
std::array<int64_t, N> contiguous_strides(const std::array<int64_t, N>& sizes) {
  std::array<int64_t, N> strides;
  int64_t step = 1;
  for (size_t i = N; i-- > 0; step *= sizes[i] > 0 ? sizes[i] : 1) strides[i] = step;
  return strides;
}

template <size_t N>
Tensor empty(const std::array<int64_t, N>& sizes, int32_t dtype) {
  const auto strides = contiguous_strides(sizes);
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(N, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// PyTorch's number for a dtype; Tensor::scalar_type looks it up in a list of them all.
inline int32_t dtype_code(const Tensor& t) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &code));
  return code;
}

inline bool same_dtype(const Tensor& a, const Tensor& b) {
  return dtype_code(a) == dtype_code(b);
}

inline bool is_float32(const Tensor& t) {
  return dtype_code(t) == aoti_torch_dtype_float32();
}

inline bool is_int32(const Tensor& t) {
  return dtype_code(t) == aoti_torch_dtype_int32();
}

// Uninitialised CPU tensors of `like`'s dtype, float32 and int32.
template <size_t N>
Tensor empty_as(const Tensor& like, const std::array<int64_t, N>& sizes) {
  return empty(sizes, dtype_code(like));
}

template <size_t N>
Tensor empty_float32(const std::array<int64_t, N>& sizes) {
  return empty(sizes, aoti_torch_dtype_float32());
}

template <size_t N>
Tensor empty_int32(const std::array<int64_t, N>& sizes) {
  return empty(sizes, aoti_torch_dtype_int32());
}

inline Tensor as_contiguous(const Tensor& t) {
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}

// A matrix whose rows are contiguous; another last stride costs a copy.
inline Tensor dense_rows(const Tensor& t) {
  return t.size(1) <= 1 || t.stride(1) == 1 ? t : as_contiguous(t);
}

// Whether it has strides and memory of its own: tensors in oneDNN's layout have neither.
inline bool is_strided(const Tensor& t) {
  int32_t layout = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(t.get(), &layout));
  return layout == aoti_torch_layout_strided();
}

// A contiguous copy of a CPU tensor of `N` dimensions.
template <size_t N>
Tensor copy_of(const Tensor& t) {
  const Tensor from = as_contiguous(t);
  std::array<int64_t, N> sizes;
  for (size_t i = 0; i < N; ++i) sizes[i] = from.size(static_cast<int64_t>(i));
  Tensor to = empty_as(from, sizes);
  const auto bytes = static_cast<size_t>(from.numel()) * from.element_size();
  if (bytes > 0) std::memcpy(to.data_ptr(), from.data_ptr(), bytes);
  return to;
}

// A contiguous tensor (T, ...) seen as (T, columns).
inline Tensor as_matrix(const Tensor& t, int64_t columns) {
  const std::array<int64_t, 2> sizes{t.size(0), columns}, strides = contiguous_strides(sizes);
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(t.get(), &offset));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 2, sizes.data(), strides.data(), offset, &out));
  return Tensor(out);
}

}  // namespace mtvit_ops
