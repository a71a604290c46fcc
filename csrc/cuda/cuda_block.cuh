// A block of CUDA threads for the algorithms of this folder, on CUB's primitives.
#pragma once
#include <cub/block/block_radix_sort.cuh>
#include <cub/block/block_reduce.cuh>
#include <cub/block/block_scan.cuh>

#include "block.h"

namespace mtvit_ops::cuda {

template <int THREADS>
struct CountingBlock {
  static constexpr int threads = THREADS;
  using Reduce = cub::BlockReduce<int, THREADS>;
  using Scan = cub::BlockScan<int, THREADS>;

  struct Memory {
    union {
      typename Reduce::TempStorage reduce;
      typename Scan::TempStorage scan;
    };
    int total;
  };

  Memory& memory;
  int thread;

  MTVIT_DEVICE explicit CountingBlock(Memory& shared) : memory(shared), thread(static_cast<int>(threadIdx.x)) {}

  MTVIT_DEVICE void sync() { __syncthreads(); }

  MTVIT_DEVICE int sum(int value) {
    value = Reduce(memory.reduce).Sum(value);
    if (thread == 0) memory.total = value;
    __syncthreads();
    value = memory.total;
    __syncthreads();
    return value;
  }

  MTVIT_DEVICE int scan(int value, int& total) {
    Scan(memory.scan).ExclusiveSum(value, value, total);
    __syncthreads();
    return value;
  }
};

template <int THREADS, typename Key>
struct SortingBlock : CountingBlock<THREADS> {
  // 16 places a thread: 4096 of them and their marks leave room for several blocks on a multiprocessor
  static constexpr int sort_limit = 16 * THREADS;
  using Base = CountingBlock<THREADS>;
  using Base::thread;

  template <int ITEMS>
  using Sort = cub::BlockRadixSort<Key, THREADS, ITEMS, uint16_t>;

  struct Memory : Base::Memory {
    union {
      typename Sort<1>::TempStorage one;
      typename Sort<4>::TempStorage four;
      typename Sort<16>::TempStorage sixteen;
    };
    uint16_t marks[sort_limit];
  };

  Memory& sorting;
  uint16_t* marks;

  MTVIT_DEVICE explicit SortingBlock(Memory& shared) : Base(shared), sorting(shared), marks(shared.marks) {}

  template <class KeyOf, class Visit>
  MTVIT_DEVICE void sort(int n, KeyOf key_of, Visit visit) {
    if (n <= THREADS) {
      sort_items<1>(sorting.one, n, key_of, visit);
    } else if (n <= 4 * THREADS) {
      sort_items<4>(sorting.four, n, key_of, visit);
    } else {
      sort_items<16>(sorting.sixteen, n, key_of, visit);
    }
  }

 private:
  // Stable, and what fills the block up stands behind every place: it comes out behind all NaN.
  template <int ITEMS, class KeyOf, class Visit>
  MTVIT_DEVICE void sort_items(typename Sort<ITEMS>::TempStorage& storage, int n, KeyOf key_of, Visit visit) {
    Key keys[ITEMS];
    uint16_t places[ITEMS];
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int place = thread * ITEMS + i;
      keys[i] = place < n ? key_of(place) : static_cast<Key>(~Key{0});
      places[i] = static_cast<uint16_t>(place);
    }
    Sort<ITEMS>(storage).SortBlockedToStriped(keys, places);
#pragma unroll
    for (int i = 0; i < ITEMS; ++i) {
      const int rank = i * THREADS + thread;
      if (rank < n) visit(rank, static_cast<int>(places[i]));
    }
    __syncthreads();
  }
};

}  // namespace mtvit_ops::cuda
