// PyTorch's own linear layer on the CPU (mkldnn::_linear_pointwise), through the C function that compiled models call.
// The dispatcher's stable interface cannot pass its list of optional scalars. Looked up by name, so that a PyTorch
// without oneDNN still loads this library.
#include <dlfcn.h>

#include "ops.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

using Handle = AtenTensorHandle;
using LinearPointwise = AOTITorchError (*)(Handle x, Handle weight, Handle* bias, const char* activation,
                                           const double** scalars, int64_t num_scalars, const char** algorithm,
                                           Handle* out);

struct Found {
  LinearPointwise function = nullptr;
  std::string missing;
};

const Found& find() {
  static const Found found = [] {
    Found result;
    // Python loads PyTorch's libraries privately: the default search would not see them
    void* library = dlopen("libtorch_cpu.so", RTLD_NOW | RTLD_NOLOAD);
    if (library == nullptr) {
      result.missing = "libtorch_cpu.so is not loaded under that name";
      return result;
    }
    constexpr const char* kName = "aoti_torch_cpu__linear_pointwise";
    result.function = reinterpret_cast<LinearPointwise>(dlsym(library, kName));
    if (result.function == nullptr) result.missing = std::string("this PyTorch has no ") + kName;
    dlclose(library);  // PyTorch itself keeps it
    return result;
  }();
  return found;
}

}  // namespace

const std::string& onednn_linear_missing() {
  return find().missing;
}

void check_linear(int64_t tokens, int64_t features, const Tensor& like, const Tensor& weight,
                  const std::optional<Tensor>& bias) {
  MTVIT_CHECK(weight.dim() == 2 && weight.size(1) == features, "weight must have shape (out_features, ", features,
              "), got ", shape_of(weight));
  MTVIT_CHECK(same_dtype(weight, like), "weight must have x's dtype");
  if (bias) {
    check_length("bias", *bias, weight.size(0));
    MTVIT_CHECK(same_dtype(*bias, like), "bias must have x's dtype");
  }
  MTVIT_CHECK(features > 0 || tokens == 0 || weight.size(0) == 0, "x must have at least one feature, got (", tokens,
              ", ", features, ")");
}

Tensor onednn_linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, bool gelu) {
  const Found& found = find();
  MTVIT_CHECK(found.function != nullptr, found.missing);
  check_dim("x", x, 2, "(T, in_features)");
  check_linear(x.size(0), x.size(1), x, weight, bias);
  // PyTorch's kernel asks for at least one of everything
  if (x.size(0) == 0 || weight.size(0) == 0) return empty_as(x, std::array{x.size(0), weight.size(0)});
  Handle bias_handle = bias ? bias->get() : nullptr;
  const char* algorithm = gelu ? "none" : "";  // "none" is GELU by erf, not by tanh
  Handle out = nullptr;
  const AOTITorchError error = found.function(x.get(), weight.get(), bias ? &bias_handle : nullptr,
                                              gelu ? "gelu" : "none", nullptr, 0, &algorithm, &out);
  MTVIT_CHECK(error == 0, "PyTorch's oneDNN linear refused x ", shape_of(x));
  return Tensor(out);
}

namespace {

std::string why_missing() {
  return onednn_linear_missing();
}

}  // namespace
}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("onednn_linear_missing() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CompositeExplicitAutograd, m) {
  m.impl("onednn_linear_missing", TORCH_BOX(&mtvit_ops::why_missing));
}
