// The part of fastmem._C that carries no tensors. Importing it also loads the ops, which register themselves.
#include "isa.h"
#include "pool.h"

#include <pybind11/pybind11.h>

#include <string>

namespace py = pybind11;
using fastmem::Isa;

static const char* const kIsaNames[] = {"baseline", "avx2", "avx512"};

PYBIND11_MODULE(_C, module) {
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
