#include "similarity.h"

#include <torch/headeronly/util/Exception.h>

namespace fastmem {

template <class T> Similarity<T> similarity(const std::string& norm, double eps) {
  if (norm == "inner") return {.inside = T(eps), .floor = T(-1), .delta = T(eps)};
  if (norm == "outer") return {.inside = 0, .floor = 0, .delta = T(eps)};
  if (norm == "rsqrt") return {.inside = 0, .floor = T(eps), .delta = 0};
  STD_TORCH_CHECK(norm == "clamp", "norm: expected inner, outer, rsqrt or clamp, got ", norm);
  return {.inside = 0, .floor = T(eps * eps), .delta = 0};
}

template Similarity<float> similarity<float>(const std::string&, double);
template Similarity<double> similarity<double>(const std::string&, double);

} // namespace fastmem
