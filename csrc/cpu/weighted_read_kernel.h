// Weighted read of one sample: reads[a] = sum_i weights[a,i] memory[i].
#pragma once

#include "isa.h"

#include <cstdint>

namespace fastmem {

template <class T> struct WeightedRead {
  int64_t slots, word, heads;
  const T* memory; // [N,W]
  int64_t memory_row;
  const T* weights; // [A,N]
  T* reads;         // [A,W]
};

template <class T> struct WeightedReadBackward {
  int64_t slots, word, heads;
  const T* memory;
  int64_t memory_row;
  const T *weights, *grad_reads; // [A,N] [A,W]
  T *grad_memory, *grad_weights; // [N,W] [A,N]; unwanted: null
  int64_t grad_memory_row;
  bool accumulate; // into grad_memory
};

FASTMEM_EACH_ISA(template <class T> void weighted_read(const WeightedRead<T>& s);
                 template <class T> void weighted_read_backward(const WeightedReadBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "simd.h"

namespace fastmem::FASTMEM_ISA {

inline constexpr int kReaders = 4;  // heads that share a pass over the memory
inline constexpr int kReadRows = 4; // rows whose products with the gradients are summed at once

// f(first head, Readers as a number) over all heads, kReaders at a time.
template <class F> FASTMEM_INLINE void for_each_readers(int64_t heads, const F& f) {
  for (int64_t head = 0; head < heads; head += kReaders) switch (heads - head) {
      case 1: f.template operator()<1>(head); break;
      case 2: f.template operator()<2>(head); break;
      case 3: f.template operator()<3>(head); break;
      default: f.template operator()<kReaders>(head);
    }
}

// Columns from k on, Vectors vectors of them, of the reads of heads [head, head + Readers). Few sums at once would wait
// for each other: then several rows have sums of their own.
template <int Readers, int Vectors, class T>
FASTMEM_INLINE void read_columns(WeightedRead<T> s, int64_t head, int64_t k) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t count = Vectors > 1 ? Vectors * lanes : s.word - k;
  constexpr int sums = Readers * Vectors, ways = sums >= 8 ? 1 : sums >= 4 ? 2 : sums >= 2 ? 4 : 8;
  const T *const weights = s.weights + head * s.slots, *const memory = s.memory + k;
  Vec<T> total[sums] = {};
  for (int64_t begin = 0; begin < s.slots; begin += kSumBlock) {
    const int64_t end = begin + kSumBlock < s.slots ? begin + kSumBlock : s.slots;
    Vec<T> part[ways * sums] = {};
    const auto add_row = [&](int64_t i, int way) __attribute__((always_inline)) {
      Vec<T> m[Vectors];
#pragma GCC unroll 4
      for (int v = 0; v < Vectors; ++v) m[v] = load_upto(memory + i * s.memory_row + v * lanes, count - v * lanes);
#pragma GCC unroll 4
      for (int h = 0; h < Readers; ++h)
#pragma GCC unroll 4
        for (int v = 0; v < Vectors; ++v) part[way * sums + h * Vectors + v] += weights[h * s.slots + i] * m[v];
    };
    int64_t i = begin;
    for (; i + ways <= end; i += ways)
#pragma GCC unroll 8
      for (int way = 0; way < ways; ++way) add_row(i + way, way);
    for (; i < end; ++i) add_row(i, 0);
#pragma GCC unroll 16
    for (int j = 0; j < ways * sums; ++j) total[j % sums] += part[j];
  }
#pragma GCC unroll 4
  for (int h = 0; h < Readers; ++h)
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v)
      store_upto(s.reads + (head + h) * s.word + k + v * lanes, total[h * Vectors + v], count - v * lanes);
}

template <class T> void weighted_read(const WeightedRead<T>& s) {
  for_each_readers(s.heads, [&]<int Readers>(int64_t head) __attribute__((always_inline)) {
    for_each_width<4, T>(s.word, [&](int64_t k, auto vectors) __attribute__((always_inline)) {
      read_columns<Readers, decltype(vectors)::value>(s, head, k);
    });
  });
}

// grad_weights[a,i] = <grad_reads[a], memory[i]>,   grad_memory[i] = sum_a weights[a,i] grad_reads[a]
template <int Rows, int Readers, class T>
FASTMEM_INLINE void read_backward_rows(WeightedReadBackward<T> s, int64_t head, int64_t row) {
  constexpr int64_t lanes = kLanes<T>;
  const T *const weights = s.weights + head * s.slots + row, *const grads = s.grad_reads + head * s.word;
  Vec<T> products[Rows * Readers] = {};
  for (int64_t k = 0; k < s.word; k += lanes) {
    const int64_t count = s.word - k;
    Vec<T> g[Readers];
#pragma GCC unroll 4
    for (int h = 0; h < Readers; ++h) g[h] = load_upto(grads + h * s.word + k, count);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) {
      const Vec<T> m = load_upto(s.memory + (row + r) * s.memory_row + k, count);
#pragma GCC unroll 4
      for (int h = 0; h < Readers; ++h) products[h * Rows + r] += m * g[h];
      if (!s.grad_memory) continue;
      T* const out = s.grad_memory + (row + r) * s.grad_memory_row + k;
      Vec<T> spread = head == 0 && !s.accumulate ? Vec<T>{} : load_upto(out, count);
#pragma GCC unroll 4
      for (int h = 0; h < Readers; ++h) spread += weights[h * s.slots + r] * g[h];
      store_upto(out, spread, count);
    }
  }
  if (!s.grad_weights) return;
  T sums[Rows * Readers];
  sum_each(products, sums);
  for (int h = 0; h < Readers; ++h)
    for (int r = 0; r < Rows; ++r) s.grad_weights[(head + h) * s.slots + row + r] = sums[h * Rows + r];
}

template <class T> void weighted_read_backward(const WeightedReadBackward<T>& s) {
  for_each_readers(s.heads, [&]<int Readers>(int64_t head) __attribute__((always_inline)) {
    int64_t row = 0;
    for (; row + kReadRows <= s.slots; row += kReadRows) read_backward_rows<kReadRows, Readers>(s, head, row);
    for (; row < s.slots; ++row) read_backward_rows<1, Readers>(s, head, row);
  });
}

template void weighted_read(const WeightedRead<float>&);
template void weighted_read(const WeightedRead<double>&);
template void weighted_read_backward(const WeightedReadBackward<float>&);
template void weighted_read_backward(const WeightedReadBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
