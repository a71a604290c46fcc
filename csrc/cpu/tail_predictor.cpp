// MT-ViT's tail predictor in evaluation mode, as one operator: resample the image as F.interpolate with antialias does,
// then convolution, batch norm and ReLU seven times over, mean, linear layer. Everything in float32.
//   images (B, C, H, W); layers: weight, and gamma, beta, mean, variance of the batch norm, of each convolution in
//   order: (O, C, 3, 3) every fourth position, then pairs (O, 1, 3, 3) every second and (P, O, 1, 1); head (K, P) and
//   (K,); with a classifier (N, P) and (N,), whose answer's entropy the head reads behind the means: (K, P + 1)
//   out (B, K) in images' dtype. B may be 0. fold_tail_predictor does once what depends on no image, predict_tails the
//   rest, and chooses. Images are independent of each other: threads write disjoint rows.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "../checks.h"
#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

constexpr int64_t kMostSize = 4096;

struct Side {
  std::vector<int32_t> start, length;
  std::vector<float> weights;
  int64_t most = 0;

  Taps taps() const { return {start.data(), length.data(), weights.data(), static_cast<int64_t>(start.size()), most}; }
};

// A triangle as wide as two pixels of the coarser side, over the pixels whose centres it covers. Of the `size` new
// pixels those at 4 i - 1, 4 i and 4 i + 1; the first and the last may lie outside.
Side resampled_side(int64_t pixels, int64_t size) {
  const double scale = static_cast<double>(pixels) / static_cast<double>(size), reach = std::max(scale, 1.0);
  const int64_t positions = (size - 1) / 4 + 1;
  Side side;
  side.most = static_cast<int64_t>(2 * std::ceil(reach)) + 2;
  side.weights.resize(static_cast<size_t>(3 * positions * side.most));
  for (int64_t i = 0; i < 3 * positions; ++i) {
    const int64_t at = i / 3 * 4 + i % 3 - 1;
    int64_t first = 0, last = 0;
    float* weights = side.weights.data() + i * side.most;
    if (at >= 0 && at < size) {
      const double centre = scale * (static_cast<double>(at) + 0.5);
      first = std::clamp<int64_t>(static_cast<int64_t>(centre - reach + 0.5), 0, pixels);
      last = std::clamp<int64_t>(static_cast<int64_t>(centre + reach + 0.5), first, pixels);
      double total = 0;
      for (int64_t k = first; k < last; ++k) {
        const double weight = std::max(0.0, 1 - std::abs((static_cast<double>(k) + 0.5 - centre) / reach));
        weights[k - first] = static_cast<float>(weight);
        total += weight;
      }
      for (int64_t k = first; k < last; ++k) weights[k - first] = static_cast<float>(weights[k - first] / total);
    }
    MTVIT_ASSERT(last - first <= side.most);
    side.start.push_back(static_cast<int32_t>(first));
    side.length.push_back(static_cast<int32_t>(last - first));
  }
  return side;
}

std::vector<float> floats(const char* name, const Tensor& given) {
  const Tensor t = as_contiguous(given);
  std::vector<float> copy(static_cast<size_t>(t.numel()));
  if (!copy.empty()) kernels().to_float32(check_dtype(name, t), t.data_ptr(), copy.data(), t.numel());
  return copy;
}

struct Layer {
  std::vector<float> weights, shift;  // (taps, padded outputs), (padded outputs,)
};

// A convolution and its batch norm; `inputs` is 1 where each channel stays by itself.
Layer fold(const std::vector<Tensor>& layers, size_t index, int64_t outputs, int64_t inputs, int64_t kernel,
           double eps) {
  const Tensor& weight = layers[5 * index];
  check_dim("layers", weight, 4, "(O, I, k, k)");
  MTVIT_CHECK(
      weight.size(0) == outputs && weight.size(1) == inputs && weight.size(2) == kernel && weight.size(3) == kernel,
      "layers[", 5 * index, "] must have shape (", outputs, ", ", inputs, ", ", kernel, ", ", kernel, "), got ",
      shape_of(weight));
  for (size_t i = 1; i < 5; ++i) check_length("layers", layers[5 * index + i], outputs);
  const std::vector<float> w = floats("layers", weight), gamma = floats("layers", layers[5 * index + 1]),
                           beta = floats("layers", layers[5 * index + 2]),
                           mean = floats("layers", layers[5 * index + 3]),
                           variance = floats("layers", layers[5 * index + 4]);
  const int64_t taps = inputs * kernel * kernel, padded = round_up(outputs, kMaxWidth);
  Layer folded{std::vector<float>(static_cast<size_t>(taps * padded)), std::vector<float>(static_cast<size_t>(padded))};
  for (int64_t o = 0; o < outputs; ++o) {
    const auto i = static_cast<size_t>(o);
    const float scale = gamma[i] / std::sqrt(variance[i] + static_cast<float>(eps));
    folded.shift[i] = beta[i] - mean[i] * scale;
    for (int64_t k = 0; k < taps; ++k) {
      folded.weights[static_cast<size_t>(k * padded + o)] = w[static_cast<size_t>(o * taps + k)] * scale;
    }
  }
  return folded;
}

