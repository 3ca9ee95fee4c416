// An interface vector made by stored programs: in place of one linear map of the controller, each head n mixes P of
// them, found by content. Here what is done for one sample; the products for a group are in csrc/cpu/sequence.h.
//
//   meta = W_m h + b_m, the queries of all heads, then their strengths
//   attention_n = softmax_p(softplus(strength_n) D(f(query_n), f(K_np)))      f: the identity or tanh
//   part_n = sum_p attention_np (h V_np + c_np)
//
// Direct attention has no keys: attention_n = softmax(softplus(strength_n) query_n).
//
// Columns of the programs lie head by head; runs of them make up the interface vector.
#pragma once

#include "content_addressing_kernel.h"

namespace fastmem {

struct ProgramRun {
  int64_t column, width; // where it lies among the columns
};

struct ProgramLayout {
  int64_t count, key, heads, hidden, size; // P, K, n, H, numbers of an interface vector; no programs: count 0
  const int64_t* widths;                   // [n]: of each head's part
  const ProgramRun* runs;                  // in the order of the interface vector
  int64_t run_count;
  bool direct_attention, tanh_keys;

  int64_t meta() const { return heads * (key + 1); }
  int64_t attention() const { return heads * count; }
  int64_t fields() const { return count ? meta() + attention() : 0; } // kept of a step: meta, attention
  int64_t keys() const { return direct_attention ? 0 : heads * count * key; }
};

// What the products give and take of one sample.
template <class T> struct ProgramsOfSample {
  ProgramLayout layout;
  Similarity<T> similarity;
  const T* keys; // [n,P,K], squashed
  T* meta;       // [n,K] [n]
  T* attention;  // [n,P]
  T* scratch;    // program_scratch
};

inline int64_t program_scratch(const ProgramLayout& l) {
  return in_lines(l.key) + in_lines(l.count) + in_lines(l.size) + addressing_scratch(1, l.key);
}

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

// What head n asks for, within its range, and how it is compared.
template <class T> struct ProgramQuery {
  T* query; // [K]
  T strength;
  Search<T> search;
};

template <class T> ProgramQuery<T> query_of(const ProgramsOfSample<T>& s, int64_t head, Scratch<T>& scratch) {
  const ProgramLayout& l = s.layout;
  T* const query = scratch.take(l.key);
  const T* const raw = s.meta + head * l.key;
  if (l.tanh_keys && !l.direct_attention) map(query, l.key, [](Vec<T> x) { return tanh<T>(x); }, raw);
  else copy(query, raw, l.key);
  ProgramQuery<T> q{query, softplus<T>(broadcast(s.meta[l.heads * l.key + head]))[0], {}};
  q.search = {.slots = l.count,
              .heads = 1,
              .word = l.key,
              .memory = s.keys + head * l.count * l.key,
              .memory_row = l.key,
              .keys = query,
              .strengths = nullptr,
              .key_mask = nullptr,
              .slot_mask = nullptr,
              .similarity = s.similarity};
  return q;
}

template <class T> void attend(const ProgramsOfSample<T>& s) {
  const ProgramLayout& l = s.layout;
  for (int64_t head = 0; head < l.heads; ++head) {
    Scratch<T> scratch{s.scratch};
    ProgramQuery<T> q = query_of(s, head, scratch);
    T* const attention = s.attention + head * l.count;
    if (l.direct_attention) {
      map(attention, l.count, [&](Vec<T> x) { return q.strength * x; }, q.query);
      softmax(attention, 1, l.count);
    } else {
      q.search.strengths = &q.strength;
      content_addressing<T>(
          {.search = q.search, .weights = attention, .weights_row = l.count, .scratch = scratch.next});
    }
  }
}

// interface = the mixture of `outputs` [P,S], what every program makes of the controller.
template <class T> void mix_programs(const ProgramsOfSample<T>& s, const T* outputs, T* interface) {
  const ProgramLayout& l = s.layout;
  Scratch<T> scratch{s.scratch};
  T* const mixed = scratch.take(l.size);
  int64_t column = 0;
  for (int64_t head = 0; head < l.heads; column += l.widths[head++])
    for (int64_t p = 0; p < l.count; ++p) {
      const T share = s.attention[head * l.count + p];
      const T* const made = outputs + p * l.size + column;
      T* const part = mixed + column;
      if (p == 0) map(part, l.widths[head], [&](Vec<T> y) { return share * y; }, made);
      else map(part, l.widths[head], [&](Vec<T> total, Vec<T> y) { return total + share * y; }, part, made);
    }
  for (int64_t i = 0; i < l.run_count; interface += l.runs[i++].width)
    copy(interface, mixed + l.runs[i].column, l.runs[i].width);
}

// columns = an interface vector, or a gradient of it, in the order of the programs.
template <class T> void by_column(const ProgramLayout& l, const T* interface, T* columns) {
  for (int64_t i = 0; i < l.run_count; interface += l.runs[i++].width)
    copy(columns + l.runs[i].column, interface, l.runs[i].width);
}

// Of one head: `pulled` [P,H], the gradient of the controller through each program alone, and `grad`, that of the
// head's part. Adds to the gradients of the controller and the keys, gives those of the meta network's numbers.
template <class T>
void attend_backward(const ProgramsOfSample<T>& s, int64_t head, const T* biases, const T* controller, const T* pulled,
                     const T* grad, T* grad_controller, T* grad_meta, T* grad_keys) {
  const ProgramLayout& l = s.layout;
  Scratch<T> scratch{s.scratch};
  ProgramQuery<T> q = query_of(s, head, scratch);
  T* const grad_attention = scratch.take(l.count);
  const T* const attention = s.attention + head * l.count;
  for (int64_t p = 0; p < l.count; ++p) {
    const T* const pull = pulled + p * l.hidden;
    grad_attention[p] = inner(controller, pull, l.hidden) + inner(biases + p * l.size, grad, l.widths[head]);
    map(grad_controller, l.hidden, [&](Vec<T> total, Vec<T> x) { return total + attention[p] * x; }, grad_controller,
        pull);
  }
  T* const grad_query = grad_meta + head * l.key;
  T grad_strength = 0;
  if (l.direct_attention) {
    softmax_backward(attention, grad_attention, l.count);
    grad_strength = inner(static_cast<const T*>(grad_attention), static_cast<const T*>(q.query), l.count);
    map(grad_query, l.key, [&](Vec<T> x) { return q.strength * x; }, grad_attention);
  } else {
    q.search.strengths = &q.strength;
    content_addressing_backward<T>({.search = q.search,
                                    .weights = attention,
                                    .grad_weights = grad_attention,
                                    .weights_row = l.count,
                                    .grad_memory = grad_keys + head * l.count * l.key,
                                    .grad_memory_row = l.key,
                                    .accumulate = true,
                                    .grad_keys = grad_query,
                                    .grad_strengths = &grad_strength,
                                    .grad_key_mask = nullptr,
                                    .scratch = scratch.next});
    if (l.tanh_keys) map(grad_query, l.key, [](Vec<T> x, Vec<T> y) { return x * (T(1) - y * y); }, grad_query, q.query);
  }
  T& raw = grad_meta[l.heads * l.key + head];
  raw = grad_strength * softplus_slope<T>(broadcast(s.meta[l.heads * l.key + head]))[0];
}

} // namespace fastmem::FASTMEM_ISA
#endif
