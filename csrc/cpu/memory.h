// Memory to work in, small parameters as float32, and whether two matrices share memory.
#pragma once
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "../checks.h"

namespace mtvit_ops {

struct Free {
  void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float, Free>;

inline Buffer allocate(int64_t floats) {
  void* p = std::aligned_alloc(64, static_cast<size_t>(round_up(std::max<int64_t>(floats, 1), 16)) * sizeof(float));
  if (p == nullptr) throw std::bad_alloc();
  return Buffer(static_cast<float*>(p));
}

// Each thread keeps its scratch between calls up to 16 MiB, enough for 8192 keys of two 64-wide heads.
inline float* thread_scratch(int64_t floats, Buffer& large) {
  constexpr int64_t kKept = int64_t{4} << 20;
  if (floats > kKept) {
    large = allocate(floats);
    return large.get();
  }
  thread_local Buffer kept;
  thread_local int64_t size = 0;
  if (size < floats) {
    kept.reset();
    size = 0;
    kept = allocate(floats);
    size = floats;
  }
  return kept.get();
}

// A vector as contiguous float32: the tensor's own memory, or a copy. No PyTorch call, which would cost a small
// operator as much as its work. Lives as long as the tensor.
class Floats {
 public:
  Floats() = default;

  Floats(const char* name, const Tensor& given) {
    if (!given.is_contiguous()) packed_ = as_contiguous(given);
    const Tensor& t = packed_ ? *packed_ : given;
    if (t.scalar_type() == ScalarType::Float) {
      begin_ = mtvit_ops::data<float>(t);
      return;
    }
    copy_.resize(static_cast<size_t>(t.numel()));
    kernels().to_float32(check_dtype(name, t), t.data_ptr(), copy_.data(), t.numel());
    begin_ = copy_.data();
  }

  const float* data() const { return begin_; }

 private:
  std::vector<float> copy_;
  std::optional<Tensor> packed_;
  const float* begin_ = nullptr;
};

// Whether two matrices with a last stride of 1 share memory, or might.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto range = [](const Tensor& t) {
    const auto* first = static_cast<const char*>(t.data_ptr());
    const int64_t last = (t.size(0) - 1) * t.stride(0) + t.size(1);
    return std::make_pair(first, first + last * static_cast<int64_t>(t.element_size()));
  };
  const auto [a_first, a_end] = range(a);
  const auto [b_first, b_end] = range(b);
  return a_first < b_end && b_first < a_end;
}

}  // namespace mtvit_ops
