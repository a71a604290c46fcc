// What the algorithms of this folder ask of a block of threads, and what all of them need.
//
// They are written for one thread of a block and never name CUDA: nvcc compiles them over cuda_block.cuh, the tests
// with g++ over threads of the CPU. A Block has
//   threads, thread            how many there are (a constant), and which one this is
//   sync()                     a barrier
//   sum(v), scan(v, total)     over all threads, scan exclusive; every thread calls them
//   sort_limit, sort(n, key_of, visit)   see selection.h
//   marks                      sort_limit numbers that the threads share
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define MTVIT_DEVICE __device__ __forceinline__
#else
#define MTVIT_DEVICE inline
#endif

namespace mtvit_ops::cuda {

// Entries of one image, never outside the list: bad offsets cannot be told from good ones without waiting for the
// device.
struct Span {
  int first, length;
};

MTVIT_DEVICE int offset_of(const int32_t* cu, int64_t tokens, int64_t image) {
  const int64_t offset = cu[image];
  return static_cast<int>(offset < 0 ? 0 : offset < tokens ? offset : tokens);
}

MTVIT_DEVICE Span span_of(const int32_t* cu, int64_t tokens, int64_t image) {
  const int first = offset_of(cu, tokens, image), end = offset_of(cu, tokens, image + 1);
  return {first, end < first ? 0 : end - first};
}

// Entries that the images before one and all images keep.
struct Kept {
  int before, total;
};

// By this block alone, so that no launch for the offsets comes first: cheap while images are few.
template <class Block, class CountOf>
MTVIT_DEVICE Kept count_images(Block& block, int64_t batch, int64_t image, CountOf count_of) {
  int before = 0, total = 0;
  for (int64_t i = block.thread; i < batch; i += Block::threads) {
    const int count = count_of(i);
    total += count;
    if (i < image) before += count;
  }
  before = block.sum(before);
  return {before, block.sum(total)};
}

// ends (batch + 1,): the offsets of the counts, by one block.
template <class Block, class CountOf>
MTVIT_DEVICE void scan_images(Block& block, int64_t batch, CountOf count_of, int32_t* ends) {
  if (block.thread == 0) ends[0] = 0;
  int before = 0;
  for (int64_t start = 0; start < batch; start += Block::threads) {
    const int64_t image = start + block.thread;
    const int count = image < batch ? count_of(image) : 0;
    int total;
    const int rank = block.scan(count, total);
    if (image < batch) ends[image + 1] = before + rank + count;
    before += total;
  }
}

// out[from:to] = -1, by all blocks together.
template <class Block>
MTVIT_DEVICE void fill_dead(Block& block, int64_t index, int64_t blocks, int32_t* out, int64_t from, int64_t to) {
  if (from < 0) from = 0;
  for (int64_t i = from + index * Block::threads + block.thread; i < to; i += blocks * Block::threads) out[i] = -1;
}

}  // namespace mtvit_ops::cuda
