#include "similarity.h"

#include <torch/headeronly/util/Exception.h>

namespace fastmem {

template <class T> Similarity<T> similarity(const std::string& norm, double eps) {
  if (norm == "inner") return {.inside = T(eps), .floor = T(-1), .added = 0, .delta = T(eps), .by_width = false};
  if (norm == "outer") return {.inside = 0, .floor = 0, .added = 0, .delta = T(eps), .by_width = false};
  if (norm == "rsqrt") return {.inside = 0, .floor = T(eps), .added = 0, .delta = 0, .by_width = false};
  if (norm == "clamp") return {.inside = 0, .floor = T(eps * eps), .added = 0, .delta = 0, .by_width = false};
  STD_TORCH_CHECK(norm == "width", "norm: expected inner, outer, rsqrt, clamp or width, got ", norm);
  return {.inside = 0, .floor = 0, .added = T(eps), .delta = T(eps), .by_width = true};
}

template Similarity<float> similarity<float>(const std::string&, double);
template Similarity<double> similarity<double>(const std::string&, double);

} // namespace fastmem
