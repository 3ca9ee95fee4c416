// Memory write of one sample: all write heads erase, then all add.
//
//   new_memory[i] = memory[i] retention[i] prod_q (1 - w[q,i] erase[q]) + sum_q w[q,i] values[q]
#pragma once

#include "isa.h"
#include "scratch.h"

#include <cstdint>

namespace fastmem {

template <class T> struct MemoryWrite {
  int64_t slots, word, write_heads;
  const T* memory; // [N,W]
  int64_t memory_row;
  const T *write_weights, *erase, *values, *retention; // [Q,N] [Q,W] [Q,W] [N]; no retention: null
  T* new_memory;                                       // [N,W]; may be memory
  int64_t new_memory_row;
};

template <class T> struct MemoryWriteBackward {
  int64_t slots, word, write_heads;
  const T* memory;
  int64_t memory_row;
  const T *write_weights, *erase, *values, *retention;
  const T* grad_new_memory; // [N,W]
  int64_t grad_new_memory_row;
  T* grad_memory; // [N,W], may be grad_new_memory; unwanted: null
  int64_t grad_memory_row;
  T *grad_write_weights, *grad_erase, *grad_values, *grad_retention; // like the inputs; unwanted: null
  T* scratch;                                                        // memory_write_scratch(word, write_heads)
};

// Elements of scratch that the backward needs: sums for erase and values, their totals, three vectors for each head.
// One head needs none.
inline int64_t memory_write_scratch(int64_t word, int64_t write_heads) {
  return write_heads == 1 ? 0 : write_heads * (4 * in_lines(word) + 3 * 16);
}

FASTMEM_EACH_ISA(template <class T> void memory_write(const MemoryWrite<T>& s);
                 template <class T> void memory_write_backward(const MemoryWriteBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "simd.h"

namespace fastmem::FASTMEM_ISA {

// Columns from k on, Vectors vectors of them, of all rows. A copy of `s`: the compiler would otherwise read its fields
// again after every store.
template <int Vectors, class T> FASTMEM_INLINE void write_columns(MemoryWrite<T> s, int64_t k) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t count = Vectors > 1 ? Vectors * lanes : s.word - k;
  Vec<T> erase[Vectors], values[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    erase[v] = load_upto(s.erase + k + v * lanes, count - v * lanes);
    values[v] = load_upto(s.values + k + v * lanes, count - v * lanes);
  }
  for (int64_t i = 0; i < s.slots; ++i) {
    const T* const row = s.memory + i * s.memory_row + k;
    T* const new_row = s.new_memory + i * s.new_memory_row + k;
    const T w = s.write_weights[i], kept = s.retention ? s.retention[i] : T(1);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) {
      const Vec<T> m = load_upto(row + v * lanes, count - v * lanes) * kept;
      store_upto(new_row + v * lanes, m * (T(1) - w * erase[v]) + w * values[v], count - v * lanes);
    }
  }
}

template <class T> void write_one_head(const MemoryWrite<T>& s) {
  for_each_width<4, T>(s.word, [&](int64_t k, auto vectors)
                                   __attribute__((always_inline)) { write_columns<decltype(vectors)::value>(s, k); });
}

template <class T> void write_heads(const MemoryWrite<T>& s) {
  const int64_t heads = s.write_heads, slots = s.slots, word = s.word;
  for (int64_t i = 0; i < slots; ++i) {
    const T *const row = s.memory + i * s.memory_row, *const w = s.write_weights + i;
    T* const new_row = s.new_memory + i * s.new_memory_row;
    const T kept = s.retention ? s.retention[i] : T(1);
    for (int64_t k = 0; k < word; k += kLanes<T>) {
      const int64_t count = word - k;
      Vec<T> m = load_upto(row + k, count) * kept, added{};
      for (int64_t q = 0; q < heads; ++q) {
        m = m * (T(1) - w[q * slots] * load_upto(s.erase + q * word + k, count));
        added += w[q * slots] * load_upto(s.values + q * word + k, count);
      }
      store_upto(new_row + k, m + added, count);
    }
  }
}

template <class T> void memory_write(const MemoryWrite<T>& s) {
  if (s.write_heads == 1) write_one_head(s);
  else write_heads(s);
}

// The way back through write_columns; adds to the gradients of weights and retention. The sums over a row are taken for
// a vector's width of rows at once.
template <int Vectors, class T> FASTMEM_INLINE void write_columns_backward(MemoryWriteBackward<T> s, int64_t k) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t count = Vectors > 1 ? Vectors * lanes : s.word - k;
  Vec<T> erase[Vectors], values[Vectors], grad_erase[Vectors], grad_values[Vectors];
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) {
    erase[v] = load_upto(s.erase + k + v * lanes, count - v * lanes);
    values[v] = load_upto(s.values + k + v * lanes, count - v * lanes);
    grad_erase[v] = grad_values[v] = Vec<T>{};
  }
  for (int64_t block = 0; block < s.slots; block += kSumBlock) {
    const int64_t end = block + kSumBlock < s.slots ? block + kSumBlock : s.slots;
    Vec<T> erased[Vectors] = {}, added[Vectors] = {};
    const auto rows = [&](int64_t first, auto whole) __attribute__((always_inline)) {
      Vec<T> along[lanes];
#pragma GCC unroll 16
      for (int row = 0; row < lanes; ++row) {
        along[row] = Vec<T>{};
        const int64_t i = first + row;
        if (!decltype(whole)::value && i >= end) continue;
        const T w = s.write_weights[i], kept = s.retention ? s.retention[i] : T(1);
        Vec<T> along_retention{};
#pragma GCC unroll 2
        for (int v = 0; v < Vectors; ++v) {
          const int64_t at = k + v * lanes, within = count - v * lanes;
          const Vec<T> m = load_upto(s.memory + i * s.memory_row + at, within),
                       g = load_upto(s.grad_new_memory + i * s.grad_new_memory_row + at, within);
          const Vec<T> left = T(1) - w * erase[v], gone = g * m * kept;
          if (s.grad_memory) store_upto(s.grad_memory + i * s.grad_memory_row + at, g * left * kept, within);
          erased[v] -= w * gone;
          added[v] += w * g;
          along[row] += g * values[v] - gone * erase[v];
          along_retention += g * m * left;
        }
        if (s.grad_retention) s.grad_retention[i] += sum<T>(along_retention);
      }
      if (!s.grad_write_weights) return;
      T* const grad_weights = s.grad_write_weights + first;
      store_upto(grad_weights, load_upto(grad_weights, end - first) + sum_rows<T>(along), end - first);
    };
    int64_t first = block;
    for (; first + lanes <= end; first += lanes) rows(first, Bool<true>{});
    if (first < end) rows(first, Bool<false>{});
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      grad_erase[v] += erased[v];
      grad_values[v] += added[v];
    }
  }
