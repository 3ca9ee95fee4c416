#include "isa.h"

#include <atomic>

namespace fastmem {

Isa widest_isa() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

static std::atomic<Isa> chosen{widest_isa()};

Isa isa() { return chosen.load(std::memory_order_relaxed); }

void set_isa(Isa choice) { chosen.store(choice, std::memory_order_relaxed); }

} // namespace fastmem
