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

// ln(weights + eps), or ln weights in powers.
template <class T> FASTMEM_INLINE Vec<T> log_weights(const T* weights, int64_t count, const Sharpening<T>& form) {
  return log<T>(load_upto(weights, count) + (form.in_powers ? T(0) : form.eps));
}

// exponent * logs, where 0 * -inf is 0: zero to the power of zero is 1.
template <class T> FASTMEM_INLINE Vec<T> scaled(T exponent, Vec<T> logs) {
  return exponent == 0 ? (logs == logs ? Vec<T>{} : logs) : exponent * logs;
}

// The lanes below `count`, and 0 for the others.
template <class T> FASTMEM_INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
  return lane_index<T>() < IntVec<T>{} + Int<T>(count < kLanes<T> ? count : kLanes<T>) ? v : Vec<T>{};
}

template <class T> void sharpen(const Sharpen<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  T highest = 0; // powers of weights up to 1 need no shift, and their sum must be comparable with eps
  if (!s.form.in_powers) {
    Vec<T> maxima = broadcast(T(-__builtin_inf()));
    for (int64_t i = 0; i < s.slots; i += lanes) {
      const Vec<T> score = scaled<T>(s.sharpness, log_weights(s.weights + i, s.slots - i, s.form));
      const Vec<T> shown = lane_index<T>() < IntVec<T>{} + Int<T>(s.slots - i < lanes ? s.slots - i : lanes)
                               ? score
                               : broadcast(T(-__builtin_inf()));
      maxima = shown > maxima ? shown : maxima;
    }
    highest = max<T>(maxima);
    if (highest == T(-__builtin_inf())) highest = 0;
  }
  Vec<T> totals{};
  for (int64_t i = 0; i < s.slots; i += lanes) {
    const Vec<T> score = scaled<T>(s.sharpness, log_weights(s.weights + i, s.slots - i, s.form));
    const Vec<T> power = first_lanes<T>(exp<T>(score - highest), s.slots - i);
    totals += power;
    store_upto(s.new_weights + i, power, s.slots - i);
  }
  const T total = sum<T>(totals) + (s.form.in_powers ? s.form.eps : T(0));
  for (int64_t i = 0; i < s.slots; i += lanes) {
    const Vec<T> power = load_upto(s.new_weights + i, s.slots - i);
    store_upto(s.new_weights + i, total == 0 ? Vec<T>{} : power / total, s.slots - i);
  }
}

// With y = new_weights, g its gradient and z = y (g - sum y g):
//   grad_weights = sharpness z / (weights + eps),   grad_sharpness = sum z ln(weights + eps)
// In powers y / weights is weights^(sharpness - 1) over the total, which is finite where a weight is 0.
template <class T> void sharpen_backward(const SharpenBackward<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> means{}, totals{};
  for (int64_t i = 0; i < s.slots; i += lanes) {
    means += load_upto(s.new_weights + i, s.slots - i) * load_upto(s.grad_new_weights + i, s.slots - i);
    if (s.form.in_powers) {
      const Vec<T> logs = log_weights(s.weights + i, s.slots - i, s.form);
      totals += first_lanes<T>(exp<T>(scaled<T>(s.sharpness, logs)), s.slots - i);
    }
  }
  const T mean = sum<T>(means), total = sum<T>(totals) + s.form.eps;
  Vec<T> grad_sharpness{};
  for (int64_t i = 0; i < s.slots; i += lanes) {
    const int64_t count = s.slots - i;
    const Vec<T> logs = log_weights(s.weights + i, count, s.form), y = load_upto(s.new_weights + i, count);
    const Vec<T> centred = load_upto(s.grad_new_weights + i, count) - mean, z = y * centred;
    grad_sharpness += y == T(0) ? Vec<T>{} : z * logs;
    const Vec<T> slope = s.form.in_powers ? exp<T>(scaled<T>(s.sharpness - 1, logs)) / total * centred
                                          : z / (load_upto(s.weights + i, count) + s.form.eps);
    if (s.grad_weights) store_upto(s.grad_weights + i, s.sharpness * slope, count);
  }
  if (s.grad_sharpness) *s.grad_sharpness = sum<T>(grad_sharpness);
}

template void sharpen(const Sharpen<float>&);
template void sharpen(const Sharpen<double>&);
template void sharpen_backward(const SharpenBackward<float>&);
template void sharpen_backward(const SharpenBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
