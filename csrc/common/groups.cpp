#include "groups.h"

#include <unistd.h>

#include <atomic>

namespace fastmem {
namespace {

std::atomic<int64_t> forced{0};

} // namespace

int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  return found > 0 ? found : int64_t{1} << 20;
}

void set_group_size(int64_t size) { forced = size; }
int64_t forced_group_size() { return forced; }

} // namespace fastmem
