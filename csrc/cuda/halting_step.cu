// halting_step: three launches, four where images are many. See halting.h for the passes.
//
// Reads channel 0 of the listed rows, the state once, and the readout rows; writes the state once, and the listed rows
// of it twice.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "cuda_block.cuh"
#include "halting.h"

namespace mtvit_ops::cuda {
namespace {

constexpr int THREADS = 256;
constexpr int64_t FEW_IMAGES = 1024;  // so many counts each block adds up itself: four a thread
using Counter = CountingBlock<THREADS>;

template <typename T>
struct Loader {
  const T* x;
  MTVIT_DEVICE float operator()(int64_t at) const { return static_cast<float>(x[at]); }
};

__global__ void __launch_bounds__(THREADS) halting_copy_kernel(MtvitHalting s) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * THREADS + threadIdx.x;
  if (row < s.num_rows) copy_state(s, row);
}

template <typename T>
__global__ void __launch_bounds__(THREADS) halting_gate_kernel(MtvitHalting s) {
  __shared__ Counter::Memory shared;
  Counter block(shared);
  gate_image(block, s, blockIdx.x, Loader<T>{static_cast<const T*>(s.x)});
}

__global__ void __launch_bounds__(THREADS) halting_offsets_kernel(MtvitHalting s) {
  __shared__ Counter::Memory shared;
  Counter block(shared);
  scan_images(block, s.batch, [&](int64_t image) { return s.counts[image]; }, s.next_cu);
}

// The first `images` blocks pack, the others read out.
template <typename T>
__global__ void __launch_bounds__(THREADS) halting_finish_kernel(MtvitHalting s, int64_t images, bool scanned) {
  __shared__ Counter::Memory shared;
  Counter block(shared);
  if (blockIdx.x < images) {
    pack_image(block, s, blockIdx.x, images, scanned);
  } else {
    readout_row(block, s, blockIdx.x - images, Loader<T>{static_cast<const T*>(s.x)});
  }
}

template <typename T>
int launch(const MtvitHalting& s, cudaStream_t stream) {
  const auto blocks = [](int64_t count) { return static_cast<unsigned>(count); };
  const int64_t images = s.batch ? s.batch : 1;  // a batch of none has offsets and a list, too
  const bool scanned = s.batch > FEW_IMAGES;
  if (s.num_rows) halting_copy_kernel<<<blocks((s.num_rows + THREADS - 1) / THREADS), THREADS, 0, stream>>>(s);
  if (s.batch) halting_gate_kernel<T><<<blocks(s.batch), THREADS, 0, stream>>>(s);
  if (scanned) halting_offsets_kernel<<<1, THREADS, 0, stream>>>(s);
  halting_finish_kernel<T><<<blocks(images + s.num_readout), THREADS, 0, stream>>>(s, images, scanned);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace mtvit_ops::cuda

extern "C" int mtvit_cuda_halting_step(const MtvitHalting* step, void* stream) {
  using namespace mtvit_ops::cuda;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (step->dtype) {
    case MTVIT_F32:
      return launch<float>(*step, queue);
    case MTVIT_BF16:
      return launch<__nv_bfloat16>(*step, queue);
    case MTVIT_F16:
      return launch<__half>(*step, queue);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}
