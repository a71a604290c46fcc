// What is no tensor operator: build information, host-side planning over NumPy buffers, and a look at Python objects.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
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

// Brings a list's objects to the caches, or what their first words point to.
void fetch(const py::list& list, bool pointees) {
  for (py::ssize_t i = 0; i < PyList_Size(list.ptr()); ++i) {
    PyObject* object = PyList_GetItem(list.ptr(), i);
    if (!pointees) {
      __builtin_prefetch(object);
      continue;
    }
    std::array<uintptr_t, 4> words{};  // behind reference count and type
    const auto size =
        std::min<size_t>(sizeof(words), static_cast<size_t>(Py_TYPE(object)->tp_basicsize) - sizeof(PyObject));
    std::memcpy(words.data(), reinterpret_cast<const char*>(object) + sizeof(PyObject), size);
    for (const uintptr_t word : words) {
      __builtin_prefetch(reinterpret_cast<const void*>(word));  // no pointer: nothing happens
      __builtin_prefetch(reinterpret_cast<const void*>(word + 64));
    }
  }
}

// Of nn/prepared.py: whether dicts still hold what they held (None: or have no such name), the hooks are empty, and
// weights lie where they lay (the first ones: those with an address) and have the version they had. Lists of references
// and no struct of them, so that Python's garbage collector sees what is held.
bool unchanged(const py::list& dicts, const py::list& names, const py::list& values, const py::list& hooks,
               const py::list& weights, const py::list& addresses, const py::list& versions) {
  const auto at = [](const py::list& list, py::ssize_t i) { return PyList_GetItem(list.ptr(), i); };  // borrowed
  const auto checked = [](PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return object;
  };
  // all this is far away, each thing behind another: first what the lists name, then what that points to
  fetch(dicts, false);
  fetch(hooks, false);
  fetch(weights, false);
  fetch(dicts, true);
  fetch(weights, true);
  for (py::ssize_t i = 0; i < PyList_Size(dicts.ptr()); ++i) {
    PyObject* held = PyDict_GetItemWithError(at(dicts, i), checked(at(names, i)));
    if (held == nullptr && PyErr_Occurred()) throw py::error_already_set();
    if ((held == nullptr ? Py_None : held) != checked(at(values, i))) return false;
  }
  for (py::ssize_t i = 0; i < PyList_Size(hooks.ptr()); ++i) {
    if (PyDict_Size(at(hooks, i)) != 0) return false;
  }
  static PyObject* const version = PyUnicode_InternFromString("_version");
  static PyObject* const data_ptr = PyUnicode_InternFromString("data_ptr");
  const auto equals = [&](PyObject* got, PyObject* kept) {
    const auto owned = py::reinterpret_steal<py::object>(checked(got));
    const int equal = PyObject_RichCompareBool(got, checked(kept), Py_EQ);
    if (equal < 0) throw py::error_already_set();
    return equal == 1;
  };
  for (py::ssize_t i = 0; i < PyList_Size(weights.ptr()); ++i) {
    PyObject* weight = at(weights, i);
    if (!equals(PyObject_GetAttr(weight, version), at(versions, i))) return false;
    if (i >= PyList_Size(addresses.ptr())) continue;
    if (!equals(PyObject_CallMethodObjArgs(weight, data_ptr, nullptr), at(addresses, i))) return false;
  }
  return true;
}

}  // namespace
}  // namespace mtvit_ops

PYBIND11_MODULE(_build, m) {
  m.doc() = "Build information and host-side helpers of mtvit_ops.";
  m.def("build_info", &mtvit_ops::build_info, "How this extension was built, as a dict.");
  m.def("unchanged", &mtvit_ops::unchanged, "Whether dicts, hooks and weights are what they were.");
  m.def("pack_greedy", &mtvit_ops::pack_greedy, py::arg("lengths"), py::arg("budget"),
        "First-fit packing, longest first: lists of sequence indices whose lengths sum to at most `budget`.");
}