// Of the softmax of N >= 1 logits.
float entropy_of(const float* logits, int64_t count) {
  const float most = *std::max_element(logits, logits + count);
  float total = 0, weighted = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float share = std::exp(logits[i] - most);
    total += share;
    weighted += share * (logits[i] - most);
  }
  return std::log(total) - weighted / total;
}

// What is folded, as floats one behind the other: of each convolution weights and shift, then rows of the head, those
// of the classes behind those of the tails, their biases, and the tails' weights of the entropy.
struct Shape {
  std::vector<int64_t> widths;  // channels behind the first convolution and behind each pair
  int64_t channels, tails, classes;

  int64_t last_width() const { return round_up(widths.back(), kMaxWidth); }
  // taps and padded outputs of each convolution
  std::vector<std::pair<int64_t, int64_t>> convolutions() const {
    std::vector<std::pair<int64_t, int64_t>> sizes{{9 * channels, round_up(widths[0], kMaxWidth)}};
    for (size_t i = 1; i < widths.size(); ++i) {
      sizes.emplace_back(9, round_up(widths[i - 1], kMaxWidth));
      sizes.emplace_back(widths[i - 1], round_up(widths[i], kMaxWidth));
    }
    return sizes;
  }
  int64_t floats() const {
    int64_t total = (tails + classes) * (last_width() + 1) + tails;
    for (const auto& [taps, outputs] : convolutions()) total += (taps + 1) * outputs;
    return total;
  }
};

// (widths..., channels, tails, classes), as Python keeps them.
Shape shape_from(const std::vector<int64_t>& numbers) {
  MTVIT_CHECK(numbers.size() >= 4, "shape must be (widths..., channels, tails, classes), got ", numbers.size(),
              " numbers");
  constexpr int64_t kMost = 1 << 16;  // no product of sizes overflows
  for (size_t i = 0; i < numbers.size(); ++i) {
    const int64_t least = i + 2 < numbers.size() ? 1 : 0;
    MTVIT_CHECK(numbers[i] >= least && numbers[i] <= kMost, "shape must hold numbers in [", least, ", ", kMost,
                "], got ", numbers[i]);
  }
  const size_t pairs = numbers.size() - 3;
  return {{numbers.begin(), numbers.begin() + static_cast<std::ptrdiff_t>(pairs)},
          numbers[pairs],
          numbers[pairs + 1],
          numbers[pairs + 2]};
}

struct Folded {
  Tensor floats;
  std::vector<int64_t> shape;
};

