// Scratch memory of a kernel, which its caller provides: counted by in_lines, handed out by Scratch.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastmem {

// Room for `count` elements in whole cache lines, of either dtype.
inline int64_t in_lines(int64_t count) { return (count + 15) / 16 * 16; }

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

template <class T> struct Scratch {
  T* next;
  T* take(int64_t count) {
    T* const taken = next;
    next += in_lines(count);
    return taken;
  }
  T* zeros(int64_t count) {
    T* const taken = take(count);
    __builtin_memset(taken, 0, sizeof(T) * size_t(count));
    return taken;
  }
};

} // namespace fastmem::FASTMEM_ISA
#endif