#pragma GCC unroll 2
  for (int v = 0; v < Vectors; ++v) {
    if (s.grad_erase) store_upto(s.grad_erase + k + v * lanes, grad_erase[v], count - v * lanes);
    if (s.grad_values) store_upto(s.grad_values + k + v * lanes, grad_values[v], count - v * lanes);
  }
}

template <class T> void write_one_head_backward(const MemoryWriteBackward<T>& s) {
  if (s.grad_write_weights) clear(s.grad_write_weights, s.slots);
  if (s.grad_retention) clear(s.grad_retention, s.slots);
  for_each_width<2, T>(s.word, [&](int64_t k, auto vectors) __attribute__((always_inline)) {
    write_columns_backward<decltype(vectors)::value>(s, k);
  });
}

// Of the product over heads each head needs that of the others: those before, kept, times those after, on the way back.
template <class T> void write_heads_backward(const MemoryWriteBackward<T>& s) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t heads = s.write_heads, pitch = in_lines(s.word), sums = 2 * heads * pitch;
  T *const erase_sums = s.scratch, *const value_sums = erase_sums + heads * pitch, *const totals = s.scratch + sums;
  T *const before = totals + sums, *const along_erase = before + 16 * heads,
           *const along_value = along_erase + 16 * heads;
  for (int64_t j = 0; j < 2 * sums; ++j) s.scratch[j] = 0;
  for (int64_t i = 0; i < s.slots; ++i) {
    const T *const row = s.memory + i * s.memory_row, *const g_row = s.grad_new_memory + i * s.grad_new_memory_row;
    const T* const w = s.write_weights + i;
    const T kept = s.retention ? s.retention[i] : T(1);
    Vec<T> along_retention{};
    for (int64_t q = 0; q < heads; ++q) {
      store(along_erase + 16 * q, Vec<T>{});
      store(along_value + 16 * q, Vec<T>{});
    }
    for (int64_t k = 0; k < s.word; k += lanes) {
      const int64_t count = s.word - k;
      const Vec<T> m = load_upto(row + k, count), g = load_upto(g_row + k, count);
      Vec<T> product = broadcast(T(1));
      for (int64_t q = 0; q < heads; ++q) {
        store(before + 16 * q, product);
        product = product * (T(1) - w[q * s.slots] * load_upto(s.erase + q * s.word + k, count));
      }
      along_retention += g * m * product;
      if (s.grad_memory) store_upto(s.grad_memory + i * s.grad_memory_row + k, g * product * kept, count);
      Vec<T> after = g * m * kept;
      for (int64_t q = heads - 1; q >= 0; --q) {
        const T weight = w[q * s.slots];
        const Vec<T> erase = load_upto(s.erase + q * s.word + k, count), others = after * load(before + 16 * q);
        T *const erased = erase_sums + q * pitch + k, *const valued = value_sums + q * pitch + k;
        store(erased, load(erased) - weight * others);
        store(valued, load(valued) + weight * g);
        store(along_erase + 16 * q, load(along_erase + 16 * q) + others * erase);
        store(along_value + 16 * q, load(along_value + 16 * q) + g * load_upto(s.values + q * s.word + k, count));
        after = after * (T(1) - weight * erase);
      }
    }
    if (s.grad_retention) s.grad_retention[i] = sum<T>(along_retention);
    if (s.grad_write_weights)
      for (int64_t q = 0; q < heads; ++q)
        s.grad_write_weights[q * s.slots + i] = sum<T>(load(along_value + 16 * q)) - sum<T>(load(along_erase + 16 * q));
    if ((i + 1) % kSumBlock == 0 || i + 1 == s.slots)
      for (int64_t j = 0; j < sums; j += lanes) {
        store(totals + j, load(totals + j) + load(s.scratch + j));
        store(s.scratch + j, Vec<T>{});
      }
  }
  for (int64_t q = 0; q < heads; ++q)
    for (int64_t k = 0; k < s.word; ++k) {
      if (s.grad_erase) s.grad_erase[q * s.word + k] = totals[q * pitch + k];
      if (s.grad_values) s.grad_values[q * s.word + k] = totals[(heads + q) * pitch + k];
    }
}

template <class T> void memory_write_backward(const MemoryWriteBackward<T>& s) {
  if (s.write_heads == 1) write_one_head_backward(s);
  else write_heads_backward(s);
}

template void memory_write(const MemoryWrite<float>&);
template void memory_write(const MemoryWrite<double>&);
template void memory_write_backward(const MemoryWriteBackward<float>&);
template void memory_write_backward(const MemoryWriteBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
