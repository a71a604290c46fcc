// Several blocks on the CPU, in place, in one call: half_block.cpp's block_ one after the other, and A-ViT's halting
// step behind each. What Python does between two blocks is little, but it does it on caches that a block has filled
// with weights.
//   x (R, D), rows (T,) or none (T = R), cu_seqlens (B + 1,); weights: twelve tensors a block, see kParts
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

constexpr size_t kParts = 12;  // weight and bias of norm1, qkv, proj, norm2, fc1, fc2

struct Blocks {
  const std::vector<Tensor>& weights;
  double eps, scale;
  int64_t heads;
  bool panels;

  size_t count() const { return weights.size() / kParts; }

  // Refuses whatever a block would refuse but for its tokens: before the first one writes.
  void check(const Tensor& x, const std::optional<Tensor>& rows) const {
    MTVIT_CHECK(weights.size() % kParts == 0, "weights must be ", kParts, " a block, got ", weights.size());
    for (size_t i = 0; i < count(); ++i) {
      const Tensor* w = &weights[i * kParts];
      check_block(x, rows, w[0], w[1], w[2], w[3], heads, w[4], w[5], w[6], w[7], w[8], w[9], w[10], w[11], panels);
    }
  }

  void run(size_t i, const Tensor& x, const std::optional<Tensor>& rows, const Tensor& cu_seqlens,
           int64_t max_seqlen) const {
    const Tensor* w = &weights[i * kParts];
    block_(x, rows, cu_seqlens, max_seqlen, w[0], w[1], eps, w[2], w[3], heads, scale, 0, w[4], w[5], w[6], w[7], eps,
           w[8], w[9], w[10], w[11], panels);
  }
};

void blocks_(Tensor x, std::optional<Tensor> rows, const Tensor& cu_seqlens, int64_t max_seqlen,
             const std::vector<Tensor>& weights, double eps, int64_t heads, double scale, bool panels) {
  const Blocks blocks{weights, eps, scale, heads, panels};
  blocks.check(x, rows);
  for (size_t i = 0; i < blocks.count(); ++i) blocks.run(i, x, rows, cu_seqlens, max_seqlen);
}

// The first `count` entries of a contiguous list, seen as a list.
Tensor head_of(const Tensor& list, int64_t count) {
  const std::array<int64_t, 1> sizes{count}, strides{1};
  int64_t offset = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_offset(list.get(), &offset));
  AtenTensorHandle out = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(list.get(), 1, sizes.data(), strides.data(), offset, &out));
  return Tensor(out);
}

Halted halting_blocks_(Tensor x, const Tensor& cu_seqlens, int64_t max_seqlen, const std::vector<Tensor>& weights,
                       double eps, int64_t heads, double scale, bool panels, const Tensor& readout_rows,
                       const Tensor& cumulative, const Tensor& remainder, const Tensor& ponder, const Tensor& counters,
                       const Tensor& output, double gate_scale, double gate_center, double halt_eps) {
  const Blocks blocks{weights, eps, scale, heads, panels};
  blocks.check(x, std::nullopt);
  check_halting(x, readout_rows, cumulative, remainder, ponder, counters, output);
  MTVIT_CHECK(blocks.count() > 0, "weights must be those of at least one block");
  Halted step{cumulative, remainder, ponder, counters, output, cumulative, readout_rows, cu_seqlens};
  std::optional<Tensor> rows;
  for (size_t i = 0; i < blocks.count(); ++i) {
    const Tensor offsets = std::get<7>(step);
    blocks.run(i, x, rows, offsets, max_seqlen);
    step =
        halting_step(x, rows, offsets, readout_rows, std::get<0>(step), std::get<1>(step), std::get<2>(step),
                     std::get<3>(step), std::get<4>(step), gate_scale, gate_center, halt_eps, i + 1 == blocks.count());
    const Tensor& cu = std::get<7>(step);
    const auto* ends = data<int32_t>(cu);
    const int64_t batch = cu.size(0) - 1;
    max_seqlen = check_cu_seqlens("cu_seqlens", ends, batch, x.size(0));
    rows = std::get<6>(step) = head_of(std::get<6>(step), ends[batch]);
  }
  return step;
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "blocks_(Tensor(a!) x, Tensor? rows, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, float eps, int heads, "
      "float scale, bool panels) -> ()");
  m.def(
      "halting_blocks_(Tensor(a!) x, Tensor cu_seqlens, int max_seqlen, Tensor[] weights, float eps, int heads, "
      "float scale, bool panels, Tensor readout_rows, Tensor cumulative, Tensor remainder, Tensor ponder, "
      "Tensor counters, Tensor output, float gate_scale, float gate_center, float halt_eps) -> "
      "(Tensor cumulative, Tensor remainder, Tensor ponder, Tensor counters, Tensor output, Tensor score, Tensor rows, "
      "Tensor cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("blocks_", TORCH_BOX(&mtvit_ops::blocks_));
  m.impl("halting_blocks_", TORCH_BOX(&mtvit_ops::halting_blocks_));
}

// packed weights are tensors of this kind
STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, MkldnnCPU, m) {
  m.impl("blocks_", TORCH_BOX(&mtvit_ops::blocks_));
  m.impl("halting_blocks_", TORCH_BOX(&mtvit_ops::halting_blocks_));
}
