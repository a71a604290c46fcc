// gather_rows and scatter_rows_: rows of any dtype between a residual stream and a packed list.
//
// Rows move as words of 16 bytes, or of what pointers, strides and width are multiples of. Each row has a team of at
// most 32 threads of adjacent words, each with several words in flight. Reads and writes every byte once.
#include <cuda_runtime.h>

#include <cstdint>

#include "kernels.h"

namespace {

constexpr int THREADS = 256;
constexpr int MOST = 32;      // threads that share a row
constexpr int IN_FLIGHT = 4;  // words a thread has read before it writes the first

// Rows of both sides: sources and targets differ only in which of the two goes through the list.
template <typename Word, bool GATHER>
__global__ void __launch_bounds__(THREADS)
    move_rows_kernel(const char* __restrict__ from, int64_t from_stride, char* __restrict__ to, int64_t to_stride,
                     const int32_t* __restrict__ rows, int64_t num_rows, int64_t words) {
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  if (entry >= num_rows) return;
  const int64_t row = rows[entry];
  if (row < 0 && !GATHER) return;
  const auto* source = reinterpret_cast<const Word*>(from + (GATHER ? row : entry) * from_stride);
  auto* target = reinterpret_cast<Word*>(to + (GATHER ? entry : row) * to_stride);
  for (int64_t first = threadIdx.x; first < words; first += IN_FLIGHT * blockDim.x) {
    Word held[IN_FLIGHT];
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int64_t word = first + i * blockDim.x;
      held[i] = word < words && row >= 0 ? source[word] : Word{};
    }
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; ++i) {
      const int64_t word = first + i * blockDim.x;
      if (word < words) target[word] = held[i];
    }
  }
}

template <typename Word, bool GATHER>
int launch(const void* from, int64_t from_stride, void* to, int64_t to_stride, const int32_t* rows, int64_t num_rows,
           int64_t width, cudaStream_t stream) {
  const int64_t words = width / static_cast<int64_t>(sizeof(Word));
  int team = MOST;  // no thread of it idle, unless that would make it tiny
  while (team > 8 && words % team != 0) team /= 2;
  const dim3 block(static_cast<unsigned>(team), static_cast<unsigned>(THREADS / team));
  const int64_t blocks = (num_rows + block.y - 1) / block.y;
  move_rows_kernel<Word, GATHER><<<static_cast<unsigned>(blocks), block, 0, stream>>>(
      static_cast<const char*>(from), from_stride, static_cast<char*>(to), to_stride, rows, num_rows, words);
  return static_cast<int>(cudaGetLastError());
}

template <bool GATHER>
int move_rows(const void* from, int64_t from_stride, void* to, int64_t to_stride, const int32_t* rows, int64_t num_rows,
              int64_t width, void* stream) {
  if (num_rows == 0 || width == 0) return 0;
  const auto all = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to) |
                   static_cast<uintptr_t>(from_stride | to_stride | width);
  const auto call = [&](auto move) {
    return move(from, from_stride, to, to_stride, rows, num_rows, width, static_cast<cudaStream_t>(stream));
  };
  if (all % 16 == 0) return call(launch<uint4, GATHER>);
  if (all % 4 == 0) return call(launch<uint32_t, GATHER>);
  if (all % 2 == 0) return call(launch<uint16_t, GATHER>);
  return call(launch<uint8_t, GATHER>);
}

}  // namespace

extern "C" int mtvit_cuda_gather_rows(const void* x, int64_t x_stride, const int32_t* rows, int64_t num_rows,
                                      int64_t width, void* out, void* stream) {
  return move_rows<true>(x, x_stride, out, width, rows, num_rows, width, stream);
}

extern "C" int mtvit_cuda_scatter_rows(void* x, int64_t x_stride, const int32_t* rows, int64_t num_rows, int64_t width,
                                       const void* y, int64_t y_stride, void* stream) {
  return move_rows<false>(y, y_stride, x, x_stride, rows, num_rows, width, stream);
}
