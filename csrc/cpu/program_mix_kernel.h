// Mixing of stored programs: every sample applies its own mixture of P linear maps, which all samples share.
//
//   outputs[b,o] = sum_p w[b,p] (sum_i x[b,i] W[p,i,o] + biases[p,o])
//
// With z[b,(p,i)] = w[b,p] x[b,i] that is one matrix product z W, and its gradients are two more, so all is built on
// one blocked product. No mixture [I,O] of a sample and no output [P,O] before mixing is ever stored.
#pragma once

#include "isa.h"

#include <cstdint>

namespace fastmem {

// C[r,c] = start + scale[r] sum_k A[r,k] B[k,c], where start is 0 or, with `add`, what C holds. The order of the sum
// depends on `steps` and `block` alone, so any cut of rows and columns gives the same bits.
template <class T> struct Product {
  int64_t rows, columns, steps;
  const T* a;
  int64_t a_row, a_step; // distance of two rows and of two columns of A
  const T* b;
  int64_t b_row;
  T* c;
  int64_t c_row;
  int64_t block;            // steps whose part of B stays in the first-level cache
  const T* scale = nullptr; // null: 1
  int64_t scale_stride = 0;
  bool add = false;
  bool far = false; // B is larger than the caches near the core: fetch ahead
};

// The stored programs: P maps from I inputs to O outputs.
template <class T> struct Programs {
  int64_t programs, inputs, outputs;
  const T* weights; // [P,I,O]
  int64_t weights_program, weights_row;
  const T* biases; // [P,O]; none: null
};

// Samples that share the programs, and some columns of their outputs.
template <class T> struct Mixing {
  Programs<T> programs;
  int64_t samples, first, columns;
  const T *inputs, *program_weights; // [B,I] [B,P]
  int64_t inputs_row;
  T* outputs; // [B,O]
};

// What the inputs [first, first + count) get back, and what they add to the gradient of the program weights.
template <class T> struct MixingToInputs {
  Programs<T> programs;
  int64_t samples, first, count;                    // samples <= kSampleBlock, count <= kInputBlock
  const T *inputs, *program_weights, *grad_outputs; // [B,I] [B,P] [B,O]
  int64_t inputs_row;
  const T* grad_outputs_columns; // [O,pitch]; not needed for kFewSamples
  int64_t pitch;                 // samples rounded up to whole vectors
  T* grad_inputs;                // [B,I]; unwanted: null
  T* grad_program_weights;       // [B,P], the part of these inputs
  T* scratch;                    // [3,kInputBlock,pitch]
};

// The gradient of the rows [first, first + count) of one program's weights.
template <class T> struct MixingToWeights {
  Programs<T> programs;
  int64_t samples, program, first, count; // count <= kInputBlock
  const T *inputs, *program_weights, *grad_outputs;
  int64_t inputs_row;
  T* grad_weights; // [P,I,O]
};

// Where a matrix product of torch's is the core, on either side of it: z before, and after it the gradients of the
// inputs, unless null, and of the program weights from that of z.
template <class T> struct Expansion {
  int64_t samples, programs, inputs;
  const T *x, *program_weights; // [B,I] [B,P]
  int64_t x_row;
};

inline constexpr int64_t kSampleBlock = 64, kInputBlock = 16;
inline constexpr int64_t kFewSamples = 5; // more fill a vector of samples well enough

FASTMEM_EACH_ISA(
    template <class T> void product(const Product<T>& s); template <class T> void program_mix(const Mixing<T>& s);
    template <class T> void program_mix_to_inputs(const MixingToInputs<T>& s);
    template <class T> void program_mix_to_weights(const MixingToWeights<T>& s);
    // out[c,r] = in[r,c], and 0 for r in [rows, width)
    template <class T>
    void transpose(const T* in, int64_t in_row, int64_t rows, int64_t columns, T* out, int64_t out_row, int64_t width);
    // out[b,p] = grad_outputs[b] . biases[p]
    template <class T>
    void program_mix_to_biases(const Programs<T>& programs, int64_t samples, const T* grad_outputs, T* out);
    template <class T> void program_expand(const Expansion<T>& s, T* z); template <class T>
    void program_expand_backward(const Expansion<T>& s, const T* grad_z, T* grad_inputs, T* grad_program_weights);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "simd.h"

namespace fastmem::FASTMEM_ISA {

#if defined(__AVX512F__) || defined(__aarch64__)
inline constexpr int kRegisters = 32, kMostRows = 8;
#else
inline constexpr int kRegisters = 16, kMostRows = 6;
#endif
inline constexpr int64_t kNearBytes = 1 << 20; // stays in the second-level cache beside everything else
inline constexpr int kMostVectors = 8;
inline constexpr int64_t kStepsAhead = 8;

// Columns of a tile, in vectors: its accumulators, one row of B and one element of A fill the registers.
constexpr int tile_vectors(int rows) {
  const int vectors = (kRegisters - 1) / (rows + 1);
  return vectors < kMostVectors ? vectors : kMostVectors;
}

template <int Value> struct Number {
  static constexpr int value = Value;
};

// Calls body(Number<n>{}) for the n in [1, Most] that is nearest to `count` from below.
template <int Most, class Body> FASTMEM_INLINE void with_number(int64_t count, const Body& body) {
  if constexpr (Most == 1) body(Number<1>{});
  else if (count >= Most) body(Number<Most>{});
  else with_number<Most - 1>(count, body);
}

template <int Rows, int Vectors, bool Part, bool Ahead, class T>
__attribute__((noinline)) void product_tile(const Product<T>& s, int64_t row, int64_t column, int64_t step,
                                            int64_t steps, bool add) {
  const int64_t lanes = kLanes<T>, last = s.columns - column - (Vectors - 1) * lanes;
  const T* b = s.b + step * s.b_row + column;
  const T* a = s.a + row * s.a_row + step * s.a_step;
  const int64_t a_row = s.a_row, a_step = s.a_step, b_row = s.b_row;
  Vec<T> sums[Rows][Vectors] = {};
  for (int64_t k = 0; k < steps; ++k) {
    if constexpr (Ahead) {
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) __builtin_prefetch(b + kStepsAhead * b_row + v * lanes);
    }
    Vec<T> b_k[Vectors];
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v)
      b_k[v] = Part && v == Vectors - 1 ? load_upto(b + v * lanes, last) : load(b + v * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> a_k = broadcast(a[r * a_row]);
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) sums[r][v] += a_k * b_k[v];
    }
    a += a_step;
    b += b_row;
  }
#pragma GCC unroll 8
  for (int r = 0; r < Rows; ++r) {
    const T scale = s.scale ? s.scale[(row + r) * s.scale_stride] : T(1);
    T* c = s.c + (row + r) * s.c_row + column;
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t count = Part && v == Vectors - 1 ? last : lanes;
      Vec<T> c_v = scale * sums[r][v];
      if (add) c_v += load_upto(c + v * lanes, count);
      store_upto(c + v * lanes, c_v, count);
    }
  }
}