Folded fold_all(const std::vector<Tensor>& layers, double eps, const Tensor& head_weight, const Tensor& head_bias,
                const std::optional<Tensor>& class_weight, const std::optional<Tensor>& class_bias) {
  MTVIT_CHECK(layers.size() >= 5 && layers.size() % 10 == 5, "layers must be 5, 15, 25 ... tensors, got ",
              layers.size());
  check_dim("head_weight", head_weight, 2, "(K, P)");
  Shape shape{{}, 0, head_weight.size(0), 0};
  check_length("head_bias", head_bias, shape.tails);
  MTVIT_CHECK(class_weight.has_value() == class_bias.has_value(), "class_weight and class_bias must be given together");
  if (class_weight) {
    check_dim("class_weight", *class_weight, 2, "(N, P)");
    shape.classes = class_weight->size(0);
    MTVIT_CHECK(shape.classes > 0, "class_weight must have classes, got ", shape_of(*class_weight));
    check_length("class_bias", *class_bias, shape.classes);
  }

  std::vector<Layer> folded;
  const auto outputs = [&](size_t index) {
    check_dim("layers", layers[5 * index], 4, "(O, I, k, k)");
    MTVIT_CHECK(layers[5 * index].size(0) > 0, "layers[", 5 * index, "] must have outputs, got ",
                shape_of(layers[5 * index]));
    return layers[5 * index].size(0);
  };
  shape.widths.push_back(outputs(0));
  shape.channels = layers[0].size(1);
  folded.push_back(fold(layers, 0, shape.widths[0], shape.channels, 3, eps));
  for (size_t index = 1; index < layers.size() / 5; index += 2) {
    folded.push_back(fold(layers, index, shape.widths.back(), 1, 3, eps));
    const int64_t wider = outputs(index + 1);
    folded.push_back(fold(layers, index + 1, wider, shape.widths.back(), 1, eps));
    shape.widths.push_back(wider);
  }
  const int64_t means = shape.widths.back(), read = means + (shape.classes > 0), last_width = shape.last_width();
  MTVIT_CHECK(head_weight.size(1) == read, "head_weight must have shape (K, ", read, "), got ", shape_of(head_weight));
  if (class_weight) {
    MTVIT_CHECK(class_weight->size(1) == means, "class_weight must have shape (N, ", means, "), got ",
                shape_of(*class_weight));
  }

  std::vector<int64_t> numbers = shape.widths;
  numbers.insert(numbers.end(), {shape.channels, shape.tails, shape.classes});
  shape_from(numbers);  // refuses what the predictor would refuse
  Tensor out = empty_float32(std::array{shape.floats()});
  float* to = mutable_data<float>(out);
  const auto append = [&](const std::vector<float>& values) { to = std::copy(values.begin(), values.end(), to); };
  for (const Layer& layer : folded) {
    append(layer.weights);
    append(layer.shift);
  }
  const std::vector<float> head = floats("head_weight", head_weight);
  const auto append_rows = [&](const std::vector<float>& rows, int64_t count, int64_t length) {
    for (int64_t i = 0; i < count; ++i) {
      std::fill_n(to, last_width, 0.0f);
      std::copy_n(rows.data() + i * length, means, to);
      to += last_width;
    }
  };
  append_rows(head, shape.tails, read);
  if (class_weight) append_rows(floats("class_weight", *class_weight), shape.classes, means);
  append(floats("head_bias", head_bias));
  if (class_bias) append(floats("class_bias", *class_bias));
  for (int64_t k = 0; k < shape.tails; ++k) {
    *to++ = shape.classes > 0 ? head[static_cast<size_t>(k * read + means)] : 0.0f;
  }
  return {out, numbers};
}

// The best of score minus weighted cost; equals go to the first, and so does a score that is no number.
int32_t choose(const float* value, int64_t count) {
  int32_t best = 0;
  for (int64_t k = 0; k < count; ++k) {
    if (std::isnan(value[k])) return 0;
    if (value[k] > value[best]) best = static_cast<int32_t>(k);
  }
  return best;
}

