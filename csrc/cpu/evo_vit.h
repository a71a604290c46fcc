// Evo-ViT's evolving scores, on what an operator has checked.
#pragma once
#include <cstdint>

namespace mtvit_ops {

// received (T, H), rows (T,) or null (row i), -1: nobody; score (R,), in place.
void evolve(const float* received, int64_t tokens, int64_t heads, const int32_t* rows, double weight, float* score);

}  // namespace mtvit_ops
