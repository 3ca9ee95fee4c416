// The part of fastmem._C that carries no tensors. Importing it also loads the ops, which register themselves.
#include "groups.h"
#include "interrupt.h"
#include "isa.h"
#include "pool.h"

#include <pybind11/pybind11.h>

#include <optional>
#include <string>
#include <thread>

namespace py = pybind11;
using fastmem::Isa;

static const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};

// The exception that ended an op; raise_interrupt raises it in Python, where the op itself can only fail.
static std::optional<py::error_already_set> interrupt;
static std::thread::id interrupted; // in which it was

static bool signal_raised() {
  const py::gil_scoped_acquire lock;
  if (PyErr_CheckSignals() == 0) return false;
  interrupt.emplace();
  interrupted = std::this_thread::get_id();
  return true;
}

PYBIND11_MODULE(_C, module) {
  fastmem::set_poll(&signal_raised);
  module.def("group_size", &fastmem::group_size, py::arg("samples"), py::arg("weight_bytes"), py::arg("state_bytes"),
             py::arg("cache_bytes"), "How many samples of a sequence go through a step together.");
  module.def("set_group_size", &fastmem::set_group_size,
             "For measurements: the size of every group; 0: by group_size.");
  module.def("raise_interrupt", [] {
    if (!interrupt || interrupted != std::this_thread::get_id()) return;
    py::error_already_set raised = *interrupt;
    interrupt.reset();
    throw raised;
  }, "Raises the exception of a signal handler that ended an op, if one did.");
  module.attr("__version__") = FASTMEM_VERSION;
  module.attr("compiler") = std::string("g++ ") + __VERSION__;
#if defined(__SANITIZE_ADDRESS__)
  module.attr("sanitized") = true;
#else
  module.attr("sanitized") = false;
#endif
  module.def("empty_cache", &fastmem::empty_cache,
             "Returns the memory kept for large results; gives its size in bytes.");
  module.def("set_poison", &fastmem::set_poison, "For tests: large results hold NaN until they are written.");
  module.def("isa", [] { return kIsaNames[int(fastmem::isa())]; }, "The instruction set the kernels use now.");
  module.def("isas", [] {
    py::list names;
    for (int i = 0; i <= int(fastmem::widest_isa()); ++i) names.append(kIsaNames[i]);
    return names;
  }, "The instruction sets of this processor and build, narrowest first.");
  module.def("set_isa", [](const std::string& name) {
    for (int i = 0; i <= int(fastmem::widest_isa()); ++i)
      if (name == kIsaNames[i]) return fastmem::set_isa(Isa(i));
    throw py::value_error("isa: expected one of isas(), got '" + name + "'");
  }, py::arg("isa"), "Uses another instruction set from now on; not while an op runs.");
}
