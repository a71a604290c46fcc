// Evo-ViT's evolving scores on the CPU, after a block whose class token attended: methods/evo_vit.py in one call.
//   received (T, H) float32, score (R,) float32, rows (T,) or none (row i, T = R); returns (R,)
// The score of a live token becomes lerp(score, sum over heads, weight), or the sum where weight is 1; others stay, and
// so do those of dead entries (-1). T, H or R may be 0.
#include <optional>

#include "evo_vit.h"

#include "../checks.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {

void evolve(const float* received, int64_t tokens, int64_t heads, const int32_t* rows, double weight, float* score) {
  const auto share = static_cast<float>(weight);
  for (int64_t i = 0; i < tokens; ++i) {
    float sum = 0.0f;
    for (int64_t h = 0; h < heads; ++h) sum += received[i * heads + h];
    const int64_t row = rows ? rows[i] : i;
    if (row < 0) continue;
    const float before = score[row], step = sum - before;
    // as torch.lerp: exact at both ends
    score[row] = share == 1.0f ? sum : share < 0.5f ? before + share * step : sum - step * (1.0f - share);
  }
}

namespace {

Tensor evolve_scores(const Tensor& received, const Tensor& score, std::optional<Tensor> rows, double weight) {
  check_dim("received", received, 2, "(T, H)");
  check_dim("score", score, 1, "(R,)");
  for (const Tensor& t : {received, score}) {
    MTVIT_CHECK(is_float32(t), "received and score must be float32");
  }
  const Tensor given = as_contiguous(received);
  const int64_t tokens = given.size(0), heads = given.size(1), num_rows = score.size(0);
  Tensor list;
  if (rows) {
    list = int32_vector("rows", *rows);
    check_rows(data<int32_t>(list), list.size(0), num_rows);
  }
  const int64_t count = rows ? list.size(0) : num_rows;
  MTVIT_CHECK(tokens == count, "received must have shape (", count, ", H), got ", shape_of(received));
  Tensor evolved = copy_of<1>(score);
  evolve(data<float>(given), tokens, heads, rows ? data<int32_t>(list) : nullptr, weight, mutable_data<float>(evolved));
  return evolved;
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("evolve_scores(Tensor received, Tensor score, Tensor? rows, float weight) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("evolve_scores", TORCH_BOX(&mtvit_ops::evolve_scores));
}
