// Content addressing of one sample: weights[h,i] = softmax_i(score[h,i]), in one pass over the memory.
#pragma once

#include "similarity.h"

namespace fastmem {

template <class T> struct Addressing {
  Search<T> search;
  T* weights; // [A,N]
  int64_t weights_row;
  T* scratch; // addressing_scratch(heads, word)
};

template <class T> struct AddressingBackward {
  Search<T> search;
  const T *weights, *grad_weights; // [A,N] [A,N]
  int64_t weights_row;             // of both
  T* grad_memory;                  // [N,W]; unwanted: null
  int64_t grad_memory_row;
  T *grad_keys, *grad_strengths, *grad_key_mask; // [A,W] [A] [A,W]; unwanted: null
  T* scratch;                                    // addressing_scratch(heads, word)
};

// Elements of scratch that either direction needs.
int64_t addressing_scratch(int64_t heads, int64_t word);

FASTMEM_EACH_ISA(
  template <class T> void content_addressing(const Addressing<T>& s);
  template <class T> void content_addressing_backward(const AddressingBackward<T>& s);
)

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

// exp(score - max) / sum in place. -inf gives 0, a row of them zeros; +inf or NaN makes the row NaN.
template <class T> void softmax(T* row, int64_t slots, Vec<T> maxima) {
  constexpr int64_t lanes = kLanes<T>;
  T highest = max<T>(maxima);
  if (highest == T(-__builtin_inf())) highest = 0;
  Vec<T> total{};
  int64_t i = 0;
  for (; i + lanes <= slots; i += lanes) {
    const Vec<T> power = exp<T>(load(row + i) - highest);
    total += power;
    store(row + i, power);
  }
  if (i < slots) {
    const Vec<T> power = exp<T>(load_part(row + i, slots - i) - highest);
    total += lane_index<T>() < Int<T>(slots - i) ? power : Vec<T>{};
    store_part(row + i, power, slots - i);
  }
  const T sum_of_powers = sum<T>(total), scale = sum_of_powers == 0 ? T(0) : 1 / sum_of_powers;
  for (i = 0; i < slots; i += lanes) store_upto(row + i, load_upto(row + i, slots - i) * scale, slots - i);
}

template <class T> void content_addressing(const Addressing<T>& a) {
  constexpr int64_t lanes = kLanes<T>;
  const Search<T>& s = a.search;
  Scratch<T> scratch{a.scratch};
  const Heads<T> heads = prepare<T>(s, nullptr, scratch);
  T* const maxima = scratch.take(s.heads * kPad<T>);
  T* const packed = scratch.take(kTile<T> * heads.pitch);
  const Vec<T> lowest = broadcast(T(-__builtin_inf()));
  for (int64_t h = 0; h < s.heads; ++h) store(maxima + h * kPad<T>, lowest);
  Matches<T> found;
  Tile<T> tile;
  for (int64_t begin = 0; begin < s.slots; begin += kTile<T>) {
    take_tile(s, begin, packed, tile);
    for_each_head_group(s.heads, [&](int64_t head, auto group) __attribute__((always_inline)) {
      constexpr int Group = decltype(group)::value;
      match<Group>(s, heads, head, tile, false, found);
      for (int h = 0; h < Group; ++h) {
        Vec<T> highest = load(maxima + (head + h) * kPad<T>);
        const T strength = s.strengths[head + h];
        for (int64_t block = 0; block < tile.blocks; ++block) {
          const Vec<T> product = strength * cosine(s, heads, head + h, h, block, found);
          const Vec<T> scores = where_shown(tile, block, product, lowest);
          highest = scores > highest ? scores : highest;
          const int64_t i = block * lanes;
          store_upto(a.weights + (head + h) * a.weights_row + begin + i, scores, tile.count - i);
        }
        store(maxima + (head + h) * kPad<T>, highest);
      }
    });
  }
  for (int64_t h = 0; h < s.heads; ++h) softmax<T>(a.weights + h * a.weights_row, s.slots, load(maxima + h * kPad<T>));
}

template <class T> void content_addressing_backward(const AddressingBackward<T>& a) {
  constexpr int64_t lanes = kLanes<T>;
  const Search<T>& s = a.search;
  Scratch<T> scratch{a.scratch};
  T* const means = scratch.take(s.heads);
  T* const alive = scratch.take(s.heads);
  for (int64_t h = 0; h < s.heads; ++h) {
    Vec<T> mean[4], total[4]; // short sums round less than a long one, and do not wait for each other
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) mean[k] = total[k] = Vec<T>{};
    const T *weights = a.weights + h * a.weights_row, *grads = a.grad_weights + h * a.weights_row;
    int64_t i = 0;
    for (; i + 4 * lanes <= s.slots; i += 4 * lanes)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) {
        const Vec<T> weight = load(weights + i + k * lanes);
        mean[k] += weight * load(grads + i + k * lanes);
        total[k] += weight;
      }
    for (; i < s.slots; i += lanes) {
      const Vec<T> weight = load_upto(weights + i, s.slots - i);
      mean[0] += weight * load_upto(grads + i, s.slots - i);
      total[0] += weight;
    }
    means[h] = sum<T>((mean[0] + mean[1]) + (mean[2] + mean[3]));
    alive[h] = sum<T>((total[0] + total[1]) + (total[2] + total[3]));
  }
  const Heads<T> heads = prepare<T>(s, alive, scratch);
  const Sums<T> sums = sums_at(s, scratch.zeros(sums_size(s)));
  const Upstream<T> upstream{.alive = alive, .means = means, .weights = a.weights, .grad_weights = a.grad_weights,
                             .weights_row = a.weights_row, .logsumexp = nullptr, .grad_reads = nullptr};
  const RowGradient<T> memory{.out = a.grad_memory, .row = a.grad_memory_row, .first = true};
  backward_rows<false>(s, heads, upstream, memory, a.grad_keys || a.grad_key_mask, sums, scratch);
  finish(s, heads, alive, sums, a.grad_keys, a.grad_strengths, a.grad_key_mask);
}

template void content_addressing(const Addressing<float>&);
template void content_addressing(const Addressing<double>&);
template void content_addressing_backward(const AddressingBackward<float>&);
template void content_addressing_backward(const AddressingBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
