// token_select: one block of 256 threads an image. See selection.h for the algorithm.
//
// A count: one launch. Mask or threshold: one before it, that counts. Many images: one more, for their offsets; without
// it every block adds up the counts of all images. An image's scores, mask and rows are read once or twice from the
// cache and its results written once.
#include <cuda_runtime.h>

#include "cuda_block.cuh"
#include "selection.h"

namespace mtvit_ops::cuda {
namespace {

constexpr int THREADS = 256;          // sorts the 197 tokens of a 224-pixel image with one token a thread
constexpr int64_t FEW_IMAGES = 1024;  // so many counts each block adds up itself: four a thread

template <class Score>
using Sorter = SortingBlock<THREADS, typename Score::Bits>;
using Counter = CountingBlock<THREADS>;

template <class Score>
__global__ void __launch_bounds__(THREADS) token_select_count_kernel(MtvitSelection s) {
  __shared__ Counter::Memory shared;
  Counter block(shared);
  count_kept<Score>(block, s, blockIdx.x);
}

__global__ void __launch_bounds__(THREADS) token_select_offsets_kernel(MtvitSelection s) {
  __shared__ Counter::Memory shared;
  Counter block(shared);
  const Images images(s);
  scan_images(block, s.batch, [&](int64_t image) { return images.kept(image); }, s.out_cu);
}

// two blocks a multiprocessor: up to 256 images run at once on the GPUs that matter
template <class Score>
__global__ void __launch_bounds__(THREADS, 2) token_select_kernel(MtvitSelection s, bool scanned) {
  __shared__ typename Sorter<Score>::Memory shared;
  Sorter<Score> block(shared);
  select_image<Score>(block, s, blockIdx.x, gridDim.x, scanned);
}

template <class Score>
int launch(const MtvitSelection& s, cudaStream_t stream) {
  const auto images = static_cast<unsigned>(s.batch);
  const bool counted = s.keep >= 0 || s.keep_counts, scanned = s.batch > FEW_IMAGES;
  if (!counted && images) token_select_count_kernel<Score><<<images, THREADS, 0, stream>>>(s);
  if (scanned) token_select_offsets_kernel<<<1, THREADS, 0, stream>>>(s);
  // a batch of none has offsets and capacity, too
  token_select_kernel<Score><<<images ? images : 1, THREADS, 0, stream>>>(s, scanned);
  return static_cast<int>(cudaGetLastError());
}

}  // namespace
}  // namespace mtvit_ops::cuda

extern "C" int64_t mtvit_cuda_select_limit(void) {
  return mtvit_ops::cuda::Sorter<mtvit_ops::cuda::Float32>::sort_limit;
}

extern "C" int mtvit_cuda_token_select(const MtvitSelection* selection, void* stream) {
  using namespace mtvit_ops::cuda;
  const auto queue = static_cast<cudaStream_t>(stream);
  switch (selection->dtype) {
    case MTVIT_F32:
      return launch<Float32>(*selection, queue);
    case MTVIT_BF16:
      return launch<BFloat16>(*selection, queue);
    case MTVIT_F16:
      return launch<Float16>(*selection, queue);
    case MTVIT_F64:
      return launch<Float64>(*selection, queue);
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

extern "C" const char* mtvit_cuda_error_string(int code) {
  return cudaGetErrorString(static_cast<cudaError_t>(code));
}
