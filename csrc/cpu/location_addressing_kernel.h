// Location addressing of one head: interpolate with the previous weights, shift around the circle, sharpen.
//
//   gated = gate content + (1 - gate) previous
//   shifted[i] = sum_j shift[j] gated[(i - j) mod N],   j = -S..S at index j + S, or at index S - j when `reversed`
//   weights = sharpen(shifted)
#pragma once

#include "sharpen_kernel.h"

namespace fastmem {

template <class T> struct LocationAddressing {
  int64_t slots, reach;                // reach: S
  const T *content, *previous, *shift; // [N] [N] [2S+1]
  T gate, sharpness;
  bool reversed;
  Sharpening<T> form;
  T* weights; // [N]
  T* scratch; // location_scratch(slots, reach)
};

template <class T> struct LocationAddressingBackward {
  int64_t slots, reach;
  const T *content, *previous, *shift;
  T gate, sharpness;
  bool reversed;
  Sharpening<T> form;
  const T *weights, *grad_weights;                                           // [N] [N]
  T *grad_content, *grad_previous, *grad_gate, *grad_shift, *grad_sharpness; // [N] [N] [1] [2S+1] [1]; unwanted: null
  T* scratch;
};

// Two weightings with the circle continued by S at both ends, and one without.
inline int64_t location_scratch(int64_t slots, int64_t reach) { return 3 * (slots + 16) + 4 * reach; }

FASTMEM_EACH_ISA(template <class T> void location_addressing(const LocationAddressing<T>& s);
                 template <class T> void location_addressing_backward(const LocationAddressingBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

// circle[-S..N+S) from circle[0..N): what lies beyond an end comes from the other.
template <class T> void close_circle(T* circle, int64_t slots, int64_t reach) {
  if (slots == 0) return;
  for (int64_t k = 1; k <= reach; ++k) {
    circle[-k] = circle[slots - 1 - (k - 1) % slots];
    circle[slots + k - 1] = circle[(k - 1) % slots];
  }
}

// out[i] = sum_j shift[j] circle[i - sign j]
template <class T>
void shift_circle(const T* circle, const T* shift, int64_t reach, int64_t sign, T* out, int64_t slots) {
  for (int64_t i = 0; i < slots; i += kLanes<T>) {
    Vec<T> shifted{};
    for (int64_t j = -reach; j <= reach; ++j) shifted += shift[j + reach] * load_upto(circle + i - sign * j, slots - i);
    store_upto(out + i, shifted, slots - i);
  }
}

// The gated weights as a circle, in scratch.
template <class T, class Arguments> T* gated_circle(const Arguments& s) {
  T* const circle = s.scratch + s.reach;
  for (int64_t i = 0; i < s.slots; i += kLanes<T>) {
    const int64_t count = s.slots - i;
    store_upto(circle + i,
               s.gate * load_upto(s.content + i, count) + (T(1) - s.gate) * load_upto(s.previous + i, count), count);
  }
  close_circle(circle, s.slots, s.reach);
  return circle;
}

template <class T> void location_addressing(const LocationAddressing<T>& s) {
  const T* const circle = gated_circle<T>(s);
  shift_circle(circle, s.shift, s.reach, s.reversed ? -1 : 1, s.weights, s.slots);
  sharpen<T>(
      {.slots = s.slots, .weights = s.weights, .sharpness = s.sharpness, .form = s.form, .new_weights = s.weights});
}

template <class T> void location_addressing_backward(const LocationAddressingBackward<T>& s) {
  const int64_t n = s.slots, sign = s.reversed ? -1 : 1;
  const T* const circle = gated_circle<T>(s);
  T *const grad_circle = s.scratch + (n + 16 + 2 * s.reach) + s.reach, *const shifted =
                                                                           s.scratch + 2 * (n + 16 + 2 * s.reach);
  shift_circle(circle, s.shift, s.reach, sign, shifted, n);
  sharpen_backward<T>({.slots = n,
                       .weights = shifted,
                       .sharpness = s.sharpness,
                       .form = s.form,
                       .new_weights = s.weights,
                       .grad_new_weights = s.grad_weights,
                       .grad_weights = grad_circle,
                       .grad_sharpness = s.grad_sharpness});
  if (s.grad_shift)
    for (int64_t j = -s.reach; j <= s.reach; ++j) {
      Vec<T> along[4] = {};
      for (int64_t i = 0; i < n; i += kLanes<T>)
        along[i / kLanes<T> % 4] += load_upto(grad_circle + i, n - i) * load_upto(circle + i - sign * j, n - i);
      s.grad_shift[j + s.reach] = sum<T>((along[0] + along[1]) + (along[2] + along[3]));
    }
  close_circle(grad_circle, n, s.reach);
  T* const grad_gated = shifted; // no longer needed
  shift_circle(grad_circle, s.shift, s.reach, -sign, grad_gated, n);
  Vec<T> grad_gate[4] = {}; // short sums round less than a long one
  for (int64_t i = 0; i < n; i += kLanes<T>) {
    const Vec<T> g = load_upto(grad_gated + i, n - i);
    grad_gate[i / kLanes<T> % 4] += g * (load_upto(s.content + i, n - i) - load_upto(s.previous + i, n - i));
    if (s.grad_content) store_upto(s.grad_content + i, s.gate * g, n - i);
    if (s.grad_previous) store_upto(s.grad_previous + i, (T(1) - s.gate) * g, n - i);
  }
  if (s.grad_gate) *s.grad_gate = sum<T>((grad_gate[0] + grad_gate[1]) + (grad_gate[2] + grad_gate[3]));
}

template void location_addressing(const LocationAddressing<float>&);
template void location_addressing(const LocationAddressing<double>&);
template void location_addressing_backward(const LocationAddressingBackward<float>&);
template void location_addressing_backward(const LocationAddressingBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
