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
  bool accumulate;                               // into grad_memory
  T *grad_keys, *grad_strengths, *grad_key_mask; // [A,W] [A] [A,W]; unwanted: null
  T* scratch;                                    // addressing_scratch(heads, word)
};

// Elements of scratch that either direction needs.
int64_t addressing_scratch(int64_t heads, int64_t word);

FASTMEM_EACH_ISA(template <class T> void content_addressing(const Addressing<T>& s);
                 template <class T> void content_addressing_backward(const AddressingBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

// A cosine is at most 1, so a score at most |strength|: up to here exp(score - |strength|) and its last bit stay normal
// numbers, and the highest score need not be known first.
template <class T> inline constexpr T kPlainStrength = sizeof(T) == 4 ? T(30) : T(330);

template <class T> FASTMEM_INLINE bool is_plain(T strength) {
  return strength <= kPlainStrength<T> && strength >= -kPlainStrength<T>;
}

template <class T> void content_addressing(const Addressing<T>& a) {
  constexpr int64_t lanes = kLanes<T>;
  const Search<T>& s = a.search;
  Scratch<T> scratch{a.scratch};
  const Heads<T> heads = prepare<T>(s, nullptr, scratch);
  T* const found_by_head = scratch.take(s.heads * kPad<T>); // sum of exponentials, or highest score
  T* const packed = scratch.take(kTile<T> * heads.pitch);
  const Vec<T> lowest = broadcast(T(-__builtin_inf()));
  for (int64_t h = 0; h < s.heads; ++h)
    store(found_by_head + h * kPad<T>, is_plain(s.strengths[h]) ? Vec<T>{} : lowest);
  Matches<T> found;
  Tile<T> tile;
  for (int64_t begin = 0; begin < s.slots; begin += kTile<T>) {
    take_tile(s, begin, packed, tile);
    for_each_head_group(s.heads, [&](int64_t head, auto group) __attribute__((always_inline)) {
      constexpr int Group = decltype(group)::value;
      match<Group>(s, heads, head, tile, false, found);
      for (int h = 0; h < Group; ++h) {
        const T strength = s.strengths[head + h], bound = strength < 0 ? -strength : strength;
        T* const weights = a.weights + (head + h) * a.weights_row + begin;
        T* const kept = found_by_head + (head + h) * kPad<T>;
        const bool plain = is_plain(strength);
        Vec<T> sum_or_max = load(kept);
        for (int64_t block = 0; block < tile.blocks; ++block) {
          const Vec<T> similar = cosine(s, heads, head + h, h, block, found);
          const int64_t i = block * lanes;
          Vec<T> value;
          if (plain) {
            value = where_shown(tile, block, exp<T>(strength * similar - bound), Vec<T>{});
            sum_or_max += value;
          } else {
            value = where_shown(tile, block, strength * similar, lowest);
            sum_or_max = value > sum_or_max ? value : sum_or_max;
          }
          store_upto(weights + i, value, tile.count - i);
        }
        store(kept, sum_or_max);
      }
    });
  }
  for (int64_t h = 0; h < s.heads; ++h) {
    T* const weights = a.weights + h * a.weights_row;
    Vec<T> totals = load(found_by_head + h * kPad<T>);
    if (!is_plain(s.strengths[h])) totals = exponentials(weights, s.slots, totals);
    const T total = sum<T>(totals), inverse = 1 / total;
    for (int64_t i = 0; i < s.slots; i += lanes) {
      const Vec<T> power = load_upto(weights + i, s.slots - i);
      const Vec<T> weight = total == 0 ? Vec<T>{} : quotient<T>(power, broadcast(total), broadcast(inverse));
      store_upto(weights + i, weight, s.slots - i); // rounded as a division: a weight of 1 must be 1
    }
  }
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
  const Upstream<T> upstream{.alive = alive,
                             .means = means,
                             .weights = a.weights,
                             .grad_weights = a.grad_weights,
                             .weights_row = a.weights_row,
                             .logsumexp = nullptr,
                             .grad_reads = nullptr};
  const RowGradient<T> memory{.out = a.grad_memory, .row = a.grad_memory_row, .first = !a.accumulate};
  backward_rows<false>(s, heads, upstream, memory, a.grad_keys || a.grad_key_mask, sums, scratch);
  finish<false>(s, heads, alive, sums, a.grad_keys, a.grad_strengths, a.grad_key_mask);
}

template void content_addressing(const Addressing<float>&);
template void content_addressing(const Addressing<double>&);
template void content_addressing_backward(const AddressingBackward<float>&);
template void content_addressing_backward(const AddressingBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
