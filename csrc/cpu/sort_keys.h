// The order of worth of an image's entries: higher score, then smaller position; NaN below -inf; -0 equals +0.
#pragma once
#include <bit>
#include <cmath>
#include <cstdint>
#include <utility>

namespace mtvit_ops {

// Sort keys: the smallest is the best entry, and no two of an image are equal.
using Key32 = uint64_t;                      // rank of the score above, position below
using Key64 = std::pair<uint64_t, int32_t>;  // rank of the score, position

inline uint32_t rank_of(float score) {
  if (std::isnan(score)) return 0xffffffffu;
  const auto u = std::bit_cast<uint32_t>(score + 0.0f);  // -0 becomes +0
  return u >> 31 ? u : 0x7fffffffu - u;                  // positive: falling; negative: rising magnitude
}

inline uint64_t rank_of(double score) {
  if (std::isnan(score)) return ~uint64_t{0};
  const auto u = std::bit_cast<uint64_t>(score + 0.0);
  return u >> 63 ? u : 0x7fffffffffffffffu - u;
}

inline Key32 key_of(float score, int32_t place) {
  return uint64_t{rank_of(score)} << 32 | static_cast<uint32_t>(place);
}
inline Key64 key_of(double score, int32_t place) {
  return {rank_of(score), place};
}
inline int32_t place_of(Key32 key) {
  return static_cast<int32_t>(key & 0xffffffffu);
}
inline int32_t place_of(const Key64& key) {
  return key.second;
}

}  // namespace mtvit_ops
