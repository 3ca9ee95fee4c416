// One memory step of a DNC for one sample: interface vector and state in, reads and the new state out.
//
//   u, retention = usage_update(u, w, r, free gates)          a = allocation(u, allocation gates * write gates)
//   w = write gate (allocation gate a + (1 - allocation gate) content(M, write keys))
//   M = memory_write(M, w, erase, values[, retention])        L, p, f, b = temporal_linkage(L, p, w, r)
//   r = read modes . (b, content(M, read keys), f)            reads = weighted_read(M, r)
//
// Every equation is in the header of its op; here is their order, the ranges of the interface and the chain rule.
#pragma once

#include "allocation_kernel.h"
#include "content_addressing_kernel.h"
#include "memory_write_kernel.h"
#include "sharpen_kernel.h"
#include "temporal_linkage_kernel.h"
#include "usage_update_kernel.h"
#include "weighted_read_kernel.h"

namespace fastmem {

inline constexpr double kLinkSharpeningEps = 1e-6;

template <class T> struct DncVariant {
  bool masked, deallocates, sharpened; // key masks; erasing what is freed; sharpness of forward and backward
  bool oneplus;                        // strengths are 1 + softplus, else softplus
  bool detach_usage_write;             // no gradient from the usage into the last write weights
  T mask_floor, clip;                  // masks in [floor, 1]; interface within +-clip
  Similarity<T> similarity;
  double allocation_eps;
};

// Numbers in each field of the interface vector, in its order.
struct DncLayout {
  int64_t slots, word, read_heads, write_heads;
  bool masked, sharpened;

