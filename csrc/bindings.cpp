// What is no tensor operator: build information and host-side planning over NumPy buffers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace py = pybind11;

namespace mtvit_ops {
namespace {

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  std::istringstream in(list);
  for (std::string part; std::getline(in, part, ',');) parts.push_back(part);
  return parts;
}

py::dict build_info() {
  py::dict info;
  info["compiler"] = MTVIT_OPS_COMPILER;
  info["cxx_flags"] = MTVIT_OPS_CXX_FLAGS;
  info["build_type"] = MTVIT_OPS_BUILD_TYPE;
  info["isa_levels"] = split(MTVIT_OPS_ISA_LEVELS);
  info["cuda"] = bool(MTVIT_OPS_HAVE_CUDA);
  info["cuda_archs"] = split(MTVIT_OPS_CUDA_ARCHS);
  info["cuda_compiler"] = MTVIT_OPS_CUDA_COMPILER;
  info["torch_version"] = MTVIT_OPS_TORCH_VERSION;
  return info;
}

using Lengths = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;

// First fit, longest first: indices of the sequences in each bin of at most `budget` tokens.
std::vector<std::vector<int64_t>> pack_greedy(const Lengths& lengths, int64_t budget) {
  const auto length = lengths.unchecked<1>();
  std::vector<int64_t> order(static_cast<size_t>(length.shape(0)));
  std::iota(order.begin(), order.end(), 0);
  for (const int64_t i : order) {
    if (length(i) < 0 || length(i) > budget) {
      throw std::invalid_argument("lengths must lie in [0, " + std::to_string(budget) + "], got " +
                                  std::to_string(length(i)));
    }
  }
  py::gil_scoped_release nogil;
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return length(a) > length(b); });
  std::vector<std::vector<int64_t>> bins;
  std::vector<int64_t> room;
  for (const int64_t i : order) {
    const auto found = std::find_if(room.begin(), room.end(), [&](int64_t left) { return left >= length(i); });
    const auto bin = static_cast<size_t>(found - room.begin());
    if (found == room.end()) {
      room.push_back(budget);
      bins.emplace_back();
    }
    room[bin] -= length(i);
    bins[bin].push_back(i);
  }
  return bins;
}

}  // namespace
}  // namespace mtvit_ops

PYBIND11_MODULE(_build, m) {
  m.doc() = "Build information and host-side planning of mtvit_ops.";
  m.def("build_info", &mtvit_ops::build_info, "How this extension was built, as a dict.");
  m.def("pack_greedy", &mtvit_ops::pack_greedy, py::arg("lengths"), py::arg("budget"),
        "First-fit packing, longest first: lists of sequence indices whose lengths sum to at most `budget`.");
}
