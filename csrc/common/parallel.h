// Loops over samples on torch's thread pool, with subnormals read and written as zero inside.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace fastmem {

// Allocation fills a link matrix with subnormals, and each costs a hundred cycles where they are not flushed.
class FlushSubnormals {
public:
#if defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040u); } // flush-to-zero, denormals-are-zero
  ~FlushSubnormals() { _mm_setcsr(saved_); }

private:
  unsigned saved_;
#elif defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" ::"r"(saved_ | (uint64_t{1} << 24)));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" ::"r"(saved_)); }

private:
  uint64_t saved_;
#else
  FlushSubnormals() {}
#endif
  FlushSubnormals(const FlushSubnormals&) = delete;
  FlushSubnormals& operator=(const FlushSubnormals&) = delete;
};

// body(sample) for 0 <= sample < count. `bytes` each sample touches: below 32 KiB a thread takes several.
template <class Body> void for_each_sample(int64_t count, int64_t bytes, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, bytes));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t sample = begin; sample < end; ++sample) body(sample);
  });
}

// How many threads share `count` samples. Scratch memory is needed once a share, not once a sample.
inline int64_t shares(int64_t count, int64_t bytes) {
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, bytes));
  return std::min<int64_t>(torch::stable::get_num_threads(), (count + grain - 1) / grain);
}

// body(sample, share) for 0 <= sample < count, each share a run of samples in one thread.
template <class Body> void for_each_sample_in_shares(int64_t count, int64_t shares, const Body& body) {
  torch::stable::parallel_for(0, shares, 1, [&](int64_t begin, int64_t end) {
    const FlushSubnormals flush;
    for (int64_t share = begin; share < end; ++share)
      for (int64_t sample = count * share / shares; sample < count * (share + 1) / shares; ++sample)
        body(sample, share);
  });
}

// What such a loop leaves in parts: out = sum of `parts` arrays of `size` that lie `distance` apart, in order.
template <class T> void fold(const T* in, int64_t parts, int64_t distance, int64_t size, T* out) {
  for (int64_t k = 0; k < size; ++k) out[k] = parts ? in[k] : T(0);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t k = 0; k < size; ++k) out[k] += in[part * distance + k];
}

} // namespace fastmem
