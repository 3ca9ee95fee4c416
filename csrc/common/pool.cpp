#include "pool.h"

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>

namespace fastmem {
namespace {

constexpr int64_t kLarge = int64_t{1} << 18;    // smaller blocks stay in malloc's own lists
constexpr int64_t kHuge = int64_t{1} << 21;     // from here on the kernel can use huge pages
constexpr int64_t kMostKept = int64_t{1} << 28; // 256 MiB in all
constexpr int kSlots = 256;

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
    const int failed = posix_memalign(&data, size_t(bytes < kHuge ? 4096 : kHuge), size_t(bytes));
    STD_TORCH_CHECK(!failed, "out of memory: could not allocate ", bytes, " bytes");
    if (bytes >= kHuge) madvise(data, size_t(bytes), MADV_HUGEPAGE);
    return data;
  }

  void give(void* data, int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      if (count_ < kSlots && kept_ + bytes <= kMostKept) {
        blocks_[count_++] = {data, bytes};
        kept_ += bytes;
        return;
      }
    }
    std::free(data);
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

// Never destroyed: tensors may outlive every static object.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

} // namespace

Tensor empty_large(const Tensor& like, std::initializer_list<int64_t> sizes) {
  int64_t elements = 1;
  for (const int64_t size : sizes) elements *= size;
  const int64_t bytes = elements * int64_t(like.element_size());
#if defined(__SANITIZE_ADDRESS__)
  const bool pooled = false; // so that every result has an end of its own
#else
  const bool pooled = bytes >= kLarge;
#endif
  if (!pooled) return empty(like, sizes);
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes.begin()[d];
  }
  return torch::stable::from_blob(pool().take(bytes), sizes, strides, like.device(), like.scalar_type(),
                                  [bytes](void* data) { pool().give(data, bytes); });
}

int64_t empty_cache() { return pool().clear(); }

} // namespace fastmem
