// The algorithms of csrc/cuda on threads of the CPU, for tests/test_cuda_host.py: what nvcc compiles for a block of a
// GPU runs here with a barrier from the standard library, and a sort that is stable by its own word.
#include <algorithm>
#include <barrier>
#include <numeric>
#include <thread>
#include <vector>

#include "cuda/halting.h"
#include "cuda/selection.h"

namespace mtvit_ops::cuda {
namespace {

template <int THREADS, int LIMIT>
struct HostBlock {
  static constexpr int threads = THREADS;
  static constexpr int sort_limit = LIMIT;

  struct Memory {
    std::barrier<> barrier{THREADS};
    int values[THREADS] = {};
    std::vector<int> order;
    uint16_t marks[LIMIT];
  };

  Memory& memory;
  int thread;
  uint16_t* marks;

  HostBlock(Memory& shared, int index) : memory(shared), thread(index), marks(shared.marks) {}

  void sync() { memory.barrier.arrive_and_wait(); }

  int sum(int value) {
    int total;
    scan(value, total);
    return total;
  }

  int scan(int value, int& total) {
    memory.values[thread] = value;
    sync();
    const int before = std::accumulate(memory.values, memory.values + thread, 0);
    total = std::accumulate(memory.values, memory.values + THREADS, 0);
    sync();
    return before;
  }

  template <class KeyOf, class Visit>
  void sort(int n, KeyOf key_of, Visit visit) {
    if (thread == 0) {
      memory.order.resize(static_cast<size_t>(n));
      std::iota(memory.order.begin(), memory.order.end(), 0);
      std::stable_sort(memory.order.begin(), memory.order.end(), [&](int a, int b) { return key_of(a) < key_of(b); });
    }
    sync();
    // the last ranks first: no result may depend on their order
    for (int rank = n - 1 - thread; rank >= 0; rank -= THREADS) visit(rank, memory.order[static_cast<size_t>(rank)]);
    sync();
  }
};

// A launch. Blocks run one after the other, the last one first: none may wait for another.
template <class Block, class Run>
void launch(int64_t blocks, Run run) {
  for (int64_t index = blocks - 1; index >= 0; --index) {
    typename Block::Memory memory;
    std::fill(std::begin(memory.marks), std::end(memory.marks), uint16_t{0xffff});
    std::vector<std::thread> team;
    for (int thread = 0; thread < Block::threads; ++thread) {
      team.emplace_back([&memory, &run, index, thread] {
        Block block(memory, thread);
        run(block, index);
      });
    }
    for (std::thread& member : team) member.join();
  }
}

// As in token_select.cu
template <class Score, class Block>
void select(const MtvitSelection& s, bool scanned) {
  const Images images(s);
  if (!images.counted()) launch<Block>(s.batch, [&](Block& block, int64_t i) { count_kept<Score>(block, s, i); });
  if (scanned) {
    launch<Block>(1, [&](Block& block, int64_t) {
      scan_images(block, s.batch, [&](int64_t i) { return images.kept(i); }, s.out_cu);
    });
  }
  const int64_t blocks = std::max<int64_t>(s.batch, 1);
  launch<Block>(blocks, [&](Block& block, int64_t i) { select_image<Score>(block, s, i, blocks, scanned); });
}

template <class Block>
void select(const MtvitSelection& s, bool scanned) {
  if (s.dtype == MTVIT_F32) select<Float32, Block>(s, scanned);
  if (s.dtype == MTVIT_BF16) select<BFloat16, Block>(s, scanned);
  if (s.dtype == MTVIT_F16) select<Float16, Block>(s, scanned);
  if (s.dtype == MTVIT_F64) select<Float64, Block>(s, scanned);
}

// As in halting_step.cu, for float32
template <class Block>
void halt(const MtvitHalting& s, bool scanned) {
  const auto load = [&](int64_t at) { return static_cast<const float*>(s.x)[at]; };
  for (int64_t row = 0; row < s.num_rows; ++row) copy_state(s, row);
  launch<Block>(s.batch, [&](Block& block, int64_t i) { gate_image(block, s, i, load); });
  if (scanned) {
    launch<Block>(1, [&](Block& block, int64_t) {
      scan_images(block, s.batch, [&](int64_t i) { return s.counts[i]; }, s.next_cu);
    });
  }
  const int64_t blocks = std::max<int64_t>(s.batch, 1);
  launch<Block>(blocks, [&](Block& block, int64_t i) { pack_image(block, s, i, blocks, scanned); });
  launch<Block>(s.num_readout, [&](Block& block, int64_t i) { readout_row(block, s, i, load); });
}

using Alone = HostBlock<1, 4096>;  // one thread, and room for all
using Team = HostBlock<3, 16>;     // threads that must wait for each other, and too little room to sort in

template <class Score>
void write_keys(const void* bits, int64_t n, uint64_t* keys) {
  for (int64_t i = 0; i < n; ++i) keys[i] = Score::key(static_cast<const typename Score::Bits*>(bits)[i]);
}

}  // namespace
}  // namespace mtvit_ops::cuda

using namespace mtvit_ops::cuda;

// scanned: offsets by a block of their own, as on a GPU where images are many.
extern "C" void host_token_select(const MtvitSelection* s, int team, int scanned) {
  team ? select<Team>(*s, scanned) : select<Alone>(*s, scanned);
}

extern "C" void host_halting_step(const MtvitHalting* s, int team, int scanned) {
  team ? halt<Team>(*s, scanned) : halt<Alone>(*s, scanned);
}

extern "C" void host_keys(int dtype, const void* bits, int64_t n, uint64_t* keys) {
  if (dtype == MTVIT_F32) write_keys<Float32>(bits, n, keys);
  if (dtype == MTVIT_BF16) write_keys<BFloat16>(bits, n, keys);
  if (dtype == MTVIT_F16) write_keys<Float16>(bits, n, keys);
  if (dtype == MTVIT_F64) write_keys<Float64>(bits, n, keys);
}
