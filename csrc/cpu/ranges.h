// What takes the raw numbers of an interface vector into their ranges, and small loops over vectors. Kernel units only.
#pragma once

#include "simd.h"

namespace fastmem::FASTMEM_ISA {

template <class T> FASTMEM_INLINE Vec<T> sigmoid(Vec<T> x) {
  const Vec<T> small = exp<T>(x < T(0) ? x : -x);
  return (x < T(0) ? small : broadcast(T(1))) * reciprocal<T>(T(1) + small);
}

// ln(1 + e^x); the quotient makes up for what 1 + small rounds away.
template <class T> FASTMEM_INLINE Vec<T> softplus(Vec<T> x) {
  const Vec<T> small = exp<T>(x < T(0) ? x : -x), sum = T(1) + small;
  const Vec<T> log_sum = sum == T(1) ? small : log<T>(sum) * (small / (sum - T(1)));
  return (x < T(0) ? Vec<T>{} : x) + log_sum;
}

// 1 - 2 / (e^2|x| + 1), which loses digits where |x| is small. There, in float32, a polynomial fitted to tanh(x) / x on
// [-0.625, 0.625], 2e-10 off; in float64 (e^2|x| - 1) / (e^2|x| + 1), where e^2|x| - 1 is made up for what the power
// rounded away.
template <class T> FASTMEM_INLINE Vec<T> tanh(Vec<T> x) {
  const Vec<T> twice = T(2) * (x < T(0) ? -x : x), bounded = twice > T(40) ? broadcast(T(40)) : twice;
  const Vec<T> power = exp<T>(bounded);
  if constexpr (sizeof(T) == 4) {
    const Vec<T> square = x * x, far = T(1) - T(2) * reciprocal<T>(power + T(1));
    constexpr T series[] = {2.14261763e-3f,  -8.17689681e-3f, 2.17004238e-2f,
                            -5.39466897e-2f, 0.133332051f,    -0.333333308f};
    Vec<T> slope = broadcast(series[0]);
#pragma GCC unroll 5
    for (int k = 1; k < 6; ++k) slope = slope * square + series[k];
    return twice < T(1.25) ? x + x * square * slope : x < T(0) ? -far : far;
  } else {
    const Vec<T> less = power - T(1), above = power == T(1) ? bounded : less * (bounded / log<T>(power));
    const Vec<T> y = above / (above + T(2));
    return x < T(0) ? -y : y;
  }
}

// out[i] = f(inputs[i]...), over vectors.
template <class T, class F, class... Inputs>
FASTMEM_INLINE void map(T* out, int64_t count, const F& f, const Inputs*... inputs) {
  for (int64_t i = 0; i < count; i += kLanes<T>) store_upto(out + i, f(load_upto(inputs + i, count - i)...), count - i);
}

// exp(score - max) in place, their sum. -inf gives 0; +inf or NaN makes the sum NaN.
template <class T> Vec<T> exponentials(T* row, int64_t count, Vec<T> maxima) {
  constexpr int64_t lanes = kLanes<T>;
  T highest = max<T>(maxima);
  if (highest == T(-__builtin_inf())) highest = 0;
  Vec<T> total{};
  for (int64_t i = 0; i < count; i += lanes) {
    const Vec<T> power = exp<T>(load_upto(row + i, count - i) - highest);
    total += first_lanes<T>(power, count - i);
    store_upto(row + i, power, count - i);
  }
  return total;
}

// Softmax of each row of [rows, count], in place.
template <class T> void softmax(T* values, int64_t rows, int64_t count) {
  const auto each = [&](const auto& change) {
    for (int64_t r = 0; r < rows; ++r) change(values + r * count);
  };
  each([&](T* row) {
    T highest = row[0];
    for (int64_t i = 1; i < count; ++i) highest = row[i] > highest ? row[i] : highest;
    for (int64_t i = 0; i < count; ++i) row[i] -= highest;
  });
  map(values, rows * count, [](Vec<T> x) { return exp<T>(x); }, values);
  each([&](T* row) {
    T total = 0;
    for (int64_t i = 0; i < count; ++i) total += row[i];
    for (int64_t i = 0; i < count; ++i) row[i] /= total;
  });
}

// sum_i a[i] b[i]
template <class T> T inner(const T* a, const T* b, int64_t count) {
  Vec<T> products{};
  for (int64_t i = 0; i < count; i += kLanes<T>) products += load_upto(a + i, count - i) * load_upto(b + i, count - i);
  return sum<T>(products);
}

// to += from, where there is anything.
template <class T> void add(T* to, const T* from, int64_t count) {
  if (from) map(to, count, [](Vec<T> a, Vec<T> b) { return a + b; }, to, from);
}

// The slope of sigmoid and of softplus, at a raw number.
template <class T> FASTMEM_INLINE Vec<T> sigmoid_slope(Vec<T> x) {
  const Vec<T> y = sigmoid<T>(x);
  return y * (T(1) - y);
}

template <class T> FASTMEM_INLINE Vec<T> softplus_slope(Vec<T> x) { return sigmoid<T>(x); }

// grad becomes the gradient before the softmax that gave y.
template <class T> void softmax_backward(const T* y, T* grad, int64_t count) {
  T mean = 0;
  for (int64_t i = 0; i < count; ++i) mean += y[i] * grad[i];
  for (int64_t i = 0; i < count; ++i) grad[i] = y[i] * (grad[i] - mean);
}

// x within [-bound, bound], and the gradient that comes through: none where x was outside.
template <class T> FASTMEM_INLINE Vec<T> clamped(Vec<T> x, T bound) {
  x = x > bound ? broadcast(bound) : x;
  return x < -bound ? broadcast(-bound) : x;
}

template <class T> FASTMEM_INLINE Vec<T> through_clamp(Vec<T> grad, Vec<T> x, T bound) {
  return (x > bound) | (x < -bound) ? Vec<T>{} : grad;
}

} // namespace fastmem::FASTMEM_ISA
