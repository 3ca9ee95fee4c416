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

// Also from or to nowhere, where there is nothing to copy: memcpy may not be given null.
template <class T> void copy(T* to, const T* from, int64_t count) {
  if (count > 0) __builtin_memcpy(to, from, sizeof(T) * size_t(count));
}
template <class T> void clear(T* to, int64_t count) {
  if (count > 0) __builtin_memset(to, 0, sizeof(T) * size_t(count));
}

template <class T> struct Scratch {
  T* next;
  T* take(int64_t count) {
    T* const taken = next;
    next += in_lines(count);
    return taken;
  }
  T* zeros(int64_t count) {
    T* const taken = take(count);
    clear(taken, count);
    return taken;
  }
};

} // namespace fastmem::FASTMEM_ISA
#endif