// Scores (B, K) in images' dtype and, where costs (K,) are given, the tail chosen for each image, (B,).
std::tuple<Tensor, Tensor> predict_tails(const Tensor& images, int64_t size, const Tensor& folded,
                                         const std::vector<int64_t>& numbers, const std::vector<double>& costs,
                                         double cost_weight) {
  check_dim("images", images, 4, "(B, C, H, W)");
  const Dtype dtype = check_dtype("images", images);
  const int64_t batch = images.size(0), channels = images.size(1), height = images.size(2), width = images.size(3);
  MTVIT_CHECK(channels > 0 && height > 0 && width > 0 && height < (int64_t{1} << 30) && width < (int64_t{1} << 30),
              "images must have channels and pixels, got ", shape_of(images));
  MTVIT_CHECK(size >= 1 && size <= kMostSize, "size must be in [1, ", kMostSize, "], got ", size);
  const Shape shape = shape_from(numbers);
  MTVIT_CHECK(channels == shape.channels, "images must have ", shape.channels, " channels, got ", shape_of(images));
  check_length("folded", folded, shape.floats());
  MTVIT_CHECK(is_float32(folded) && folded.is_contiguous(), "folded must be contiguous float32");
  MTVIT_CHECK(costs.empty() || static_cast<int64_t>(costs.size()) == shape.tails, "costs must be one a tail, got ",
              costs.size(), " for ", shape.tails);
  MTVIT_CHECK(costs.empty() || shape.tails > 0, "there must be a tail to choose");

  const Side rows = resampled_side(height, size), columns = resampled_side(width, size);
  std::vector<const float*> weights, shifts;
  const auto* next = data<float>(folded);
  for (const auto& [taps, outputs] : shape.convolutions()) {
    weights.push_back(next);
    shifts.push_back(next + taps * outputs);
    next += (taps + 1) * outputs;
  }
  const int64_t tails = shape.tails, outputs = tails + shape.classes;
  const Tensor pixels = as_contiguous(images);
  PredictorTask t{};
  t.dtype = dtype;
  t.images = pixels.data_ptr();
  t.channels = channels;
  t.height = height;
  t.width = width;
  t.rows = rows.taps();
  t.columns = columns.taps();
  t.widths = shape.widths.data();
  t.weights = weights.data();
  t.shifts = shifts.data();
  t.head = next;
  t.head_bias = next + outputs * shape.last_width();
  const float* by_entropy = t.head_bias + outputs;
  t.pairs = static_cast<int64_t>(shape.widths.size()) - 1;
  t.outputs = outputs;
  const int64_t positions = t.rows.count / 3 * (t.columns.count / 3);
  t.most_activations = positions * round_up(*std::max_element(shape.widths.begin(), shape.widths.end()), kMaxWidth);

  Tensor out = empty_float32(std::array{batch, tails});
  auto* logits = mutable_data<float>(out);
  const Kernels& native = kernels();
  torch::stable::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(static_cast<size_t>(predictor_scratch_floats(t)));
    std::vector<float> row(static_cast<size_t>(outputs));
    for (int64_t b = begin; b < end; ++b) {
      native.predict_tail(t, b, scratch.data(), row.data());
      const float entropy = shape.classes > 0 ? entropy_of(row.data() + tails, shape.classes) : 0;
      for (int64_t k = 0; k < tails; ++k) {
        logits[b * tails + k] = row[static_cast<size_t>(k)] + by_entropy[k] * entropy;
      }
    }
  });
  const Tensor scores = dtype == Dtype::f32 ? out : torch::stable::to(out, images.scalar_type());
  Tensor chosen = empty_int32(std::array{costs.empty() ? 0 : batch});
  if (costs.empty()) return {scores, chosen};
  // of the scores as they are returned
  std::vector<float> value(static_cast<size_t>(batch * tails));
  if (!value.empty()) native.to_float32(dtype, scores.data_ptr(), value.data(), batch * tails);
  for (int64_t b = 0; b < batch; ++b) {
    float* of_image = value.data() + b * tails;
    for (int64_t k = 0; k < tails; ++k) {
      of_image[k] -= static_cast<float>(cost_weight) * static_cast<float>(costs[static_cast<size_t>(k)]);
    }
    mutable_data<int32_t>(chosen)[b] = choose(of_image, tails);
  }
  return {scores, chosen};
}

Tensor fold_tail_predictor(const std::vector<Tensor>& layers, double eps, const Tensor& head_weight,
                           const Tensor& head_bias, std::optional<Tensor> class_weight,
                           std::optional<Tensor> class_bias) {
  return fold_all(layers, eps, head_weight, head_bias, class_weight, class_bias).floats;
}

Tensor tail_predictor(const Tensor& images, int64_t size, const std::vector<Tensor>& layers, double eps,
                      const Tensor& head_weight, const Tensor& head_bias, std::optional<Tensor> class_weight,
                      std::optional<Tensor> class_bias) {
  const Folded folded = fold_all(layers, eps, head_weight, head_bias, class_weight, class_bias);
  return std::get<0>(predict_tails(images, size, folded.floats, folded.shape, {}, 0.0));
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def(
      "fold_tail_predictor(Tensor[] layers, float eps, Tensor head_weight, Tensor head_bias, Tensor? "
      "class_weight=None, "
      "Tensor? class_bias=None) -> Tensor");
  m.def(
      "predict_tails(Tensor images, int size, Tensor folded, int[] shape, float[] costs, float cost_weight) -> "
      "(Tensor scores, Tensor tails)");
  m.def(
      "tail_predictor(Tensor images, int size, Tensor[] layers, float eps, Tensor head_weight, Tensor head_bias, "
      "Tensor? class_weight=None, Tensor? class_bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("fold_tail_predictor", TORCH_BOX(&mtvit_ops::fold_tail_predictor));
  m.impl("predict_tails", TORCH_BOX(&mtvit_ops::predict_tails));
  m.impl("tail_predictor", TORCH_BOX(&mtvit_ops::tail_predictor));
}
