// Additive attention of one sample over a small cache:
//
//   scores[j] = sum_a score_weights[a] tanh(query[a] + keys[j,a]),   weights = softmax(scores)
//   attended = sum_j weights[j] cache[j]
//
// An entry whose mask is false takes no part, whatever it holds.
#pragma once

#include "weighted_read_kernel.h"

namespace fastmem {

// What is attended to, and how.
template <class T> struct Attention {
  int64_t length, width, hidden;
  const T *query, *score_weights; // [A] [A]
  const T* keys;                  // [L,A]
  int64_t keys_row;
  const T* cache; // [L,H]
  int64_t cache_row;
  const bool* mask; // [L]; none: null
};

template <class T> struct CachedAttention {
  Attention<T> attention;
  T *weights, *attended; // [L] [H]
  T* scratch;            // [H]
};

template <class T> struct CachedAttentionBackward {
  Attention<T> attention;
  const T* weights;                                            // [L]
  const T *grad_attended, *grad_weights;                       // [H] [L]; absent: null
  T *grad_query, *grad_keys, *grad_cache, *grad_score_weights; // [A] [L,A] [L,H] [A]; unwanted: null
  T* scratch;                                                  // [L]
};

FASTMEM_EACH_ISA(template <class T> void cached_attention(const CachedAttention<T>& s);
                 template <class T> void cached_attention_backward(const CachedAttentionBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"
#include "scratch.h"

namespace fastmem::FASTMEM_ISA {

inline constexpr int kScoreRows = 4; // entries whose products are summed at once

// f(first, count) over the runs of entries that take part, each at most kSumBlock long, so that sums stay exact.
template <class T, class F> FASTMEM_INLINE void for_each_run(const Attention<T>& s, const F& f) {
  for (int64_t first = 0; first < s.length;) {
    const int64_t most = s.length - first < kSumBlock ? s.length - first : kSumBlock;
    int64_t count = s.mask ? 0 : most;
    while (count < most && s.mask[first + count]) ++count;
    if (count > 0) f(first, count);
    first += count > 0 ? count : 1;
  }
}

template <int Rows, class T> FASTMEM_INLINE void score_rows(Attention<T> s, int64_t row, T* scores) {
  const T* const keys = s.keys + row * s.keys_row;
  Vec<T> products[Rows] = {};
  for (int64_t a = 0; a < s.width; a += kLanes<T>) {
    const int64_t count = s.width - a;
    const Vec<T> query = load_upto(s.query + a, count), weight = load_upto(s.score_weights + a, count);
#pragma GCC unroll 4
    for (int r = 0; r < Rows; ++r) products[r] += weight * tanh<T>(query + load_upto(keys + r * s.keys_row + a, count));
  }
  T sums[Rows];
  sum_each(products, sums);
  for (int r = 0; r < Rows; ++r) scores[row + r] = sums[r];
}

template <class T> void cached_attention(const CachedAttention<T>& s) {
  constexpr T lowest = T(-__builtin_inf());
  const Attention<T>& a = s.attention;
  T* const scores = s.weights; // which they become in place
  for (int64_t j = 0; j < a.length; ++j) scores[j] = lowest;
  for_each_run(a, [&](int64_t first, int64_t count) {
    int64_t row = first;
    for (; row + kScoreRows <= first + count; row += kScoreRows) score_rows<kScoreRows>(a, row, scores);
    for (; row < first + count; ++row) score_rows<1>(a, row, scores);
  });
  T highest = lowest;
  for (int64_t j = 0; j < a.length; ++j) highest = scores[j] > highest ? scores[j] : highest;
  const T total = sum<T>(exponentials(scores, a.length, broadcast(highest)));
  if (total == 0) {
    clear(s.weights, a.length);
    clear(s.attended, a.hidden);
    return;
  }
  map(s.weights, a.length, [total](Vec<T> power) { return power / total; }, scores);
  T* part = s.attended; // the first run's, to which the others are added
  for_each_run(a, [&](int64_t first, int64_t count) {
    weighted_read<T>({.slots = count,
                      .word = a.hidden,
                      .heads = 1,
                      .memory = a.cache + first * a.cache_row,
                      .memory_row = a.cache_row,
                      .weights = s.weights + first,
                      .reads = part});
    if (part == s.scratch) add(s.attended, part, a.hidden);
    part = s.scratch;
  });
}

// With z the gradient of the scores and t = tanh(query + keys[j]):
//   grad_keys[j] = z[j] score_weights (1 - t^2),   grad_query = sum_j grad_keys[j],   grad_score_weights = sum_j z[j] t
template <class T> void scores_backward(const CachedAttentionBackward<T>& s, const T* z) {
  const Attention<T> of = s.attention;
  T* const grad_keys = s.grad_keys;
  for (int64_t a = 0; a < of.width; a += kLanes<T>) {
    const int64_t count = of.width - a;
    const Vec<T> query = load_upto(of.query + a, count), weight = load_upto(of.score_weights + a, count);
    Vec<T> grad_query{}, grad_weight{};
    for_each_run(of, [&](int64_t first, int64_t rows) {
      Vec<T> part_query{}, part_weight{};
      for (int64_t j = first; j < first + rows; ++j) {
        const Vec<T> t = tanh<T>(query + load_upto(of.keys + j * of.keys_row + a, count));
        const Vec<T> grad_key = z[j] * weight * (T(1) - t * t);
        if (grad_keys) store_upto(grad_keys + j * of.width + a, grad_key, count);
        part_query += grad_key;
        part_weight += z[j] * t;
      }
      grad_query += part_query;
      grad_weight += part_weight;
    });
    if (s.grad_query) store_upto(s.grad_query + a, grad_query, count);
    if (s.grad_score_weights) store_upto(s.grad_score_weights + a, grad_weight, count);
  }
}

template <class T> void cached_attention_backward(const CachedAttentionBackward<T>& s) {
  const Attention<T>& a = s.attention;
  const auto leave_zero = [](T* gradient, int64_t count, int64_t first = 0) {
    if (gradient) clear(gradient + first, count);
  };
  bool alive = false; // whether any entry had a score above -inf
  for (int64_t j = 0; j < a.length; ++j) alive = alive || s.weights[j] != 0;
  if (!alive) {
    leave_zero(s.grad_query, a.width);
    leave_zero(s.grad_keys, a.length * a.width);
    leave_zero(s.grad_cache, a.length * a.hidden);
    leave_zero(s.grad_score_weights, a.width);
    return;
  }
  for (int64_t j = 0; a.mask && j < a.length; ++j) {
    if (a.mask[j]) continue;
    leave_zero(s.grad_keys, a.width, j * a.width);
    leave_zero(s.grad_cache, a.hidden, j * a.hidden);
  }

  T* const grad = s.scratch; // of the weights, then of the scores
  clear(grad, a.length);
  if (!s.grad_attended) leave_zero(s.grad_cache, a.length * a.hidden);
  else
    for_each_run(a, [&](int64_t first, int64_t count) {
      weighted_read_backward<T>({.slots = count,
                                 .word = a.hidden,
                                 .heads = 1,
                                 .memory = a.cache + first * a.cache_row,
                                 .memory_row = a.cache_row,
                                 .weights = s.weights + first,
                                 .grad_reads = s.grad_attended,
                                 .grad_memory = s.grad_cache ? s.grad_cache + first * a.hidden : nullptr,
                                 .grad_weights = grad + first,
                                 .grad_memory_row = a.hidden,
                                 .accumulate = false});
    });
  if (!s.grad_query && !s.grad_keys && !s.grad_score_weights) return;
  add(grad, s.grad_weights, a.length);
  T mean = 0;
  for_each_run(a, [&](int64_t first, int64_t count) { mean += inner(s.weights + first, grad + first, count); });
  map(grad, a.length, [mean](Vec<T> weight, Vec<T> g) { return weight * (g - mean); }, s.weights, grad);
  scores_backward(s, grad);
}

template void cached_attention(const CachedAttention<float>&);
template void cached_attention(const CachedAttention<double>&);
template void cached_attention_backward(const CachedAttentionBackward<float>&);
template void cached_attention_backward(const CachedAttentionBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
