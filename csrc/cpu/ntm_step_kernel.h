// One memory step of an NTM for one sample: the raw numbers of all heads and the state in, reads and the new state out.
//
//   content = content_addressing(M, key, strength)
//   weights = location_addressing(content, weights of the step before, gate, shift, sharpness)
//   a read head: reads = weighted_read(M, weights)          a write head: M = memory_write(M, weights, erase, values)
//
// Heads act in the order of their list, each complete before the next begins. Heads between two writes see the same
// memory and form a run: they are looked up together, and the write head that ends the run is one of them. Joint writes
// make the whole list one run, whose writes come together at its end.
#pragma once

#include "content_addressing_kernel.h"
#include "location_addressing_kernel.h"
#include "memory_write_kernel.h"
#include "weighted_read_kernel.h"

namespace fastmem {

template <class T> struct NtmVariant {
  bool reversed_shift;
  Sharpening<T> form;
  T clip; // interface within +-clip
  Similarity<T> similarity;
};

struct NtmLayout {
  int64_t slots, word, reach, heads; // shifts of -reach to reach
  const char* kinds;                 // [A], 'r' or 'w'
  bool joint_writes;

  bool writes(int64_t head) const { return kinds[head] == 'w'; }
  int64_t write_heads() const {
    int64_t count = 0;
    for (int64_t h = 0; h < heads; ++h) count += writes(h);
    return count;
  }
  int64_t taps() const { return 2 * reach + 1; }
  // Key, strength, gate, shift and sharpness of each head; erase and values of those that write.
  int64_t interface() const { return heads * (word + 3 + taps()) + write_heads() * 2 * word; }
  // One past the last head of the run that begins at `first`.
  int64_t run_end(int64_t first) const {
    if (joint_writes) return heads;
    int64_t head = first;
    while (head < heads && !writes(head)) ++head;
    return head < heads ? head + 1 : heads;
  }
  // Runs that end with a write.
  int64_t write_runs() const {
    const int64_t writers = write_heads();
    return joint_writes && writers > 1 ? 1 : writers;
  }
  // Memories that runs leave for a later run.
  int64_t kept_memories() const {
    int64_t runs = 0;
    for (int64_t head = 0; head < heads; head = run_end(head)) ++runs;
    return runs > 0 ? runs - 1 : 0;
  }
  // The content weights of each head, and the memory that each run but the first begins with.
  int64_t content() const { return heads * slots; }
  int64_t tape() const { return content() + kept_memories() * slots * word; }
};

template <class T> struct NtmStep {
  NtmLayout layout;
  NtmVariant<T> variant;
  const T *interface, *memory, *weights; // [S] [N,W] [A,N]
  T *new_memory, *new_weights, *reads;   // [N,W] [A,N] [R,W]; the first two may be the old ones
  T *content, *kept;                     // the two parts of the tape; kept may be null
  T* scratch;                            // ntm_step_scratch
  // What the heads that do not act would give is left alone: weights, reads and content; without writing, new_memory.
  bool writes = true, reads_from = true;
};

template <class T> struct NtmStepBackward {
  NtmLayout layout;
  NtmVariant<T> variant;
  const T *interface, *memory, *weights, *new_weights;
  const T *content, *kept;                                  // the two parts of the tape
  const T *grad_new_memory, *grad_new_weights, *grad_reads; // absent: null
  T *grad_interface, *grad_memory, *grad_weights; // [S] [N,W] [A,N]; the last two may be those of the new ones
  T* scratch;                                     // ntm_step_backward_scratch
  bool writes = true, reads_from = true;
};

inline int64_t ntm_fields_scratch(const NtmLayout& l) {
  return in_lines(l.heads * l.word) + 3 * in_lines(l.heads) + in_lines(l.heads * l.taps()) +
         2 * in_lines(l.write_heads() * l.word);
}

inline int64_t ntm_step_scratch(const NtmLayout& l) {
  return ntm_fields_scratch(l) + in_lines(l.write_heads() * l.slots) + in_lines(location_scratch(l.slots, l.reach)) +
         in_lines(addressing_scratch(l.heads, l.word));
}

inline int64_t ntm_step_backward_scratch(const NtmLayout& l) {
  return 2 * ntm_fields_scratch(l) + 2 * in_lines(l.heads * l.slots) + 2 * in_lines(l.write_heads() * l.slots) +
         in_lines(location_scratch(l.slots, l.reach)) + in_lines(memory_write_scratch(l.word, l.write_heads())) +
         in_lines(addressing_scratch(l.heads, l.word));
}

FASTMEM_EACH_ISA(template <class T> void ntm_step(const NtmStep<T>& s);
                 template <class T> void ntm_step_backward(const NtmStepBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

// The fields of all heads, each field together, so that a run of heads is looked up at once.
template <class T> struct NtmFields {
  T *keys, *strengths, *gates, *shifts, *sharpness, *erase, *values; // [A,W] [A] [A] [A,2S+1] [A] [Q,W] [Q,W]
};

template <class T> NtmFields<T> take_fields(const NtmLayout& l, Scratch<T>& scratch) {
  NtmFields<T> f;
  f.keys = scratch.take(l.heads * l.word);
  f.strengths = scratch.take(l.heads);
  f.gates = scratch.take(l.heads);
  f.shifts = scratch.take(l.heads * l.taps());
  f.sharpness = scratch.take(l.heads);
  f.erase = scratch.take(l.write_heads() * l.word);
  f.values = scratch.take(l.write_heads() * l.word);
  return f;
}

enum class Range { any, positive, unit, simplex, above_one };

enum class Of { all, writes };

// visit(range, part of the interface vector, field, count) for all fields of all heads, in the order of the vector; or
// for those alone that a write takes besides its weights.
template <class T, class Raw, class Visit>
void for_each_field(const NtmLayout& l, Raw* interface, const NtmFields<T>& f, Of of, const Visit& visit) {
  const auto next = [&](Range range, T* field, int64_t count, bool written = false) {
    if (written || of == Of::all) visit(range, interface, field, count);
    interface += count;
  };
  int64_t writer = 0;
  for (int64_t h = 0; h < l.heads; ++h) {
    next(Range::any, f.keys + h * l.word, l.word);
    next(Range::positive, f.strengths + h, 1);
    next(Range::unit, f.gates + h, 1);
    next(Range::simplex, f.shifts + h * l.taps(), l.taps());
    next(Range::above_one, f.sharpness + h, 1);
    if (!l.writes(h)) continue;
    next(Range::unit, f.erase + writer * l.word, l.word, true);
    next(Range::any, f.values + writer * l.word, l.word, true);
    ++writer;
  }
}

template <class T>
NtmFields<T> constrain(const T* interface, const NtmLayout& l, T clip, Scratch<T>& scratch, Of of = Of::all) {
  const NtmFields<T> fields = take_fields(l, scratch);
  for_each_field(l, interface, fields, of, [&](Range range, const T* raw, T* field, int64_t count) {
    map(field, count, [&](Vec<T> x) {
      x = clamped<T>(x, clip);
      switch (range) {
        case Range::positive: return softplus<T>(x);
        case Range::unit: return sigmoid<T>(x);
        case Range::above_one: return T(1) + softplus<T>(x);
        default: return x;
      }
    }, raw);
  });
  if (of == Of::all) softmax(fields.shifts, l.heads, l.taps());
  return fields;
}

// The chain rule of `constrain`: from the gradients of the fields to that of the interface vector.
template <class T>
void constrain_backward(const T* interface, const NtmLayout& l, T clip, const NtmFields<T>& fields,
                        const NtmFields<T>& grads, T* grad_interface) {
  // Every field has the same place in `fields` as its gradient in `grads`: both come from take_fields.
  for_each_field(l, grad_interface, grads, Of::all, [&](Range range, T* out, T* grad, int64_t count) {
    const T* const raw = interface + (out - grad_interface);
    if (range == Range::simplex) softmax_backward(fields.keys + (grad - grads.keys), grad, count);
    map(out, count, [&](Vec<T> g, Vec<T> x) {
      const Vec<T> inside = clamped<T>(x, clip);
      switch (range) {
        case Range::positive:
        case Range::above_one: g *= softplus_slope<T>(inside); break;
        case Range::unit: g *= sigmoid_slope<T>(inside); break;
        default: break;
      }
      return through_clamp<T>(g, x, clip);
    }, grad, raw);
  });
}

template <class T>
Search<T> search(const NtmLayout& l, const NtmVariant<T>& variant, const T* memory, const NtmFields<T>& f,
                 int64_t first, int64_t last) {
  return {.slots = l.slots,
          .heads = last - first,
          .word = l.word,
          .memory = memory,
          .memory_row = l.word,
          .keys = f.keys + first * l.word,
          .strengths = f.strengths + first,
          .key_mask = nullptr,
          .slot_mask = nullptr,
          .similarity = variant.similarity};
}

// The weights of the write heads of a run, one after the other, and how many there are.
template <class T>
int64_t gather_writes(const NtmLayout& l, const T* weights, int64_t first, int64_t last, T* gathered) {
  int64_t count = 0;
  for (int64_t h = first; h < last; ++h)
    if (l.writes(h)) copy(gathered + l.slots * count++, weights + h * l.slots, l.slots);
  return count;
}

// What the write heads of a run do to the memory, and how many they are; `writer`: how many there are in earlier runs.
template <class T>
int64_t write_run(const NtmLayout& l, const NtmFields<T>& f, const T* weights, int64_t first, int64_t last,
                  int64_t writer, const T* memory, T* new_memory, T* gathered) {
  const int64_t writes = gather_writes(l, weights, first, last, gathered);
  if (writes > 0)
    memory_write<T>({.slots = l.slots,
                     .word = l.word,
                     .write_heads = writes,
                     .memory = memory,
                     .memory_row = l.word,
                     .write_weights = gathered,
                     .erase = f.erase + writer * l.word,
                     .values = f.values + writer * l.word,
                     .retention = nullptr,
                     .new_memory = new_memory,
                     .new_memory_row = l.word});
  return writes;
}

template <class Step> bool acts(const Step& s, int64_t head) { return s.layout.writes(head) ? s.writes : s.reads_from; }

template <class T> void ntm_step(const NtmStep<T>& s) {
  const NtmLayout& l = s.layout;
  const int64_t n = l.slots, words = n * l.word;
  Scratch<T> scratch{s.scratch};
  const NtmFields<T> f = constrain(s.interface, l, s.variant.clip, scratch);
  T* const write_weights = scratch.take(l.write_heads() * n);
  T* const location = scratch.take(location_scratch(n, l.reach));
  T *const content = s.content, *kept = s.kept, *reads = s.reads;
  const T* memory = s.memory;
  // The heads [begin, end) of a run, which all act.
  const auto act = [&](int64_t begin, int64_t end) {
    content_addressing<T>({.search = search<T>(l, s.variant, memory, f, begin, end),
                           .weights = content + begin * n,
                           .weights_row = n,
                           .scratch = scratch.next});
    for (int64_t h = begin; h < end; ++h) {
      location_addressing<T>({.slots = n,
                              .reach = l.reach,
                              .content = content + h * n,
                              .previous = s.weights + h * n,
                              .shift = f.shifts + h * l.taps(),
                              .gate = f.gates[h],
                              .sharpness = f.sharpness[h],
                              .reversed = s.variant.reversed_shift,
                              .form = s.variant.form,
                              .weights = s.new_weights + h * n,
                              .scratch = location});
      if (l.writes(h)) continue;
      weighted_read<T>({.slots = n,
                        .word = l.word,
                        .heads = 1,
                        .memory = memory,
                        .memory_row = l.word,
                        .weights = s.new_weights + h * n,
                        .reads = reads});
      reads += l.word;
    }
  };
  int64_t writer = 0;
  for (int64_t first = 0, last; first < l.heads; first = last) {
    last = l.run_end(first);
    if (first > 0 && kept) { // for the backward
      copy(kept, memory, words);
      kept += words;
    }
    for (int64_t begin = first, end; begin < last; begin = end) {
      end = begin + 1;
      while (end < last && acts(s, end) == acts(s, begin)) ++end;
      if (acts(s, begin)) act(begin, end);
    }
    const int64_t writes =
        s.writes ? write_run(l, f, s.new_weights, first, last, writer, memory, s.new_memory, write_weights) : 0;
    if (writes > 0) memory = s.new_memory;
    writer += writes;
  }
  if (s.writes && memory == s.memory && s.new_memory != s.memory) copy(s.new_memory, s.memory, words);
}

template <class T> void ntm_step_backward(const NtmStepBackward<T>& s) {
  const NtmLayout& l = s.layout;
  const int64_t n = l.slots, words = n * l.word;
  Scratch<T> scratch{s.scratch};
  const NtmFields<T> f = constrain(s.interface, l, s.variant.clip, scratch), g = take_fields(l, scratch);
  T *const grad_weights = scratch.take(l.heads * n), *const grad_content = scratch.take(l.heads * n);
  T *const write_weights = scratch.take(l.write_heads() * n), *const grad_write = scratch.take(l.write_heads() * n);
  T* const location = scratch.take(location_scratch(n, l.reach));
  T* const write_space = scratch.take(memory_write_scratch(l.word, l.write_heads()));
  const auto copy_or_clear = [](T* to, const T* from, int64_t count) {
    if (!from) clear(to, count);
    else if (from != to) copy(to, from, count);
  };
  // The gradient of the memory as it is at each point on the way back.
  T* const grad_memory = s.grad_memory;
  copy_or_clear(grad_memory, s.grad_new_memory, words);
  copy_or_clear(grad_weights, s.grad_new_weights, l.heads * n);
  if (!s.writes || !s.reads_from) clear(g.keys, ntm_fields_scratch(l)); // all fields, of heads that do not act too

  const T *const content = s.content, *memory;
  int64_t write, reader = l.heads - l.write_heads();
  // The heads [begin, end) of a run, which all act; `write`: how many heads of the run that write come before `end`.
  const auto act_backward = [&](int64_t begin, int64_t end) {
    for (int64_t h = end - 1; h >= begin; --h) {
      T* const grad = grad_weights + h * n;
      if (l.writes(h)) {
        add(grad, grad_write + --write * n, n);
      } else if (--reader; s.grad_reads) {
        // grad_content is free until this head's own gradient fills it
        weighted_read_backward<T>({.slots = n,
                                   .word = l.word,
                                   .heads = 1,
                                   .memory = memory,
                                   .memory_row = l.word,
                                   .weights = s.new_weights + h * n,
                                   .grad_reads = s.grad_reads + reader * l.word,
                                   .grad_memory = grad_memory,
                                   .grad_weights = grad_content + h * n,
                                   .grad_memory_row = l.word,
                                   .accumulate = true});
        add(grad, grad_content + h * n, n);
      }
      location_addressing_backward<T>({.slots = n,
                                       .reach = l.reach,
                                       .content = content + h * n,
                                       .previous = s.weights + h * n,
                                       .shift = f.shifts + h * l.taps(),
                                       .gate = f.gates[h],
                                       .sharpness = f.sharpness[h],
                                       .reversed = s.variant.reversed_shift,
                                       .form = s.variant.form,
                                       .weights = s.new_weights + h * n,
                                       .grad_weights = grad,
                                       .grad_content = grad_content + h * n,
                                       .grad_previous = s.grad_weights + h * n,
                                       .grad_gate = g.gates + h,
                                       .grad_shift = g.shifts + h * l.taps(),
                                       .grad_sharpness = g.sharpness + h,
                                       .scratch = location});
    }
    content_addressing_backward<T>({.search = search<T>(l, s.variant, memory, f, begin, end),
                                    .weights = content + begin * n,
                                    .grad_weights = grad_content + begin * n,
                                    .weights_row = n,
                                    .grad_memory = grad_memory,
                                    .grad_memory_row = l.word,
                                    .accumulate = true,
                                    .grad_keys = g.keys + begin * l.word,
                                    .grad_strengths = g.strengths + begin,
                                    .grad_key_mask = nullptr,
                                    .scratch = scratch.next});
  };
  int64_t writer = l.write_heads(), kept = l.kept_memories();
  for (int64_t first, last = l.heads; last > 0; last = first) {
    first = last - 1; // back to the head after the write before
    while (first > 0 && (l.joint_writes || !l.writes(first - 1))) --first;
    // Without writing all runs see the memory before the step.
    memory = first > 0 && s.writes ? s.kept + --kept * words : s.memory;
    write = s.writes ? gather_writes(l, s.new_weights, first, last, write_weights) : 0;
    writer -= write;
    if (write > 0)
      memory_write_backward<T>({.slots = n,
                                .word = l.word,
                                .write_heads = write,
                                .memory = memory,
                                .memory_row = l.word,
                                .write_weights = write_weights,
                                .erase = f.erase + writer * l.word,
                                .values = f.values + writer * l.word,
                                .retention = nullptr,
                                .grad_new_memory = grad_memory,
                                .grad_new_memory_row = l.word,
                                .grad_memory = grad_memory,
                                .grad_memory_row = l.word,
                                .grad_write_weights = grad_write,
                                .grad_erase = g.erase + writer * l.word,
                                .grad_values = g.values + writer * l.word,
                                .grad_retention = nullptr,
                                .scratch = write_space});
    for (int64_t end = last, begin; end > first; end = begin) {
      begin = end - 1;
      while (begin > first && acts(s, begin - 1) == acts(s, end - 1)) --begin;
      if (acts(s, end - 1)) act_backward(begin, end);
      else copy(s.grad_weights + begin * n, static_cast<const T*>(grad_weights) + begin * n, (end - begin) * n);
    }
  }
  constrain_backward(s.interface, l, s.variant.clip, f, g, s.grad_interface);
}

template void ntm_step(const NtmStep<float>&);
template void ntm_step(const NtmStep<double>&);
template void ntm_step_backward(const NtmStepBackward<float>&);
template void ntm_step_backward(const NtmStepBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
