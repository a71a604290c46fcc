// Chooses the instruction set once per process.
#include <cstdlib>
#include <string>
#include <vector>

#include "../checks.h"

#include <torch/csrc/stable/library.h>

namespace mtvit_ops {
namespace {

// Best level last.
std::vector<const Kernels*> levels_of_this_cpu() {
  std::vector<const Kernels*> levels{&kernels_portable};
#ifdef MTVIT_OPS_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    levels.push_back(&kernels_avx2);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      levels.push_back(&kernels_avx512);
      if (__builtin_cpu_supports("avx512bf16")) levels.push_back(&kernels_avx512bf16);
    }
  }
#endif
  return levels;
}

const Kernels& choose() {
  const std::vector<const Kernels*> levels = levels_of_this_cpu();
  const char* wanted = std::getenv("MTVIT_OPS_ISA");
  if (wanted == nullptr || *wanted == '\0') return *levels.back();
  std::string offered;
  for (const Kernels* level : levels) {
    if (std::string(wanted) == level->name) return *level;
    offered += (offered.empty() ? "" : ", ") + std::string(level->name);
  }
  fail("MTVIT_OPS_ISA must be one of ", offered, " on this CPU, got ", wanted);
}

std::string isa() {
  return kernels().name;
}

// The exponential of the attention kernels, for the test of its accuracy.
Tensor exp2_of(const Tensor& x) {
  check_dim("x", x, 1, "(N,)");
  MTVIT_CHECK(x.scalar_type() == ScalarType::Float, "x must be float32");
  const Tensor in = torch::stable::contiguous(x);
  Tensor out = torch::stable::new_empty(in, {in.size(0)});
  kernels().exp2(data<float>(in), mutable_data<float>(out), in.size(0));
  return out;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

}  // namespace mtvit_ops

STABLE_TORCH_LIBRARY_FRAGMENT(mtvit_ops_cpp, m) {
  m.def("isa() -> str");
  m.def("_exp2(Tensor x) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CompositeExplicitAutograd, m) {
  m.impl("isa", TORCH_BOX(&mtvit_ops::isa));
}

STABLE_TORCH_LIBRARY_IMPL(mtvit_ops_cpp, CPU, m) {
  m.impl("_exp2", TORCH_BOX(&mtvit_ops::exp2_of));
}
