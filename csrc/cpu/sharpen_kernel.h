// Sharpening of one weighting: new_weights = (weights + eps)^sharpness, made to sum to 1. In powers (the form of the
// published NTM code) eps is added to the sum instead: weights^sharpness / (sum weights^sharpness + eps).
#pragma once

#include "isa.h"

#include <cstdint>

namespace fastmem {

template <class T> struct Sharpening {
  bool in_powers;
  T eps;
};

template <class T> struct Sharpen {
  int64_t slots;
  const T* weights; // [N]
  T sharpness;
  Sharpening<T> form;
  T* new_weights; // [N]; may be weights
};

template <class T> struct SharpenBackward {
  int64_t slots;
  const T* weights; // [N]
  T sharpness;
  Sharpening<T> form;
  const T *new_weights, *grad_new_weights; // [N] [N]
  T *grad_weights, *grad_sharpness;        // [N] [1]; grad_weights may be grad_new_weights
};

FASTMEM_EACH_ISA(template <class T> void sharpen(const Sharpen<T>& s);
                 template <class T> void sharpen_backward(const SharpenBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "simd.h"

namespace fastmem::FASTMEM_ISA {

// weights + eps, in powers the weights alone.
template <class T> FASTMEM_INLINE Vec<T> load_base(const T* weights, int64_t count, const Sharpening<T>& form) {
  return load_upto(weights, count) + (form.in_powers ? T(0) : form.eps);
}

// ratio^exponent, where 0 * -inf counts as 0: zero to the power of zero is 1. Past the range of exp it is infinite.
template <class T> FASTMEM_INLINE Vec<T> power(Vec<T> ratio, T exponent) {
  constexpr T highest = sizeof(T) == 4 ? T(88) : T(709);
  const Vec<T> logs = log<T>(ratio), x = exponent == 0 ? (logs == logs ? Vec<T>{} : logs) : exponent * logs;
  return x > highest ? broadcast(T(__builtin_inf())) : exp<T>(x);
}

// The largest base, 1 where none is above 0.
template <class T> T find_peak(const T* weights, int64_t slots, const Sharpening<T>& form) {
  Vec<T> maxima{};
  for (int64_t i = 0; i < slots; i += kLanes<T>) {
    const Vec<T> base = load_base(weights + i, slots - i, form);
    maxima = base > maxima ? base : maxima;
  }
  const T peak = max<T>(maxima);
  return peak == 0 ? T(1) : peak;
}

// The powers are those of ratios to the peak: the logarithm of a large ratio is small, and its rounding too.
template <class T> void sharpen(const Sharpen<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  const T peak = find_peak(s.weights, s.slots, s.form);
  Vec<T> totals{};
  for (int64_t i = 0; i < s.slots; i += lanes) {
    const int64_t count = s.slots - i;
    const Vec<T> powers = first_lanes<T>(power<T>(load_base(s.weights + i, count, s.form) / peak, s.sharpness), count);
    totals += powers;
    store_upto(s.new_weights + i, powers, count);
  }
  T total = sum<T>(totals);
  if (s.form.in_powers) // in double: here the logarithm is no small one, and eps may be most of the total
    total += T(double(s.form.eps) * power<double>(broadcast(double(peak)), -double(s.sharpness))[0]);
  for (int64_t i = 0; i < s.slots; i += lanes)
    store_upto(s.new_weights + i, load_upto(s.new_weights + i, s.slots - i) / total, s.slots - i);
}

// With y = new_weights, g its gradient and z = y (g - sum y g):
//   grad_weights = sharpness z / base,   grad_sharpness = sum z ln base = sum z ln(base / peak) + ln peak sum z
// Only in powers is sum z not 0. There y / base is weights^(sharpness - 1) over the total, also where the base is 0;
// and 0^sharpness does not change with the sharpness.
template <class T> void sharpen_backward(const SharpenBackward<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> means[2] = {}, totals{}; // short sums round less than a long one
  for (int64_t i = 0; i < s.slots; i += lanes) {
    means[i / lanes % 2] += load_upto(s.new_weights + i, s.slots - i) * load_upto(s.grad_new_weights + i, s.slots - i);
    totals += load_upto(s.weights + i, s.slots - i);
  }
  const T mean = sum<T>(means[0] + means[1]), total = sum<T>(totals) + s.form.eps;
  const T at_zero = s.sharpness == 1 ? 1 / total : s.sharpness > 1 || s.sharpness == 0 ? T(0) : T(__builtin_inf());
  const T peak = find_peak(s.weights, s.slots, s.form);
  Vec<T> along{}, sums{};
  for (int64_t i = 0; i < s.slots; i += lanes) {
    const int64_t count = s.slots - i;
    const Vec<T> base = load_base(s.weights + i, count, s.form), y = load_upto(s.new_weights + i, count);
    const Vec<T> centred = load_upto(s.grad_new_weights + i, count) - mean, z = y * centred;
    const Vec<T> bent = base == T(0) ? Vec<T>{} : z;
    along += y == T(0) ? Vec<T>{} : bent * log<T>(base == T(0) ? broadcast(T(1)) : base / peak);
    sums += bent;
    const Vec<T> slope = base == T(0) ? broadcast(at_zero) : y / base;
    if (s.grad_weights) store_upto(s.grad_weights + i, s.sharpness * slope * centred, count);
  }
  if (s.grad_sharpness)
    *s.grad_sharpness = sum<T>(along) + (s.form.in_powers ? log<T>(broadcast(peak))[0] * sum<T>(sums) : T(0));
}

template void sharpen(const Sharpen<float>&);
template void sharpen(const Sharpen<double>&);
template void sharpen_backward(const SharpenBackward<float>&);
template void sharpen_backward(const SharpenBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
