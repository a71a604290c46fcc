// ragged_patch_embed on the CPU: for each tail one product of the patches of its images, straight into the batch.
//   images (B, C, H, W), tails (B,) int32, prefix (P, D), K weights (D, C, k, k) or packed (D / columns, C * k * k,
//   columns), biases (D,), tables (P + patches, D)
//   out (B * longest, D), zeros behind the live rows, and offsets (B + 1,)
// Patches that overlap or reach into the padding are copied with what lies there. B, P or D may be 0; an image of an
// unused tail does not exist, so unused tails cost nothing. Threads write disjoint rows. `panels`: multiply by our own
// kernel, not by oneDNN, straight onto the positions; it alone reads packed weights.
#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "../checks.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

struct Tail {
  int64_t stride, padding, side, grid_rows, grid_columns;

  int64_t patches() const { return grid_rows * grid_columns; }
};

constexpr int64_t kLongestSide = 1 << 14;  // of a packed kernel, pixels

struct Pixels {
  const char* data;  // (B, C, H, W), contiguous
  int64_t channels, height, width, element;
};

// A line of a patch is a few dozen bytes: as much as a call of memcpy takes.
void copy_line(char* to, const char* from, int64_t bytes) {
  for (; bytes >= 16; bytes -= 16, to += 16, from += 16) std::memcpy(to, from, 16);
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

// One patch as a row of the product's left factor: channel after channel, line after line.
char* copy_patch(const Pixels& p, const Tail& t, int64_t image, int64_t patch, char* out) {
  const int64_t top = patch / t.grid_columns * t.stride - t.padding;
  const int64_t left = patch % t.grid_columns * t.stride - t.padding;
  const int64_t before = std::clamp<int64_t>(-left, 0, t.side);
  const int64_t inside = std::clamp<int64_t>(p.width - (left + before), 0, t.side - before);
  const int64_t after = t.side - before - inside;
  const auto zeros = [&](int64_t count) {
    if (count > 0) std::memset(out, 0, static_cast<size_t>(count * p.element));
    out += count * p.element;
  };
  for (int64_t c = 0; c < p.channels; ++c) {
    for (int64_t y = top; y < top + t.side; ++y) {
      if (y < 0 || y >= p.height) {
        zeros(t.side);
        continue;
      }
      zeros(before);
      if (inside > 0) {
        const int64_t first = ((image * p.channels + c) * p.height + y) * p.width + left + before;
        copy_line(out, p.data + first * p.element, inside * p.element);
        out += inside * p.element;
      }
      zeros(after);
    }
  }
  return out;
}

// The side of the kernel of a weight, plain or packed; 0: it has none.
int64_t side_of(const Tensor& weight, int64_t channels, int64_t dim) {
  if (weight.dim() == 4) {
    const bool fits = weight.size(0) == dim && weight.size(1) == channels && weight.size(2) == weight.size(3);
    return fits ? weight.size(2) : 0;
  }
  const int64_t columns = kernels().panel_columns;
  const bool packed = weight.dim() == 3 && weight.size(2) == columns && dim % columns == 0 &&
                      weight.size(0) == dim / columns && weight.size(1) % channels == 0;
  if (!packed) return 0;
  const int64_t pixels = weight.size(1) / channels;
  int64_t side = 1;
  while (side < kLongestSide && side * side < pixels) ++side;
  return side * side == pixels ? side : 0;
}

Tail tail_of(size_t index, const Tensor& images, const Tensor& prefix, const Tensor& weight, const Tensor& bias,
             const Tensor& table, int64_t stride, int64_t padding, bool panels) {
  MTVIT_CHECK(stride >= 1 && padding >= 0, "strides must be at least 1 and paddings at least 0, got ", stride, " and ",
              padding, " for tail ", index);
  Tail t{stride, padding, side_of(weight, images.size(1), prefix.size(1)), 0, 0};
  MTVIT_CHECK(weight.is_cpu() && t.side >= 1 && (panels || weight.dim() == 4), "weights[", index, "] must have shape (",
              prefix.size(1), ", ", images.size(1), ", k, k)", panels ? ", or be packed from that," : "",
              " and k at least 1, got ", shape_of(weight));
  check_length("biases", bias, prefix.size(1));
  check_dim("pos_embeds", table, 2, "(P + patches, D)");
  for (const Tensor& each : {weight, bias, table}) {
    MTVIT_CHECK(same_dtype(each, images), "weights, biases and pos_embeds must have images' dtype");
  }
  // a padding that is no part of an image cannot overflow: it is bounded by what a table can hold
  MTVIT_CHECK(
      padding <= (int64_t{1} << 30) && images.size(2) + 2 * padding >= t.side && images.size(3) + 2 * padding >= t.side,
      "images must be at least as large as tail ", index, "'s kernel, got ", shape_of(images));
  t.grid_rows = (images.size(2) + 2 * padding - t.side) / stride + 1;
  t.grid_columns = (images.size(3) + 2 * padding - t.side) / stride + 1;
  MTVIT_CHECK(table.size(0) == prefix.size(0) + t.patches() && table.size(1) == prefix.size(1), "pos_embeds[", index,
              "] must have shape (", prefix.size(0) + t.patches(), ", ", prefix.size(1), "), got ", shape_of(table));
  return t;
}

std::tuple<Tensor, Tensor> ragged_patch_embed(const Tensor& images, const Tensor& tails, const Tensor& prefix,
                                              const std::vector<Tensor>& weights, const std::vector<Tensor>& biases,
                                              const std::vector<Tensor>& tables, const std::vector<int64_t>& strides,
                                              const std::vector<int64_t>& paddings, bool panels) {
  check_dim("images", images, 4, "(B, C, H, W)");
  check_dim("prefix", prefix, 2, "(P, D)");
  MTVIT_CHECK(images.size(1) > 0, "images must have at least one channel, got ", shape_of(images));
  const Dtype dtype = check_dtype("images", images);
  MTVIT_CHECK(same_dtype(prefix, images), "prefix must have images' dtype");
  const size_t num_tails = weights.size();
  const Tensor chosen = int32_vector("tails", tails);
  const auto* tail = data<int32_t>(chosen);
  MTVIT_CHECK(num_tails > 0 && biases.size() == num_tails && tables.size() == num_tails &&
                  strides.size() == num_tails && paddings.size() == num_tails,
              "weights, biases, pos_embeds, strides and paddings must be equally many, and at least one");
  const int64_t batch = images.size(0), dim = prefix.size(1), num_prefix = prefix.size(0);
  MTVIT_CHECK(chosen.size(0) == batch, "tails must have shape (", batch, ",), got ", shape_of(tails));
  std::vector<Tail> geometry;
  int64_t longest = 0;
  for (size_t k = 0; k < num_tails; ++k) {
    geometry.push_back(tail_of(k, images, prefix, weights[k], biases[k], tables[k], strides[k], paddings[k], panels));
    longest = std::max(longest, num_prefix + geometry[k].patches());
  }
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  MTVIT_CHECK(longest <= kMost && batch * longest <= kMost, "all images together must have at most ", kMost,
              " tokens, got ", batch, " images of up to ", longest);

  Tensor offsets = empty_int32(std::array{batch + 1});
  auto* cu = mutable_data<int32_t>(offsets);
  cu[0] = 0;
  std::vector<std::vector<int64_t>> images_of(num_tails);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t k = tail[b];
    MTVIT_CHECK_VALUE(k >= 0 && k < static_cast<int64_t>(num_tails), "tails must be in [0, ", num_tails, "), got ", k,
                      " for image ", b);
    images_of[static_cast<size_t>(k)].push_back(b);
    cu[b + 1] = cu[b] + static_cast<int32_t>(num_prefix + geometry[static_cast<size_t>(k)].patches());
  }
  Tensor x = empty_as(images, std::array{batch * longest, dim});
  const auto element = static_cast<int64_t>(images.element_size()), row = dim * element;
  auto* rows = mutable_data<char>(x);
  const int64_t dead = (batch * longest - cu[batch]) * row;
  if (dead > 0) std::memset(rows + cu[batch] * row, 0, static_cast<size_t>(dead));  // never on a null pointer

  const Tensor pixels = as_contiguous(images), head = as_contiguous(prefix);
  const Pixels p{data<char>(pixels), images.size(1), images.size(2), images.size(3), element};
  const Kernels& native = kernels();
  const auto add = [&](char* target, const void* y, int64_t count) {
    ScatterTask t{};
    t.dtype = dtype;
    t.x = target;
    t.y = y;
    t.d = t.x_stride = t.y_stride = dim;
    native.scatter_residual(t, 0, count);
  };
  for (size_t k = 0; k < num_tails && row > 0; ++k) {
    const std::vector<int64_t>& which = images_of[k];
    if (which.empty()) continue;
    const Tail& t = geometry[k];
    const int64_t count = static_cast<int64_t>(which.size()), depth = p.channels * t.side * t.side;
    const Tensor table = as_contiguous(tables[k]), bias = as_contiguous(biases[k]);
    Buffer large;
    auto* left = static_cast<char*>(kept_memory(Place::hidden, count * t.patches() * depth * element, large));
    const Tensor patches = tensor_of(left, images, std::array{count * t.patches(), depth});
    torch::stable::parallel_for(0, count * t.patches(), row_grain(depth), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        copy_patch(p, t, which[static_cast<size_t>(i / t.patches())], i % t.patches(), left + i * depth * element);
      }
    });
    const Tensor matrix = weights[k].dim() == 3 ? weights[k] : as_matrix(as_contiguous(weights[k]), depth);
    const Tensor tokens = panels ? Tensor() : onednn_linear(patches, matrix, bias);
    Tensor targets = empty_int32(std::array{panels ? count * t.patches() : 0});
    auto* target = mutable_data<int32_t>(targets);
    torch::stable::parallel_for(0, count, row_grain(dim * t.patches()), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int32_t start = cu[which[static_cast<size_t>(i)]];
        char* first = rows + start * row;
        std::memcpy(first, table.data_ptr(), static_cast<size_t>((num_prefix + t.patches()) * row));
        add(first, head.data_ptr(), num_prefix);
        if (panels) {
          std::iota(target + i * t.patches(), target + (i + 1) * t.patches(), start + static_cast<int32_t>(num_prefix));
        } else {
          add(first + num_prefix * row, data<char>(tokens) + i * t.patches() * row, t.patches());
        }
      }
    });
    if (panels) panel_linear_residual_(x, targets, patches, matrix, bias);
  }
  return {x, offsets};
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "ragged_patch_embed(Tensor images, Tensor tails, Tensor prefix, Tensor[] weights, Tensor[] biases, "
      "Tensor[] pos_embeds, SymInt[] strides, SymInt[] paddings, bool panels=False) -> (Tensor x, Tensor cu_seqlens)");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("ragged_patch_embed", TORCH_BOX(&mtvit_ops::ragged_patch_embed));
}
