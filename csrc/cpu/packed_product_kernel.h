// Products of a few rows with a weight matrix, at every time step of a sequence: out[m] = start[m] + x[m] weights.
//
// The weights are packed once into panels as wide as the registers hold, each a block of [inputs, panel], so that a
// step walks them once from the first byte to the last, however many rows there are.
#pragma once

#include "isa.h"
#include "scratch.h"

#include <cstdint>

namespace fastmem {

template <class T> struct PackedProduct {
  int64_t rows, inputs, outputs;
  int64_t begin, end;       // inputs that take part
  int64_t first_output = 0; // computed from the begin of its panel on
  const T* x;               // [M,I]
  int64_t x_row;
  const T* packed; // packed_size(inputs, outputs)
  const T* start;  // [M,O]; none: null; may be out
  int64_t start_row;
  T* out; // [M,O]
  int64_t out_row;
};

// A part of a packed matrix of `all_inputs` inputs: inputs from `first_input` on to outputs from `first_output` on.
// Parts of lower outputs come first, as each clears the rest of its last panel. The weight of an input and output is at
// weights + input * input_stride + output * output_stride; one of the strides is 1.
template <class T> struct Packing {
  int64_t inputs, outputs, input_stride, output_stride;
  const T* weights;
  int64_t all_inputs, first_input, first_output;
  T* packed; // packed_size(all_inputs, all outputs)
};

// The widest panel of any instruction set, in elements.
inline constexpr int64_t kWidestPanel = 48;

inline int64_t packed_size(int64_t inputs, int64_t outputs) {
  return inputs * ((outputs + kWidestPanel - 1) / kWidestPanel * kWidestPanel);
}

FASTMEM_EACH_ISA(template <class T> void pack(const Packing<T>& s);
                 template <class T> void packed_product(const PackedProduct<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "simd.h"

namespace fastmem::FASTMEM_ISA {

#if defined(__AVX512F__)
inline constexpr int kPanelVectors = 3, kProductRows = 8; // 24 sums, 3 weights and a broadcast in 32 registers
#else
inline constexpr int kPanelVectors = 2, kProductRows = 4; // 8 sums, 2 weights and a broadcast in 16
#endif
inline constexpr int64_t kAhead = 32;       // how many inputs ahead weights are prefetched
inline constexpr int64_t kInputBlock = 128; // inputs whose products are summed before they join the total

template <class T> inline constexpr int64_t kPanel = kPanelVectors * kLanes<T>;
static_assert(kWidestPanel % kPanel<float> == 0 && kWidestPanel % kPanel<double> == 0);

template <class T> void pack(const Packing<T>& s) {
  for (int64_t begin = 0, count; begin < s.outputs; begin += count) {
    const int64_t column = (s.first_output + begin) % kPanel<T>, room = kPanel<T> - column;
    count = room < s.outputs - begin ? room : s.outputs - begin;
    T* const panel = s.packed + (s.first_output + begin - column) * s.all_inputs + s.first_input * kPanel<T> + column;
    const T* const weights = s.weights + begin * s.output_stride;
    if (s.input_stride == 1) {
      transpose(weights, s.output_stride, count, s.inputs, panel, kPanel<T>, room);
      continue;
    }
    for (int64_t i = 0; i < s.inputs; ++i) {
      copy(panel + i * kPanel<T>, weights + i * s.input_stride, count);
      clear(panel + i * kPanel<T> + count, room - count);
    }
  }
}

// Rows [row, row + Rows) of one panel over inputs [from, to).
template <int Rows, class T>
FASTMEM_INLINE void product_tile(const PackedProduct<T>& s, int64_t row, int64_t column, int64_t from, int64_t to) {
  const T* const weights = s.packed + column * s.inputs;
  const T* x[Rows];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) x[r] = s.x + (row + r) * s.x_row;
  Vec<T> sums[Rows][kPanelVectors];
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) sums[r][v] = Vec<T>{};
  for (int64_t i = from; i < to; ++i) {
    Vec<T> w[kPanelVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      w[v] = load(weights + i * kPanel<T> + v * kLanes<T>);
      if (v * kVectorBytes % 64 == 0) // each line once
        __builtin_prefetch(weights + (i + kAhead) * kPanel<T> + v * kLanes<T>);
    }
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const T factor = x[r][i];
#pragma GCC unroll 4
      for (int v = 0; v < kPanelVectors; ++v) sums[r][v] += factor * w[v];
    }
  }
  const T* const start = from == s.begin ? s.start : s.out;
  const int64_t start_row = from == s.begin ? s.start_row : s.out_row;
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kPanelVectors; ++v) {
      const int64_t at = column + v * kLanes<T>, count = s.outputs - at;
      if (count <= 0) continue;
      const Vec<T> before = start ? load_upto(start + (row + r) * start_row + at, count) : Vec<T>{};
      store_upto(s.out + (row + r) * s.out_row + at, before + sums[r][v], count);
    }
}

template <class T>
FASTMEM_INLINE void product_rows(const PackedProduct<T>& s, int64_t row, int64_t rows, int64_t column, int64_t from,
                                 int64_t to) {
  switch (rows) {
    case 1: return product_tile<1>(s, row, column, from, to);
    case 2: return product_tile<2>(s, row, column, from, to);
    case 3: return product_tile<3>(s, row, column, from, to);
#if defined(__AVX512F__)
    case 4: return product_tile<4>(s, row, column, from, to);
    case 5: return product_tile<5>(s, row, column, from, to);
    case 6: return product_tile<6>(s, row, column, from, to);
    case 7: return product_tile<7>(s, row, column, from, to);
#endif
    default: return product_tile<kProductRows>(s, row, column, from, to);
  }
}

// A block of a panel stays in the first cache while all rows pass it.
template <class T> void packed_product(const PackedProduct<T>& s) {
  const int64_t tiles = (s.rows + kProductRows - 1) / kProductRows;
  for (int64_t column = s.first_output / kPanel<T> * kPanel<T>; column < s.outputs; column += kPanel<T>)
    for (int64_t from = s.begin; from == s.begin || from < s.end; from += kInputBlock) {
      const int64_t to = from + kInputBlock < s.end ? from + kInputBlock : s.end;
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = s.rows * tile / tiles, end = s.rows * (tile + 1) / tiles;
        product_rows(s, row, end - row, column, from, to);
      }
    }
}

template void pack(const Packing<float>&);
template void pack(const Packing<double>&);
template void packed_product(const PackedProduct<float>&);
template void packed_product(const PackedProduct<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