template <class T> void product(const Product<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t groups = (s.rows + kMostRows - 1) / kMostRows; // of nearly equal height
  const int64_t panel = groups ? tile_vectors(int((s.rows + groups - 1) / groups)) : 1;
  const int64_t blocks = s.steps > s.block ? (s.steps + s.block - 1) / s.block : 1;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t step = s.steps * block / blocks, steps = s.steps * (block + 1) / blocks - step;
    const bool add = s.add || block > 0;
    for (int64_t column = 0; column < s.columns; column += panel * lanes) {
      const int64_t left = (s.columns - column + lanes - 1) / lanes, vectors = left < panel ? left : panel;
      const bool whole = s.columns - column >= panel * lanes;
      for (int64_t group = 0; group < groups; ++group) {
        const int64_t row = group * s.rows / groups, rows = (group + 1) * s.rows / groups - row;
        with_number<kMostRows>(rows, [&](auto height) __attribute__((always_inline)) {
          constexpr int Rows = decltype(height)::value, Most = tile_vectors(Rows);
          if (whole && panel == Most)
            return s.far && group == 0 ? product_tile<Rows, Most, false, true>(s, row, column, step, steps, add)
                                       : product_tile<Rows, Most, false, false>(s, row, column, step, steps, add);
          with_number<Most>(vectors, [&](auto width) __attribute__((always_inline)) {
            product_tile<Rows, decltype(width)::value, true, false>(s, row, column, step, steps, add);
          });
        });
      }
    }
  }
}

template <class T> void program_mix(const Mixing<T>& s) {
  const Programs<T>& m = s.programs;
  Product<T> mix{.rows = s.samples,
                 .columns = s.columns,
                 .steps = m.biases ? m.programs : 0,
                 .a = s.program_weights,
                 .a_row = m.programs,
                 .a_step = 1,
                 .b = m.biases ? m.biases + s.first : s.outputs,
                 .b_row = m.outputs,
                 .c = s.outputs + s.first,
                 .c_row = m.outputs,
                 .block = 160};
  product(mix);
  if (m.inputs == 0) return;
  mix.steps = m.inputs;
  mix.a = s.inputs;
  mix.a_row = s.inputs_row;
  mix.b_row = m.weights_row;
  mix.scale_stride = m.programs;
  mix.add = true;
  mix.far = m.programs * m.inputs * m.outputs * int64_t(sizeof(T)) > kNearBytes;
  for (int64_t p = 0; p < m.programs; ++p) {
    mix.b = m.weights + p * m.weights_program + s.first;
    mix.scale = s.program_weights + p;
    product(mix);
  }
}