  int64_t modes() const { return 2 * write_heads + 1; }
  int64_t gates() const {
    return read_heads + 2 * write_heads;
  } // free, allocation and write gates, one after the other
  int64_t interface() const {
    return read_heads * (word + 2 + modes()) + write_heads * (3 * word + 3) +
           (masked ? (read_heads + write_heads) * word : 0) + (sharpened ? 2 * read_heads : 0);
  }
  // Per slot: retention, allocation and content of each write head, forward and backward, the same sharpened, content.
  int64_t tape() const {
    return slots * (1 + 2 * write_heads + (sharpened ? 4 : 2) * write_heads * read_heads + read_heads);
  }
};

// The fields of an interface vector: as given, within their ranges, or their gradients.
template <class T> struct DncFields {
  T *read_keys, *read_strengths, *write_keys, *write_strengths, *erase, *values; // [R,W] [R] [Q,W] [Q] [Q,W] [Q,W]
  T *free_gates, *allocation_gates, *write_gates, *read_modes;                   // [R] [Q] [Q] [R,2Q+1]
  T *write_masks, *read_masks, *forward_sharpness, *backward_sharpness;          // [Q,W] [R,W] [R] [R]; or null
};

// What the backward takes from the step. Unsharpened it can do without forward and backward, which are then null there.
template <class T> struct DncTape {
  T *retention, *allocated, *found, *forward, *backward; // [N] [Q,N] [Q,N] [Q,R,N] [Q,R,N]
  T *sharp_forward, *sharp_backward, *content;           // [Q,R,N] [Q,R,N] [R,N]; unsharpened: forward and backward
};

// Always inline: these are in the units of every instruction set, and a linker could keep the wide copy.
#define FASTMEM_EVERYWHERE inline __attribute__((always_inline))

// Hands out consecutive parts of a vector.
template <class T> struct Parts {
  T* next;
  FASTMEM_EVERYWHERE T* take(int64_t count) {
    T* const taken = next;
    next += count;
    return taken;
  }
};

template <class T> FASTMEM_EVERYWHERE DncTape<T> tape_of(T* tape, const DncLayout& l) {
  const int64_t n = l.slots, writes = l.write_heads * n, ways = l.write_heads * l.read_heads * n;
  Parts<T> parts{tape};
  DncTape<T> t{};
  t.retention = parts.take(n);
  t.allocated = parts.take(writes);
  t.found = parts.take(writes);
  t.forward = parts.take(ways);
  t.backward = parts.take(ways);
  t.sharp_forward = l.sharpened ? parts.take(ways) : t.forward;
  t.sharp_backward = l.sharpened ? parts.take(ways) : t.backward;
  t.content = parts.take(l.read_heads * n);
  return t;
}

template <class T> struct DncState {
  T* memory;                                           // [N,W]
  T* usage;                                            // [N]
  T *precedence, *link, *write_weights, *read_weights; // [Q,N] [Q,N,N] [Q,N] [R,N]
};

template <class T> struct DncStep {
  DncLayout layout;
  DncVariant<T> variant;
  const T* interface; // [S]
  DncState<const T> state;
  DncState<T> new_state; // each may be its part of `state`
  T* reads;              // [R,W]
  DncTape<T> tape;
  T* scratch; // dnc_step_scratch
  // What the step does not do leaves its part of new_state and tape alone. Without writing, new_state.link is the old
  // link.
  bool writes = true, reads_from = true;
};

template <class T> struct DncStepBackward {
  DncLayout layout;
  DncVariant<T> variant;
  const T* interface;
  DncState<const T> state, new_state; // new_state.precedence and link are not read
  DncTape<const T> tape;
  DncState<const T> grad_new_state;       // absent: null
  const T* grad_reads;                    // [R,W]; absent: null
  T* grad_interface;                      // [S]
  DncState<T> grad_state;                 // an unwanted memory or link: null. These two may be those of grad_new_state
  T* scratch;                             // dnc_step_backward_scratch
  const LinkUpdate<T>* pending = nullptr; // what state.link has yet to go through before this step, all write heads
  int64_t pending_count = 0;
  bool writes = true, reads_from = true;
};

inline int64_t dnc_step_scratch(const DncLayout& l) {
  const int64_t heads = l.read_heads > l.write_heads ? l.read_heads : l.write_heads;
  return in_lines(l.interface()) + in_lines(l.write_heads) + linkage_scratch(l.slots, l.read_heads) +
         in_lines(allocation_scratch(l.slots)) + in_lines(addressing_scratch(heads, l.word));
}

inline int64_t dnc_step_backward_scratch(const DncLayout& l, int64_t pending_count = 0) {
  const int64_t heads = l.read_heads > l.write_heads ? l.read_heads : l.write_heads;
  const int64_t n = l.slots, reads = in_lines(l.read_heads * n), writes = in_lines(l.write_heads * n);
  return 2 * in_lines(l.interface()) + 2 * in_lines(l.write_heads) + in_lines(n * l.word) + 3 * reads +
         2 * in_lines(l.write_heads * l.read_heads * n) + 4 * writes + 3 * in_lines(n) + in_lines(2 * l.read_heads) +
         in_lines((kBackwardRows + 1) * n) + linkage_backward_scratch(n, l.read_heads, pending_count) +
         in_lines(usage_update_scratch(l.write_heads, l.read_heads)) +
         in_lines(memory_write_scratch(l.word, l.write_heads)) +
         in_lines(allocation_backward_scratch(n, l.write_heads)) + in_lines(addressing_scratch(heads, l.word));
}

FASTMEM_EACH_ISA(template <class T> void dnc_step(const DncStep<T>& s);
                 template <class T> void dnc_step_backward(const DncStepBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

template <class T> DncFields<T> fields_of(T* vector, const DncLayout& l) {
  Parts<T> parts{vector};
  const auto take = [&](int64_t count) { return parts.take(count); };
  const int64_t r = l.read_heads, q = l.write_heads, word = l.word;
  DncFields<T> f{};
  f.read_keys = take(r * word);
  f.read_strengths = take(r);
  f.write_keys = take(q * word);
  f.write_strengths = take(q);
  f.erase = take(q * word);
  f.values = take(q * word);
  f.free_gates = take(r);
  f.allocation_gates = take(q);
  f.write_gates = take(q);
  f.read_modes = take(r * l.modes());
  if (l.masked) {
    f.write_masks = take(q * word);
    f.read_masks = take(r * word);
  }
  if (l.sharpened) {
    f.forward_sharpness = take(r);
    f.backward_sharpness = take(r);
  }
  return f;
}

// Takes the interface into its ranges, from `raw` into `fields`.
template <class T> DncFields<T> constrain(const T* raw, T* fields, const DncLayout& l, const DncVariant<T>& variant) {
  map(fields, l.interface(), [&](Vec<T> x) { return clamped<T>(x, variant.clip); }, raw);
  const DncFields<T> f = fields_of(fields, l);
  const auto in_place = [](T* field, int64_t count, const auto& range) { map(field, count, range, field); };
  const auto strength = [&](Vec<T> x) { return softplus<T>(x) + (variant.oneplus ? T(1) : T(0)); };
  const auto gate = [](Vec<T> x) { return sigmoid<T>(x); };
  in_place(f.read_strengths, l.read_heads, strength);
  in_place(f.write_strengths, l.write_heads, strength);
  in_place(f.erase, l.write_heads * l.word, gate);
  in_place(f.free_gates, l.gates(), gate);
  softmax(f.read_modes, l.read_heads, l.modes());
  if (l.masked) {
    const auto mask = [&](Vec<T> x) { return sigmoid<T>(x) * (T(1) - variant.mask_floor) + variant.mask_floor; };
    in_place(f.write_masks, l.write_heads * l.word, mask);
    in_place(f.read_masks, l.read_heads * l.word, mask);
  }
  if (l.sharpened) {
    const auto sharpness = [](Vec<T> x) { return T(1) + softplus<T>(x); };
    in_place(f.forward_sharpness, l.read_heads, sharpness);
    in_place(f.backward_sharpness, l.read_heads, sharpness);
  }
  return f;
}

// Of the fields that `constrain` makes of `raw`, those that a write takes besides its weights.
template <class T>
void constrain_written(const DncFields<T>& raw, const DncFields<T>& fields, const DncLayout& l,
                       const DncVariant<T>& variant) {
  const int64_t count = l.write_heads * l.word;
  map(fields.erase, count, [&](Vec<T> x) { return sigmoid<T>(clamped<T>(x, variant.clip)); }, raw.erase);
  map(fields.values, count, [&](Vec<T> x) { return clamped<T>(x, variant.clip); }, raw.values);
}

// The chain rule of `constrain`: `grads` holds the gradients of the fields and becomes that of the interface vector.
// For the read modes it holds the products of mode and gradient.
template <class T>
void constrain_backward(const T* raw, const DncFields<T>& fields, T* grads, const DncLayout& l,
                        const DncVariant<T>& variant) {
  const DncFields<T> g = fields_of(grads, l);
  const auto position = [&](const T* field) { return raw + (field - g.read_keys); };
  const auto through_softplus = [&](T* field, int64_t count) {
    map(field, count, [](Vec<T> grad, Vec<T> x) { return grad * softplus_slope<T>(x); }, field, position(field));
  };
  const auto through_sigmoid = [&](T* field, int64_t count, T scale) {
    map(field, count, [&](Vec<T> grad, Vec<T> x) { return grad * (scale * sigmoid_slope<T>(x)); }, field,
        position(field));
  };
  through_softplus(g.read_strengths, l.read_heads);
  through_softplus(g.write_strengths, l.write_heads);
  through_sigmoid(g.erase, l.write_heads * l.word, 1);
  through_sigmoid(g.free_gates, l.gates(), 1);
  for (int64_t r = 0; r < l.read_heads; ++r) {
    const T* const modes = fields.read_modes + r * l.modes();
    T* const along = g.read_modes + r * l.modes();
    T total = 0;
    for (int64_t mode = 0; mode < l.modes(); ++mode) total += along[mode];
    for (int64_t mode = 0; mode < l.modes(); ++mode) along[mode] -= modes[mode] * total;
  }
  if (l.masked) {
    through_sigmoid(g.write_masks, l.write_heads * l.word, 1 - variant.mask_floor);
    through_sigmoid(g.read_masks, l.read_heads * l.word, 1 - variant.mask_floor);
  }
  if (l.sharpened) {
    through_softplus(g.forward_sharpness, l.read_heads);
    through_softplus(g.backward_sharpness, l.read_heads);
  }
  // What was clipped has no slope. Inside the range it is the given number, so the slopes above were taken there.
  map(grads, l.interface(), [&](Vec<T> grad, Vec<T> x) { return through_clamp<T>(grad, x, variant.clip); }, grads, raw);
}

template <class T>
Search<T> search(const DncLayout& l, const DncVariant<T>& variant, const T* memory, int64_t heads, const T* keys,
                 const T* strengths, const T* masks) {
  return {.slots = l.slots,
          .heads = heads,
          .word = l.word,
          .memory = memory,
          .memory_row = l.word,
          .keys = keys,
          .strengths = strengths,
          .key_mask = masks,
          .slot_mask = nullptr,
          .similarity = variant.similarity};
}

template <class T> void write_to(const DncStep<T>& s, const DncFields<T>& f, Scratch<T> scratch) {
  const DncLayout& l = s.layout;
  const int64_t n = l.slots, writers = l.write_heads;
  const DncState<const T>& old = s.state;
  const DncState<T>& now = s.new_state;
  const DncTape<T>& tape = s.tape;
  T* const gates = scratch.take(writers);
  usage_update<T>({.slots = n,
                   .write_heads = writers,
                   .read_heads = l.read_heads,
                   .usage = old.usage,
                   .write_weights = old.write_weights,
                   .read_weights = old.read_weights,
                   .free_gates = f.free_gates,
                   .new_usage = now.usage,
                   .retention = tape.retention});
  for (int64_t q = 0; q < writers; ++q) gates[q] = f.allocation_gates[q] * f.write_gates[q];
  allocation<T>({.slots = n,
                 .write_heads = writers,
                 .usage = now.usage,
                 .gates = gates,
                 .eps = s.variant.allocation_eps,
                 .weights = tape.allocated,
                 .scratch = scratch.take(allocation_scratch(n))});
  content_addressing<T>(
      {.search = search<T>(l, s.variant, old.memory, writers, f.write_keys, f.write_strengths, f.write_masks),
       .weights = tape.found,
       .weights_row = n,
       .scratch = scratch.next});
  for (int64_t q = 0; q < writers; ++q) {
    const T gate = f.write_gates[q], allocated = f.allocation_gates[q];
    map(now.write_weights + q * n, n, [&](Vec<T> a, Vec<T> c) {
      return gate * (allocated * a + (T(1) - allocated) * c);
    }, tape.allocated + q * n, tape.found + q * n);
  }
  memory_write<T>({.slots = n,
                   .word = l.word,
                   .write_heads = writers,
                   .memory = old.memory,
                   .memory_row = l.word,
                   .write_weights = now.write_weights,
                   .erase = f.erase,
                   .values = f.values,
                   .retention = s.variant.deallocates ? tape.retention : nullptr,
                   .new_memory = now.memory,
                   .new_memory_row = l.word});
}

template <class T> void read_from(const DncStep<T>& s, const DncFields<T>& f, const T* memory, Scratch<T> scratch) {
  const DncLayout& l = s.layout;
  const int64_t n = l.slots, heads = l.read_heads, writers = l.write_heads;
  const DncTape<T>& tape = s.tape;
  for (int64_t way = 0; l.sharpened && way < writers * heads; ++way) {
    const int64_t r = way % heads;
    const Sharpening<T> form{.in_powers = false, .eps = T(kLinkSharpeningEps)};
    sharpen<T>({n, tape.forward + way * n, f.forward_sharpness[r], form, tape.sharp_forward + way * n});
    sharpen<T>({n, tape.backward + way * n, f.backward_sharpness[r], form, tape.sharp_backward + way * n});
  }
  content_addressing<T>({.search = search<T>(l, s.variant, memory, heads, f.read_keys, f.read_strengths, f.read_masks),
                         .weights = tape.content,
                         .weights_row = n,
                         .scratch = scratch.next});
  for (int64_t r = 0; r < heads; ++r) {
    const T* const modes = f.read_modes + r * l.modes();
    T* const weights = s.new_state.read_weights + r * n;
    map(weights, n, [&](Vec<T> c) { return modes[writers] * c; }, tape.content + r * n);
    for (int64_t q = 0; q < writers; ++q)
      map(weights, n, [&](Vec<T> w, Vec<T> b, Vec<T> ahead) {
        return w + modes[q] * b + modes[writers + 1 + q] * ahead;
      }, weights, tape.sharp_backward + (q * heads + r) * n, tape.sharp_forward + (q * heads + r) * n);
  }
  weighted_read<T>({.slots = n,
                    .word = l.word,
                    .heads = heads,
                    .memory = memory,
                    .memory_row = l.word,
                    .weights = s.new_state.read_weights,
                    .reads = s.reads});
}

template <class T> void dnc_step(const DncStep<T>& s) {
  const DncLayout& l = s.layout;
  const int64_t n = l.slots, heads = l.read_heads;
  const DncState<const T>& old = s.state;
  const DncState<T>& now = s.new_state;
  Scratch<T> scratch{s.scratch};
  const DncFields<T> f = constrain(s.interface, scratch.take(l.interface()), l, s.variant);
  T* const panels = scratch.take(linkage_scratch(n, heads));
  if (s.writes) write_to(s, f, scratch);
  for (int64_t q = 0; q < l.write_heads; ++q) {
    const int64_t ways = q * heads * n;
    temporal_linkage<T>({.slots = n,
                         .read_heads = s.reads_from ? heads : 0,
                         .link = old.link + q * n * n,
                         .precedence = old.precedence + q * n,
                         .write_weights = now.write_weights + q * n,
                         .read_weights = old.read_weights,
                         .link_row = n,
                         .new_link = now.link + q * n * n,
                         .new_precedence = now.precedence + q * n,
                         .new_link_row = n,
                         .forward = s.tape.forward + ways,
                         .backward = s.tape.backward + ways,
                         .panels = panels,
                         .updates = s.writes});
  }
  if (s.reads_from) read_from(s, f, s.writes ? static_cast<const T*>(now.memory) : old.memory, scratch);
}

template <class T> void dnc_step_backward(const DncStepBackward<T>& s) {
  const DncLayout& l = s.layout;
  const int64_t n = l.slots, writers = l.write_heads, words = n * l.word;
  const int64_t heads = s.reads_from ? l.read_heads : 0; // that read in this step
  const DncState<const T>&old = s.state, &now = s.new_state, &upstream = s.grad_new_state;
  const DncState<T>& grad = s.grad_state;
  const DncTape<const T>& tape = s.tape;
  Scratch<T> scratch{s.scratch};
  const DncFields<T> f = constrain(s.interface, scratch.take(l.interface()), l, s.variant);
  T* const grads = scratch.zeros(l.interface());
  const DncFields<T> g = fields_of(grads, l);
  T *const gates = scratch.take(writers), *const grad_gates = scratch.take(writers);
  T* const spare_memory = scratch.take(words);
  T *const grad_read = scratch.take(heads * n), *const grad_content = scratch.take(heads * n);
  T* const grad_old_read = scratch.zeros(l.read_heads * n);
  T *const grad_forward = scratch.take(writers * heads * n), *const grad_backward = scratch.take(writers * heads * n);
  T *const grad_write = scratch.take(writers * n), *const grad_by_link = scratch.take(writers * n);
  T *const grad_allocated = scratch.take(writers * n), *const grad_found = scratch.take(writers * n);
  T *const grad_usage = scratch.take(n), *const grad_retention = scratch.take(n);
  T *const zeros = scratch.zeros(n), *const along = scratch.take(2 * heads);
  T* const link_rows = scratch.take((kBackwardRows + 1) * n);
  T* const panels = scratch.take(linkage_backward_scratch(n, heads, s.pending_count));
  T* const usage_scratch = scratch.take(usage_update_scratch(writers, l.read_heads));
  T* const write_scratch = scratch.take(memory_write_scratch(l.word, writers));
  T* const allocation_space = scratch.take(allocation_backward_scratch(n, writers));
  T* const addressing = scratch.take(0);

  // The gradient of M' adds up where that of M is to be.
  T* const grad_new_memory = grad.memory ? grad.memory : spare_memory;
  if (!upstream.memory) clear(grad_new_memory, words);
  else if (upstream.memory != grad_new_memory) copy(grad_new_memory, upstream.memory, words);

  // reads = weighted_read(M', r)
  if (heads > 0 && s.grad_reads) {
    weighted_read_backward<T>({.slots = n,
                               .word = l.word,
                               .heads = heads,
                               .memory = now.memory,
                               .memory_row = l.word,
                               .weights = now.read_weights,
                               .grad_reads = s.grad_reads,
                               .grad_memory = grad_new_memory,
                               .grad_weights = grad_read,
                               .grad_memory_row = l.word,
                               .accumulate = true});
  } else {
    clear(grad_read, heads * n);
  }
  add(heads > 0 ? grad_read : grad_old_read, upstream.read_weights, l.read_heads * n);

  // r = read modes . (b, c, f)
  for (int64_t r = 0; r < heads; ++r) {
    const T *const modes = f.read_modes + r * l.modes(), *const above = grad_read + r * n;
    T* const along_modes = g.read_modes + r * l.modes();
    const auto part = [&](int64_t mode, const T* way, T* grad_way) {
      map(grad_way, n, [&](Vec<T> x) { return modes[mode] * x; }, above);
      if (way) along_modes[mode] = inner(grad_way, way, n);
    };
    part(writers, tape.content + r * n, grad_content + r * n);
    for (int64_t q = 0; q < writers; ++q) {
      const int64_t way = (q * heads + r) * n;
      part(q, tape.sharp_backward ? tape.sharp_backward + way : nullptr, grad_backward + way);
      part(writers + 1 + q, tape.sharp_forward ? tape.sharp_forward + way : nullptr, grad_forward + way);
      if (!l.sharpened) continue;
      const Sharpening<T> form{.in_powers = false, .eps = T(kLinkSharpeningEps)};
      T sharper;
      sharpen_backward<T>({n, tape.forward + way, f.forward_sharpness[r], form, tape.sharp_forward + way,
                           grad_forward + way, grad_forward + way, &sharper});
      g.forward_sharpness[r] += sharper;
      sharpen_backward<T>({n, tape.backward + way, f.backward_sharpness[r], form, tape.sharp_backward + way,
                           grad_backward + way, grad_backward + way, &sharper});
      g.backward_sharpness[r] += sharper;
    }
  }
  if (heads > 0)
    content_addressing_backward<T>(
        {.search = search<T>(l, s.variant, now.memory, heads, f.read_keys, f.read_strengths, f.read_masks),
         .weights = tape.content,
         .grad_weights = grad_content,
         .weights_row = n,
         .grad_memory = grad_new_memory,
         .grad_memory_row = l.word,
         .accumulate = true,
         .grad_keys = g.read_keys,
         .grad_strengths = g.read_strengths,
         .grad_key_mask = g.read_masks,
         .scratch = addressing});

  // L', p', f, b = temporal_linkage(L, p, w, r of the step before)
  for (int64_t q = 0; q < writers; ++q) {
    temporal_linkage_backward<T>({.slots = n,
                                  .read_heads = heads,
                                  .link = old.link + q * n * n,
                                  .precedence = old.precedence + q * n,
                                  .write_weights = s.writes ? now.write_weights + q * n : zeros,
                                  .read_weights = old.read_weights,
                                  .link_row = n,
                                  .pending = s.pending,
                                  .pending_count = s.pending_count,
                                  .pending_offset = q * n,
                                  .grad_new_link = upstream.link ? upstream.link + q * n * n : zeros,
                                  .grad_new_precedence = upstream.precedence ? upstream.precedence + q * n : zeros,
                                  .grad_forward = grad_forward + q * heads * n,
                                  .grad_backward = grad_backward + q * heads * n,
                                  .grad_new_link_row = upstream.link ? n : 0,
                                  .grad_read_row = n,
                                  .grad_link = grad.link ? grad.link + q * n * n : link_rows + kBackwardRows * n,
                                  .grad_link_row = grad.link ? n : 0,
                                  .grad_precedence = grad.precedence + q * n,
                                  .grad_write_weights = grad_by_link + q * n,
                                  .grad_read_weights = grad_old_read,
                                  .along_forward = along,
                                  .along_backward = along + heads,
                                  .updates = s.writes,
                                  .partial = link_rows,
                                  .panels = panels});
    for (int64_t r = 0; !tape.forward && r < heads; ++r) {
      g.read_modes[r * l.modes() + q] = along[heads + r];
      g.read_modes[r * l.modes() + writers + 1 + q] = along[r];
    }
  }
  if (s.writes) {
    // M' = memory_write(M, w, erase, values, retention)
    memory_write_backward<T>({.slots = n,
                              .word = l.word,
                              .write_heads = writers,
                              .memory = old.memory,
                              .memory_row = l.word,
                              .write_weights = now.write_weights,
                              .erase = f.erase,
                              .values = f.values,
                              .retention = s.variant.deallocates ? tape.retention : nullptr,
                              .grad_new_memory = grad_new_memory,
                              .grad_new_memory_row = l.word,
                              .grad_memory = grad.memory,
                              .grad_memory_row = l.word,
                              .grad_write_weights = grad_write,
                              .grad_erase = g.erase,
                              .grad_values = g.values,
                              .grad_retention = s.variant.deallocates ? grad_retention : nullptr,
                              .scratch = write_scratch});
    add(grad_write, grad_by_link, writers * n);
    add(grad_write, upstream.write_weights, writers * n);

    // w = write gate (allocation gate a + (1 - allocation gate) c)
    for (int64_t q = 0; q < writers; ++q) {
      const T gate = f.write_gates[q], allocated = f.allocation_gates[q];
      const T by_allocation = inner(grad_write + q * n, tape.allocated + q * n, n);
      const T by_content = inner(grad_write + q * n, tape.found + q * n, n);
      gates[q] = gate * allocated;
      g.write_gates[q] = allocated * by_allocation + (1 - allocated) * by_content;
      g.allocation_gates[q] = gate * (by_allocation - by_content);
      map(grad_allocated + q * n, n, [&](Vec<T> x) { return gate * allocated * x; }, grad_write + q * n);
      map(grad_found + q * n, n, [&](Vec<T> x) { return gate * (T(1) - allocated) * x; }, grad_write + q * n);
    }
    content_addressing_backward<T>(
        {.search = search<T>(l, s.variant, old.memory, writers, f.write_keys, f.write_strengths, f.write_masks),
         .weights = tape.found,
         .grad_weights = grad_found,
         .weights_row = n,
         .grad_memory = grad.memory,
         .grad_memory_row = l.word,
         .accumulate = true,
         .grad_keys = g.write_keys,
         .grad_strengths = g.write_strengths,
         .grad_key_mask = g.write_masks,
         .scratch = addressing});

    // a = allocation(u', gates), u' = usage_update(u, w, r of the step before)
    allocation_backward<T>({.slots = n,
                            .write_heads = writers,
                            .usage = now.usage,
                            .gates = gates,
                            .weights = tape.allocated,
                            .grad_weights = grad_allocated,
                            .eps = s.variant.allocation_eps,
                            .grad_usage = grad_usage,
                            .grad_gates = grad_gates,
                            .scratch = allocation_space});
    for (int64_t q = 0; q < writers; ++q) {
      g.write_gates[q] += f.allocation_gates[q] * grad_gates[q];
      g.allocation_gates[q] += f.write_gates[q] * grad_gates[q];
    }
    add(grad_usage, upstream.usage, n);
    usage_update_backward<T>({.slots = n,
                              .write_heads = writers,
                              .read_heads = l.read_heads,
                              .usage = old.usage,
                              .write_weights = old.write_weights,
                              .read_weights = old.read_weights,
                              .free_gates = f.free_gates,
                              .grad_new_usage = grad_usage,
                              .grad_retention = s.variant.deallocates ? grad_retention : nullptr,
                              .grad_usage = grad.usage,
                              .grad_write_weights = grad.write_weights,
                              .grad_read_weights = grad.read_weights,
                              .grad_gates = g.free_gates,
                              .scratch = usage_scratch});
    if (s.variant.detach_usage_write) clear(grad.write_weights, writers * n);
    add(grad.read_weights, grad_old_read, l.read_heads * n);
  } else {
    clear(grad.usage, n);
    clear(grad.write_weights, writers * n);
    add(grad.usage, upstream.usage, n);
    add(grad.write_weights, upstream.write_weights, writers * n);
    copy(grad.read_weights, grad_old_read, l.read_heads * n);
  }
  constrain_backward(s.interface, f, grads, l, s.variant);
  copy(s.grad_interface, grads, l.interface());
}

template void dnc_step(const DncStep<float>&);
template void dnc_step(const DncStep<double>&);
template void dnc_step_backward(const DncStepBackward<float>&);
template void dnc_step_backward(const DncStepBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
