// Checks at the door of every operator: name, expected, got. The kernels behind them assume.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"
#include "tensors.h"

namespace mtvit_ops {

template <typename... Args>
[[noreturn]] void fail(const Args&... args) {
  std::ostringstream message;
  (message << ... << args);
  throw std::runtime_error(message.str());
}

// STD_TORCH_CHECK would put the source path in front of the words.
#define MTVIT_CHECK(condition, ...)   \
  do {                                \
    if (!(condition)) [[unlikely]]    \
      ::mtvit_ops::fail(__VA_ARGS__); \
  } while (false)

// Wrong values, which only the data shows; Python turns this prefix into a ValueError.
#define MTVIT_CHECK_VALUE(condition, ...) MTVIT_CHECK(condition, "mtvit_ops value error: ", __VA_ARGS__)

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << '(';
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << (t.dim() == 1 ? ",)" : ")");
  return out.str();
}

inline void check_dim(const char* name, const Tensor& t, int64_t dim, const char* shape) {
  MTVIT_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  MTVIT_CHECK(is_strided(t), name, " must be a strided tensor, not one packed for oneDNN");
  MTVIT_CHECK(t.dim() == dim, name, " must have shape ", shape, ", got ", shape_of(t));
}

inline void check_length(const char* name, const Tensor& t, int64_t length) {
  check_dim(name, t, 1, "(T,)");
  MTVIT_CHECK(t.size(0) == length, name, " must have shape (", length, ",), got ", shape_of(t));
}

inline bool is_float(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half ||
         type == ScalarType::Double;
}

inline Dtype check_dtype(const char* name, const Tensor& t) {
  const int32_t code = dtype_code(t);
  if (code == aoti_torch_dtype_float32()) return Dtype::f32;
  if (code == aoti_torch_dtype_bfloat16()) return Dtype::bf16;
  MTVIT_CHECK(code == aoti_torch_dtype_float16(), name, " must be float32, bfloat16 or float16");
  return Dtype::f16;
}

// A contiguous int32 vector: cu_seqlens, rows, keep_counts.
inline Tensor int32_vector(const char* name, const Tensor& t) {
  check_dim(name, t, 1, "(N,)");
  MTVIT_CHECK(is_int32(t), name, " must be int32");
  return as_contiguous(t);
}

inline Tensor cu_seqlens_vector(const char* name, const Tensor& t) {
  Tensor cu = int32_vector(name, t);
  MTVIT_CHECK(cu.size(0) >= 1, name, " must have shape (B + 1,), got ", shape_of(cu));
  return cu;
}

template <typename T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

template <typename T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// cu: (batch + 1,), offsets into `total` rows; returns the longest sequence.
inline int64_t check_cu_seqlens(const char* name, const int32_t* cu, int64_t batch, int64_t total) {
  MTVIT_CHECK_VALUE(cu[0] == 0, name, " must start at 0, got ", cu[0]);
  int64_t longest = 0;
  for (int64_t b = 0; b < batch; ++b) {
    MTVIT_CHECK_VALUE(cu[b + 1] >= cu[b], name, " must not decrease, got ", cu[b + 1], " after ", cu[b]);
    longest = std::max<int64_t>(longest, cu[b + 1] - cu[b]);
  }
  MTVIT_CHECK_VALUE(cu[batch] <= total, name, " must end at ", total, " or before, got ", cu[batch]);
  return longest;
}

// rows: (count,), each -1 (a dead entry, unless `lowest` is 0) or a row of the `num_rows` there are.
inline void check_rows(const int32_t* rows, int64_t count, int64_t num_rows, const char* name = "rows",
                       int lowest = -1) {
  bool good = true;
  for (int64_t i = 0; i < count; ++i) good &= rows[i] >= lowest && rows[i] < num_rows;
  for (int64_t i = 0; !good && i < count; ++i) {
    MTVIT_CHECK_VALUE(rows[i] >= lowest && rows[i] < num_rows, name, " must lie in [", lowest, ", ", num_rows,
                      "), got ", rows[i]);
  }
}

// The factors of a residual: one a column, (columns,), or one a row, (rows, 1); whether it is one a column.
inline bool check_scale(const Tensor& scale, int64_t columns, int64_t rows) {
  MTVIT_CHECK(scale.is_cpu(), "scale must be a CPU tensor");
  const bool per_column = scale.dim() == 1 && scale.size(0) == columns;
  const bool per_row = scale.dim() == 2 && scale.size(0) == rows && scale.size(1) == 1;
  MTVIT_CHECK(per_column || per_row, "scale must have shape (", columns, ",) or (", rows, ", 1), got ",
              shape_of(scale));
  return per_column;
}

// A float32 copy of a small tensor where it is not float32 and contiguous already.
inline Tensor as_float32(const char* name, const Tensor& t) {
  MTVIT_CHECK(t.is_cpu() && is_float(t.scalar_type()), name, " must be a floating-point CPU tensor");
  return as_contiguous(is_float32(t) ? t : torch::stable::to(t, ScalarType::Float));
}

// Rows that make a thread's least share: some 32 thousand numbers, a few microseconds.
inline int64_t row_grain(int64_t columns) {
  return std::max<int64_t>(32768 / std::max<int64_t>(columns, 1), 1);
}

}  // namespace mtvit_ops