// Lane r: rows[r] . values, for a vector of rows of which `count` exist.
template <bool Part, class T>
FASTMEM_INLINE Vec<T> dots(const T* rows, int64_t row_stride, int64_t count, const T* values, int64_t size) {
  constexpr int64_t lanes = kLanes<T>;
  const T* row[lanes];
#pragma GCC unroll 16
  for (int r = 0; r < lanes; ++r) row[r] = rows + (Part && r >= count ? 0 : r) * row_stride;
  Vec<T> sums[lanes] = {};
  int64_t j = 0;
  for (; j + lanes <= size; j += lanes) {
    const Vec<T> value = load(values + j);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) sums[r] += load(row[r] + j) * value;
  }
  if (j < size) {
    const Vec<T> value = load_part(values + j, size - j);
#pragma GCC unroll 16
    for (int r = 0; r < lanes; ++r) sums[r] += load_part(row[r] + j, size - j) * value;
  }
  return sum_rows<T>(sums);
}

// Few samples: lanes hold inputs, and the programs stream by once for all samples.
template <class T> void few_to_inputs(const MixingToInputs<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  const Programs<T>& m = s.programs;
  for (int64_t i = 0; i < s.count; i += lanes) {
    const int64_t input = s.first + i, count = s.count - i;
    for (int64_t p = 0; p < m.programs; ++p) {
      const T* const rows = m.weights + p * m.weights_program + input * m.weights_row;
      for (int64_t b = 0; b < s.samples; ++b) {
        const T* const grad = s.grad_outputs + b * m.outputs;
        const Vec<T> pulled = count >= lanes ? dots<false>(rows, m.weights_row, lanes, grad, m.outputs)
                                             : dots<true>(rows, m.weights_row, count, grad, m.outputs);
        const Vec<T> share = pulled * load_upto(s.inputs + b * s.inputs_row + input, count);
        T* const into = s.grad_program_weights + b * m.programs + p;
        *into = (i == 0 ? T(0) : *into) + sum<T>(count >= lanes || lane_index<T>() < Int<T>(count) ? share : Vec<T>{});
        if (s.grad_inputs) {
          T* const out = s.grad_inputs + b * m.inputs + input;
          const Vec<T> mixed = pulled * s.program_weights[b * m.programs + p];
          store_upto(out, p == 0 ? mixed : mixed + load_upto(out, count), count);
        }
      }
    }
  }
}

// Many samples: lanes hold samples.
template <class T> void many_to_inputs(const MixingToInputs<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  const Programs<T>& m = s.programs;
  const int64_t pitch = s.pitch, columns = (s.samples + lanes - 1) / lanes * lanes;
  T* const pulled = s.scratch;
  T* const inputs = pulled + kInputBlock * pitch;
  T* const grad_inputs = inputs + kInputBlock * pitch;
  const int64_t row_bytes = columns * int64_t(sizeof(T)), block = 32768 / (row_bytes < 192 ? row_bytes : 192);
  transpose(s.inputs + s.first, s.inputs_row, s.samples, s.count, inputs, pitch, columns);
  for (int64_t p = 0; p < m.programs; ++p) {
    product(Product<T>{.rows = s.count,
                       .columns = columns,
                       .steps = m.outputs,
                       .a = m.weights + p * m.weights_program + s.first * m.weights_row,
                       .a_row = m.weights_row,
                       .a_step = 1,
                       .b = s.grad_outputs_columns,
                       .b_row = pitch,
                       .c = pulled,
                       .c_row = pitch,
                       .block = block});
    for (int64_t b = 0; b < columns; b += lanes) {
      Vec<T> weight{}, into{};
      for (int64_t lane = 0; lane < lanes && b + lane < s.samples; ++lane)
        weight[lane] = s.program_weights[(b + lane) * m.programs + p];
      for (int64_t i = 0; i < s.count; ++i) {
        const Vec<T> pull = load(pulled + i * pitch + b);
        T* const mixed = grad_inputs + i * pitch + b;
        into += pull * load(inputs + i * pitch + b);
        store(mixed, p == 0 ? pull * weight : load(mixed) + pull * weight);
      }
      for (int64_t lane = 0; lane < lanes && b + lane < s.samples; ++lane)
        s.grad_program_weights[(b + lane) * m.programs + p] = into[lane];
    }
  }
  if (s.grad_inputs) transpose(grad_inputs, pitch, s.count, s.samples, s.grad_inputs + s.first, m.inputs, s.count);
}

