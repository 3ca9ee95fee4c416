// One step of a controller for one sample, after its matrix product and before the one of its gradient.
//
//   lstm              i, f, o = sigmoid(z), g = tanh(z),   c' = f c + i g,   h = o tanh(c')
//   layernorm_lstm    the same of normalised z, and c' normalised:  norm(v) = weight (v - mean v) / deviation v + bias
//   feedforward       h = tanh(z)
#pragma once

#include "isa.h"
#include "scratch.h"

#include <cstdint>

namespace fastmem {

enum class ControllerKind { lstm, layernorm_lstm, feedforward };

inline constexpr double kNormEps = 1e-5;
inline constexpr int64_t kNorms = 5; // of i, f, g, o and the cell

struct ControllerLayout {
  ControllerKind kind;
  int64_t hidden;

  bool recurrent() const { return kind != ControllerKind::feedforward; }
  bool normalised() const { return kind == ControllerKind::layernorm_lstm; }
  int64_t products() const { return recurrent() ? 4 * hidden : hidden; } // what the matrix product gives
  int64_t gates() const { return recurrent() ? 4 * hidden : 0; }         // what a step keeps of it
  int64_t cell() const { return recurrent() ? hidden : 0; }
  int64_t norms() const { return normalised() ? kNorms * hidden : 0; } // numbers in a norm_weight
};

template <class T> struct Control {
  ControllerLayout layout;
  const T *bias, *norm_weight, *norm_bias; // [products()]; [5,H] of a normalised one
  T* gates;                                // the product; becomes i, f, g, o of an lstm. Feed-forward: `hidden`
  const T* cell;                           // [H]
  T *new_cell, *hidden;                    // [H] [H]
  T* scratch;                              // control_scratch
};

template <class T> struct ControlBackward {
  ControllerLayout layout;
  const T *norm_weight, *norm_bias;
  const T *gates, *cell, *new_cell, *hidden; // as `Control` left them
  const T* grad_hidden;                      // [H]
  T* grad_cell;                              // [H]: of the new cell; becomes that of the old
  T* grad_product;                           // [products()]
  T *grad_norm_weight, *grad_norm_bias;      // [5,H], added to
  T* scratch;                                // control_scratch
};

inline int64_t control_scratch(const ControllerLayout& l) { return l.normalised() ? 5 * in_lines(l.hidden) : 0; }

FASTMEM_EACH_ISA(template <class T> void control(const Control<T>& s);
                 template <class T> void control_backward(const ControlBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

template <class T> struct Moments {
  T mean, inverse; // inverse of the deviation
};

template <class T> Moments<T> moments(const T* values, int64_t count) {
  Vec<T> total{}, squares{};
  for (int64_t i = 0; i < count; i += kLanes<T>) total += load_upto(values + i, count - i);
  const T mean = sum<T>(total) / T(count);
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> apart = first_lanes<T>(load_upto(values + i, count - i) - mean, count - i);
    squares += apart * apart;
  }
  return {mean, T(1) / T(__builtin_sqrt(double(sum<T>(squares) / T(count) + T(kNormEps))))};
}

// out = f(weight (v - mean) / deviation + bias)
template <class T, class F>
void normalise(T* out, const T* values, const T* weight, const T* bias, int64_t count, const F& f) {
  const Moments<T> m = moments(values, count);
  map(out, count, [&](Vec<T> v, Vec<T> w, Vec<T> b) { return f(w * ((v - m.mean) * m.inverse) + b); }, values, weight,
      bias);
}

// grad becomes that of the values; those of weight and bias are added to theirs.
template <class T>
void normalise_backward(T* grad, const T* values, const T* weight, T* grad_weight, T* grad_bias, int64_t count) {
  const Moments<T> m = moments(values, count);
  add(grad_bias, grad, count);
  map(grad_weight, count, [&](Vec<T> total, Vec<T> g, Vec<T> v) { return total + g * ((v - m.mean) * m.inverse); },
      grad_weight, grad, values);
  Vec<T> sums{}, along{};
  for (int64_t i = 0; i < count; i += kLanes<T>) {
    const Vec<T> g = load_upto(grad + i, count - i) * load_upto(weight + i, count - i);
    sums += g;
    along += g * ((load_upto(values + i, count - i) - m.mean) * m.inverse);
  }
  const T mean = sum<T>(sums) / T(count), slope = sum<T>(along) / T(count);
  map(grad, count, [&](Vec<T> g, Vec<T> w, Vec<T> v) {
    return m.inverse * (g * w - mean - (v - m.mean) * m.inverse * slope);
  }, grad, weight, values);
}

// Gates i, f, g, o of `z`, which may be the gates themselves, and what they make of the cell before it is normalised.
template <class T> void open_gates(const Control<T>& s, const T* z, T* gates, T* new_cell) {
  const int64_t h = s.layout.hidden;
  const auto gate = [&](int64_t k, const auto& range) {
    T* const out = gates + k * h;
    const T* const in = z + k * h;
    if (s.layout.normalised()) normalise(out, in, s.norm_weight + k * h, s.norm_bias + k * h, h, range);
    else map(out, h, [&](Vec<T> v, Vec<T> b) { return range(v + b); }, in, s.bias + k * h);
  };
  const auto opened = [](Vec<T> v) { return sigmoid<T>(v); };
  gate(0, opened);
  gate(1, opened);
  gate(2, [](Vec<T> v) { return tanh<T>(v); });
  gate(3, opened);
  map(new_cell, h, [](Vec<T> i, Vec<T> f, Vec<T> g, Vec<T> c) { return f * c + i * g; }, gates, gates + h,
      gates + 2 * h, s.cell);
}

template <class T> void control(const Control<T>& s) {
  const int64_t h = s.layout.hidden;
  if (!s.layout.recurrent()) {
    map(s.hidden, h, [](Vec<T> z, Vec<T> b) { return tanh<T>(z + b); }, s.hidden, s.bias);
    return;
  }
  const T* output = s.gates + 3 * h;
  if (s.layout.normalised()) {
    Scratch<T> scratch{s.scratch};
    T *const gates = scratch.take(4 * h), *const mixed = scratch.take(h);
    open_gates(s, s.gates, gates, mixed);
    normalise(s.new_cell, mixed, s.norm_weight + 4 * h, s.norm_bias + 4 * h, h, [](Vec<T> v) { return v; });
    output = gates + 3 * h;
  } else {
    open_gates(s, s.gates, s.gates, s.new_cell);
  }
  map(s.hidden, h, [](Vec<T> o, Vec<T> c) { return o * tanh<T>(c); }, output, s.new_cell);
}

template <class T> void control_backward(const ControlBackward<T>& s) {
  const int64_t h = s.layout.hidden;
  if (!s.layout.recurrent()) {
    map(s.grad_product, h, [](Vec<T> grad, Vec<T> y) { return grad * (T(1) - y * y); }, s.grad_hidden, s.hidden);
    return;
  }
  const T* gates = s.gates;
  T* mixed = nullptr;
  if (s.layout.normalised()) {
    Scratch<T> scratch{s.scratch};
    T* const opened = scratch.take(4 * h);
    mixed = scratch.take(h);
    open_gates<T>({.layout = s.layout,
                   .bias = nullptr,
                   .norm_weight = s.norm_weight,
                   .norm_bias = s.norm_bias,
                   .gates = nullptr,
                   .cell = s.cell,
                   .new_cell = nullptr,
                   .hidden = nullptr,
                   .scratch = nullptr},
                  s.gates, opened, mixed);
    gates = opened;
  }
  T *const grad_i = s.grad_product, *const grad_f = grad_i + h, *const grad_g = grad_f + h, *const grad_o = grad_g + h;
  const T *const i = gates, *const f = i + h, *const g = f + h, *const o = g + h;
  map(grad_o, h, [](Vec<T> grad, Vec<T> y, Vec<T> c) { return grad * tanh<T>(c) * (y * (T(1) - y)); }, s.grad_hidden, o,
      s.new_cell);
  map(s.grad_cell, h, [](Vec<T> grad, Vec<T> above, Vec<T> y, Vec<T> c) {
    const Vec<T> bent = tanh<T>(c);
    return grad + above * y * (T(1) - bent * bent);
  }, s.grad_cell, s.grad_hidden, o, s.new_cell);
  if (mixed)
    normalise_backward(s.grad_cell, mixed, s.norm_weight + 4 * h, s.grad_norm_weight + 4 * h, s.grad_norm_bias + 4 * h,
                       h);
  map(grad_i, h, [](Vec<T> grad, Vec<T> y, Vec<T> other) { return grad * other * (y * (T(1) - y)); }, s.grad_cell, i,
      g);
  map(grad_f, h, [](Vec<T> grad, Vec<T> y, Vec<T> c) { return grad * c * (y * (T(1) - y)); }, s.grad_cell, f, s.cell);
  map(grad_g, h, [](Vec<T> grad, Vec<T> y, Vec<T> other) { return grad * other * (T(1) - y * y); }, s.grad_cell, g, i);
  map(s.grad_cell, h, [](Vec<T> grad, Vec<T> y) { return grad * y; }, s.grad_cell, f);
  if (mixed)
    for (int64_t k = 0; k < 4; ++k)
      normalise_backward(s.grad_product + k * h, s.gates + k * h, s.norm_weight + k * h, s.grad_norm_weight + k * h,
                         s.grad_norm_bias + k * h, h);
}

template void control(const Control<float>&);
template void control(const Control<double>&);
template void control_backward(const ControlBackward<float>&);
template void control_backward(const ControlBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
