#include "pool.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <mutex>

namespace fastmem {
namespace {

constexpr int64_t kLarge = int64_t{1} << 18; // smaller blocks stay in malloc's own lists
constexpr int64_t kHuge = int64_t{1} << 21;  // from here on the kernel can use huge pages
constexpr int kSlots = 256;

// What a container may use, if this is one that says so; else more than any machine has.
int64_t container_bytes() {
  for (const char* const name : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t bytes = 0;
    if (std::ifstream(name) >> bytes && bytes > 0) return bytes; // "max" is no number
  }
  return std::numeric_limits<int64_t>::max();
}

// Bytes kept in all: a sixteenth of the memory, but at least 256 MiB and at most 2 GiB.
int64_t most_kept() {
  static const int64_t most =
      std::clamp(std::min(int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE), container_bytes()) / 16,
                 int64_t{1} << 28, int64_t{1} << 31);
  return most;
}

struct Block {
  void* data;
  int64_t bytes;
};

class Pool {
public:
  // The block of this size that was freed last, which may still be in the cache; else a new one.
  void* take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (int i = count_ - 1; i >= 0; --i)
        if (blocks_[i].bytes == bytes) {
          void* const data = blocks_[i].data;
          for (--count_; i < count_; ++i) blocks_[i] = blocks_[i + 1];
          kept_ -= bytes;
          return data;
        }
    }
    void* data = nullptr;
    const size_t alignment = size_t(bytes < kHuge ? 4096 : kHuge);
    if (posix_memalign(&data, alignment, size_t(bytes)) != 0) {
      clear();
      STD_TORCH_CHECK(posix_memalign(&data, alignment, size_t(bytes)) == 0, "out of memory: could not allocate ", bytes,
                      " bytes");
    }
    if (bytes >= kHuge) madvise(data, size_t(bytes), MADV_HUGEPAGE);
    return data;
  }

  // The oldest blocks make room, so that sizes that are no longer asked for do not stay.
  void give(void* data, int64_t bytes) {
    if (bytes > most_kept()) return std::free(data);
    const std::lock_guard lock(mutex_);
    int oldest = 0;
    for (; oldest < count_ && (count_ - oldest >= kSlots || kept_ + bytes > most_kept()); ++oldest) {
      std::free(blocks_[oldest].data);
      kept_ -= blocks_[oldest].bytes;
    }
    for (int i = oldest; i < count_; ++i) blocks_[i - oldest] = blocks_[i];
    count_ -= oldest;
    blocks_[count_++] = {data, bytes};
    kept_ += bytes;
  }

  int64_t clear() {
    const std::lock_guard lock(mutex_);
    const int64_t freed = kept_;
    while (count_ > 0) std::free(blocks_[--count_].data);
    kept_ = 0;
    return freed;
  }

private:
  std::mutex mutex_;
  Block blocks_[kSlots];
  int count_ = 0;
  int64_t kept_ = 0;
};

std::atomic<bool> poisoned{false};

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

Tensor make_large(const Tensor& like, const int64_t* sizes, size_t dims) {
  int64_t bytes = int64_t(like.element_size());
  bool overflows = false;
  for (size_t d = 0; d < dims; ++d) overflows = __builtin_mul_overflow(bytes, sizes[d], &bytes) || overflows;
#if defined(__SANITIZE_ADDRESS__)
  const bool pooled = false; // so that every result has an end of its own
#else
  const bool pooled = bytes >= kLarge && !overflows; // torch says what is wrong with too large a size
#endif
  if (!pooled) return empty(like, sizes, dims);
  std::vector<int64_t> strides(dims);
  int64_t stride = 1;
  for (size_t d = dims; d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d];
  }
  void* const block = pool().take(bytes);
  if (poisoned) __builtin_memset(block, 0xff, size_t(bytes));
  return torch::stable::from_blob(block, torch::headeronly::IntHeaderOnlyArrayRef(sizes, dims), strides, like.device(),
                                  like.scalar_type(), [bytes](void* data) { pool().give(data, bytes); });
}

} // namespace

Tensor empty_large(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return make_large(like, sizes.begin(), sizes.size());
}

Tensor empty_large(const Tensor& like) {
  const auto sizes = like.sizes();
  return make_large(like, sizes.data(), sizes.size());
}

void set_poison(bool poison) { poisoned = poison; }

int64_t empty_cache() { return pool().clear(); }

} // namespace fastmem
