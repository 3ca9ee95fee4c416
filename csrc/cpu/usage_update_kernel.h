// Usage of the slots of one sample:
//
//   retention[i] = prod_r (1 - free_gates[r] read_weights[r,i])
//   new_usage[i] = (1 - (1 - usage[i]) prod_q (1 - write_weights[q,i])) retention[i]
#pragma once

#include "isa.h"

#include <cstdint>

namespace fastmem {

template <class T> struct UsageUpdate {
  int64_t slots, write_heads, read_heads;
  const T *usage, *write_weights, *read_weights, *free_gates; // [N] [Q,N] [R,N] [R]
  T *new_usage, *retention;                                   // [N] [N]; new_usage may be usage
};

template <class T> struct UsageUpdateBackward {
  int64_t slots, write_heads, read_heads;
  const T *usage, *write_weights, *read_weights, *free_gates;
  const T *grad_new_usage, *grad_retention;                            // [N] [N]; absent: null
  T *grad_usage, *grad_write_weights, *grad_read_weights, *grad_gates; // [N] [Q,N] [R,N] [R]; unwanted: null
  T* scratch;                                                          // usage_update_scratch(write_heads, read_heads)
};

// Elements of scratch that the backward needs: a vector for each head, and a sum for each gate.
inline int64_t usage_update_scratch(int64_t write_heads, int64_t read_heads) {
  return 16 * ((write_heads > read_heads ? write_heads : read_heads) + read_heads + 1);
}

FASTMEM_EACH_ISA(template <class T> void usage_update(const UsageUpdate<T>& s);
                 template <class T> void usage_update_backward(const UsageUpdateBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "simd.h"

namespace fastmem::FASTMEM_ISA {

template <class T> void usage_update(const UsageUpdate<T>& s) {
  for (int64_t i = 0; i < s.slots; i += kLanes<T>) {
    const int64_t count = s.slots - i;
    Vec<T> used = load_upto(s.usage + i, count), retained = broadcast(T(1));
    for (int64_t q = 0; q < s.write_heads; ++q) {
      const Vec<T> w = load_upto(s.write_weights + q * s.slots + i, count);
      used = used + w * (T(1) - used); // a small weight on a free slot keeps its digits, and a full slot stays at 1
    }
    for (int64_t r = 0; r < s.read_heads; ++r)
      retained = retained * (T(1) - s.free_gates[r] * load_upto(s.read_weights + r * s.slots + i, count));
    store_upto(s.new_usage + i, used * retained, count);
    store_upto(s.retention + i, retained, count);
  }
}

// The gradient of a product is the product of the other factors: those before, kept, times those after, on the way
// back.
template <class T> void usage_update_backward(const UsageUpdateBackward<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  T *const before = s.scratch, *const gates =
                                   s.scratch + 16 * (s.write_heads > s.read_heads ? s.write_heads : s.read_heads);
  for (int64_t r = 0; r < s.read_heads; ++r) store(gates + 16 * r, Vec<T>{});
  for (int64_t i = 0; i < s.slots; i += lanes) {
    const int64_t count = s.slots - i;
    const Vec<T> usage = load_upto(s.usage + i, count);
    Vec<T> used = usage, retained = broadcast(T(1));
    for (int64_t r = 0; r < s.read_heads; ++r) {
      store(before + 16 * r, retained);
      retained = retained * (T(1) - s.free_gates[r] * load_upto(s.read_weights + r * s.slots + i, count));
    }
    for (int64_t q = 0; q < s.write_heads; ++q) {
      const Vec<T> w = load_upto(s.write_weights + q * s.slots + i, count);
      used = used + w * (T(1) - used);
    }
    const Vec<T> grad_new = s.grad_new_usage ? load_upto(s.grad_new_usage + i, count) : Vec<T>{};
    const Vec<T> grad_retained =
        grad_new * used + (s.grad_retention ? load_upto(s.grad_retention + i, count) : Vec<T>{});
    const Vec<T> grad_used = grad_new * retained;

    Vec<T> after = grad_retained;
    for (int64_t r = s.read_heads - 1; r >= 0; --r) {
      const Vec<T> read = load_upto(s.read_weights + r * s.slots + i, count), others = after * load(before + 16 * r);
      store(gates + 16 * r, load(gates + 16 * r) - others * read);
      if (s.grad_read_weights) store_upto(s.grad_read_weights + r * s.slots + i, -s.free_gates[r] * others, count);
      after = after * (T(1) - s.free_gates[r] * read);
    }
    Vec<T> free = T(1) - usage;
    for (int64_t q = 0; q < s.write_heads; ++q) {
      store(before + 16 * q, free);
      free = free * (T(1) - load_upto(s.write_weights + q * s.slots + i, count));
    }
    after = grad_used;
    for (int64_t q = s.write_heads - 1; q >= 0; --q) {
      if (s.grad_write_weights)
        store_upto(s.grad_write_weights + q * s.slots + i, after * load(before + 16 * q), count);
      after = after * (T(1) - load_upto(s.write_weights + q * s.slots + i, count));
    }
    if (s.grad_usage) store_upto(s.grad_usage + i, after, count);
  }
  if (s.grad_gates)
    for (int64_t r = 0; r < s.read_heads; ++r) s.grad_gates[r] = sum<T>(load(gates + 16 * r));
}

template void usage_update(const UsageUpdate<float>&);
template void usage_update(const UsageUpdate<double>&);
template void usage_update_backward(const UsageUpdateBackward<float>&);
template void usage_update_backward(const UsageUpdateBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
