// Memory to work in, small parameters as float32, and whether two matrices share memory.
#pragma once
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

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

// Memory that a thread keeps between calls, up to 16 MiB: fresh memory costs a page fault every 4 KiB.
class Kept {
 public:
  static constexpr int64_t kMost = int64_t{4} << 20;  // floats, enough for 8192 keys of two 64-wide heads

  float* of(int64_t floats) {
    if (size_ < floats) {
      buffer_.reset();
      size_ = 0;
      buffer_ = allocate(floats);
      size_ = floats;
    }
    return buffer_.get();
  }

 private:
  Buffer buffer_;
  int64_t size_ = 0;
};

// What one item of work needs, in the thread that does it.
inline float* thread_scratch(int64_t floats, Buffer& large) {
  if (floats > Kept::kMost) {
    large = allocate(floats);
    return large.get();
  }
  thread_local Kept kept;
  return kept.of(floats);
}

// What a block computes on its way. One at a time in each place: the next user of this thread overwrites it.
enum class Place : size_t { qkv, attended, hidden, vectors };

// `large`: where there is more than a thread keeps.
inline void* kept_memory(Place place, int64_t bytes, Buffer& large) {
  const int64_t floats = (bytes + 3) / 4;
  if (floats > Kept::kMost) {
    large = allocate(floats);
    return large.get();
  }
  thread_local std::array<Kept, 4> places;
  return places[static_cast<size_t>(place)].of(floats);
}

// An uninitialised vector of `like`'s dtype; where it is large, the system is asked for large pages, and it begins with
// one.
inline Tensor empty_on_large_pages(const Tensor& like, int64_t count) {
#ifdef MADV_HUGEPAGE
  constexpr int64_t kPage = int64_t{2} << 20;
  const auto element = static_cast<int64_t>(like.element_size()), bytes = count * element;
  if (bytes >= kPage) {
    const Tensor whole = empty_as(like, std::array{count + kPage / element});
    auto* const memory = static_cast<char*>(whole.data_ptr());
    const int64_t before = round_up(static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory)), kPage) -
                           static_cast<int64_t>(reinterpret_cast<uintptr_t>(memory));
    madvise(memory + before, static_cast<size_t>(bytes), MADV_HUGEPAGE);  // advice: a refusal changes no result
    const std::array<int64_t, 1> sizes{count}, strides{1};
    AtenTensorHandle out = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch__reinterpret_tensor(whole.get(), 1, sizes.data(), strides.data(), before / element, &out));
    return Tensor(out);
  }
#endif
  return empty_as(like, std::array{count});
}

// A CPU tensor whose memory the caller holds.
template <size_t N>
Tensor tensor_of(void* memory, const Tensor& like, const std::array<int64_t, N>& sizes) {
  const auto strides = contiguous_strides(sizes);
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(memory, N, sizes.data(), strides.data(), 0,
                                                            dtype_code(like), aoti_torch_device_type_cpu(), 0, &out));
  return Tensor(out);
}

// A vector as contiguous float32: the tensor's own memory, or a copy. No PyTorch call, which would cost a small
// operator as much as its work. Lives as long as the tensor.
class Floats {
 public:
  Floats() = default;

  Floats(const char* name, const Tensor& given) {
    if (!given.is_contiguous()) packed_ = as_contiguous(given);
    const Tensor& t = packed_ ? *packed_ : given;
    if (is_float32(t)) {
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

// Whether two tensors share memory, or might.
inline bool overlap(const Tensor& a, const Tensor& b) {
  if (a.numel() == 0 || b.numel() == 0) return false;
  const auto range = [](const Tensor& t) {
    const auto* first = static_cast<const char*>(t.data_ptr());
    int64_t last = 1;
    for (int64_t i = 0; i < t.dim(); ++i) last += (t.size(i) - 1) * t.stride(i);
    return std::make_pair(first, first + last * static_cast<int64_t>(t.element_size()));
  };
  const auto [a_first, a_end] = range(a);
  const auto [b_first, b_end] = range(b);
  return a_first < b_end && b_first < a_end;
}

// What is read while x is written: a copy where it lies in x's memory, or it would not be what it was.
inline Tensor apart_from(const Tensor& x, const Tensor& t) {
  return overlap(x, t) ? torch::stable::clone(t) : t;
}

}  // namespace mtvit_ops
