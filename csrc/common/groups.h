// How many samples of a sequence go through a step together.
#pragma once

#include <algorithm>
#include <cstdint>

namespace fastmem {

// A step reads the weights once for the whole group, and every sample's state. Where both fit the cache, as many
// samples as fit; where not even one does, all: everything comes from memory then, and the weights best only once.
inline int64_t group_size(int64_t samples, int64_t weight_bytes, int64_t state_bytes, int64_t cache_bytes) {
  const int64_t fitting = (cache_bytes - weight_bytes) / std::max<int64_t>(1, state_bytes);
  return std::max<int64_t>(1, fitting < 1 ? samples : std::min(samples, fitting));
}

int64_t cache_bytes(); // of one core

// For tests and measurements: the size of every group; 0: by group_size.
void set_group_size(int64_t size);
int64_t forced_group_size();

} // namespace fastmem