template <class T> void program_mix_to_inputs(const MixingToInputs<T>& s) {
  if (s.programs.programs == 0) {
    if (!s.grad_inputs) return;
    for (int64_t b = 0; b < s.samples; ++b)
      for (int64_t i = 0; i < s.count; ++i) s.grad_inputs[b * s.programs.inputs + s.first + i] = 0;
  } else if (s.samples <= kFewSamples) {
    few_to_inputs(s);
  } else {
    many_to_inputs(s);
  }
}

template <class T> void program_mix_to_biases(const Programs<T>& m, int64_t samples, const T* grad_outputs, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t p = 0; p < m.programs; p += lanes)
    for (int64_t b = 0; b < samples; ++b)
      store_upto(
          out + b * m.programs + p,
          dots<true>(m.biases + p * m.outputs, m.outputs, m.programs - p, grad_outputs + b * m.outputs, m.outputs),
          m.programs - p);
}

template <class T> void program_mix_to_weights(const MixingToWeights<T>& s) {
  constexpr int64_t lanes = kLanes<T>, block = 128;
  const Programs<T>& m = s.programs;
  T scaled[block * kInputBlock]; // of program_weights x inputs, a row a sample
  T* const out = s.grad_weights + (s.program * m.inputs + s.first) * m.outputs;
  for (int64_t sample = 0; sample == 0 || sample < s.samples; sample += block) {
    const int64_t steps = s.samples - sample < block ? s.samples - sample : block;
    for (int64_t b = 0; b < steps; ++b) {
      const T weight = s.program_weights[(sample + b) * m.programs + s.program];
      const T* const row = s.inputs + (sample + b) * s.inputs_row + s.first;
      for (int64_t i = 0; i < s.count; i += lanes)
        store(scaled + b * kInputBlock + i, weight * load_upto(row + i, s.count - i));
    }
    product(Product<T>{.rows = s.count,
                       .columns = m.outputs,
                       .steps = steps,
                       .a = scaled,
                       .a_row = 1,
                       .a_step = kInputBlock,
                       .b = s.grad_outputs + sample * m.outputs,
                       .b_row = m.outputs,
                       .c = out,
                       .c_row = m.outputs,
                       .block = block,
                       .add = sample > 0});
  }
}

template <class T> void program_expand(const Expansion<T>& s, T* z) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t b = 0; b < s.samples; ++b)
    for (int64_t p = 0; p < s.programs; ++p, z += s.inputs) {
      const T weight = s.program_weights[b * s.programs + p];
      for (int64_t i = 0; i < s.inputs; i += lanes)
        store_upto(z + i, weight * load_upto(s.x + b * s.x_row + i, s.inputs - i), s.inputs - i);
    }
}

template <class T>
void program_expand_backward(const Expansion<T>& s, const T* grad_z, T* grad_inputs, T* grad_program_weights) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t b = 0; b < s.samples; ++b)
    for (int64_t p = 0; p < s.programs; ++p, grad_z += s.inputs) {
      const T weight = s.program_weights[b * s.programs + p];
      Vec<T> into{};
      for (int64_t i = 0; i < s.inputs; i += lanes) {
        const int64_t count = s.inputs - i;
        const Vec<T> grad = load_upto(grad_z + i, count);
        into += grad * load_upto(s.x + b * s.x_row + i, count);
        if (!grad_inputs) continue;
        T* const out = grad_inputs + b * s.inputs + i;
        store_upto(out, p == 0 ? weight * grad : load_upto(out, count) + weight * grad, count);
      }
      grad_program_weights[b * s.programs + p] = sum<T>(into);
    }
}

template void product(const Product<float>&);
template void program_mix(const Mixing<float>&);
template void program_mix_to_inputs(const MixingToInputs<float>&);
template void program_mix_to_weights(const MixingToWeights<float>&);
template void program_mix_to_biases(const Programs<float>&, int64_t, const float*, float*);
template void program_expand(const Expansion<float>&, float*);
template void program_expand_backward(const Expansion<float>&, const float*, float*, float*);
template void transpose(const float*, int64_t, int64_t, int64_t, float*, int64_t, int64_t);
template void product(const Product<double>&);
template void program_mix(const Mixing<double>&);
template void program_mix_to_inputs(const MixingToInputs<double>&);
template void program_mix_to_weights(const MixingToWeights<double>&);
template void program_mix_to_biases(const Programs<double>&, int64_t, const double*, double*);
template void program_expand(const Expansion<double>&, double*);
template void program_expand_backward(const Expansion<double>&, const double*, double*, double*);
template void transpose(const double*, int64_t, int64_t, int64_t, double*, int64_t, int64_t);

} // namespace fastmem::FASTMEM_ISA
#endif
