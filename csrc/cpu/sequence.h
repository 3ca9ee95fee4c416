// A controller and a memory through all time steps of a group of samples, forward and backward. The samples of a group
// go through a step together, so that the weights are read once for all of them; the memory is a class of the kernel
// that includes this, and works on one sample at a time.
//
//   z_t = W_x x_t + W (h_{t-1}, reads_{t-1})   h_t = control(z_t)   interface_t = W_i h_t + b   reads_t =
//   memory(interface_t)
//
// The interface may come from stored programs instead. A step in which some sample writes or reads is an access: only
// these are steps of the memory, which counts them from 0. Between two of them reads stay what they are, so that what
// the controller sees of them is multiplied by its weights once.
#pragma once

#include "controller_kernel.h"
#include "packed_product_kernel.h"
#include "stored_programs.h"

namespace fastmem {

// Bits of a step mask: what a sample does in a step. What it does not do keeps its part of the state.
inline constexpr uint8_t kControls = 1, kWrites = 2, kReads = 4;

// A chunk, the accesses between two kept states, is gone back through in segments: as many accesses as have their
// memories in the cache together, and at most so many updates that a link goes through again in one pass.
inline constexpr int64_t kSegment = 4;

struct SequenceLayout {
  int64_t steps, batch, accesses, spacing; // spacing: accesses between two kept memories
  ControllerLayout controller;
  ProgramLayout programs;
  int64_t reads, interface; // numbers read in a step, numbers in an interface vector
  int64_t memory_fields;    // numbers that the memory keeps of an access

  // A top: what the controller says, then what is read; it goes to the output and to the next step.
  int64_t top() const { return controller.hidden + reads; }
  // What the controller keeps of a step: gates, cell.
  int64_t cell_at() const { return controller.gates(); }
  int64_t control_row() const { return cell_at() + controller.cell(); }
  // A row of an access: interface, the fields of the memory, those of the programs.
  int64_t memory_at() const { return interface; }
  int64_t programs_at() const { return memory_at() + memory_fields; }
  int64_t row() const { return programs_at() + programs.fields(); }
  int64_t kept() const { return accesses > 0 ? (accesses - 1) / spacing : 0; } // states, after every `spacing` accesses
  bool keeps(int64_t access) const { return access + 1 < accesses && (access + 1) % spacing == 0; } // that after it
  int64_t segments() const { return (spacing + kSegment - 1) / kSegment; }                          // of a chunk
  // Runs of steps that see the same reads: each ends with an access, but for the last.
  int64_t runs(const int64_t* access_steps) const {
    return accesses + (steps > 0 && (accesses == 0 || access_steps[accesses - 1] + 1 < steps) ? 1 : 0);
  }
};

// Whether to stop, asked before every step.
struct Interrupt {
  bool (*requested)(void*);
  void* context;
  bool operator()() const { return requested(context); }
};

// What a group of samples needs in either direction. Tensors are those of the whole batch.
template <class T> struct SequenceGroup {
  SequenceLayout layout;
  int64_t first, count;        // samples
  const uint8_t* step_mask;    // [T,B]; null: everything on
  const int64_t* access_steps; // [accesses]: the step of each
  T* controls;                 // [control_steps,B,control_row]; that of step t is t % control_steps
  int64_t control_steps;
  T* rows; // [row_accesses,B,row]: the same of accesses
  int64_t row_accesses;
  T* tops;                          // [T+1,B,top]; the first from the initial state
  const T* cell;                    // [B,cell], initial
  const T *norm_weight, *norm_bias; // [5,H]
  Similarity<T> program_similarity;
  const T *program_keys, *interface_bias; // [n,P,K], squashed; [interface], of every program [P,interface]
  Interrupt interrupt;
};

template <class T> struct SequenceForward {
  SequenceGroup<T> group;
  const T* driven;                        // [T,B,products]: W_x x
  const T *recurrent, *interface_weights; // packed: from a top to the products, from the controller to the interface,
                                          // or to what all programs make
  const T* meta;                          // packed: from the controller to the meta network's numbers
  const T *bias, *meta_bias;              // [products] [meta]
  T* scratch;                             // sequence_scratch
};

template <class T> struct SequenceBackward {
  SequenceGroup<T> group;
  const T* grad_tops;                     // [T,B,top], from the outputs
  const T *recurrent, *interface_weights; // packed the other way; programs head by head
  const T* meta;                          // the same
  T* carried;                             // [B,top]: gradient of the last top, becomes that of the first
  T* grad_cell;                           // [B,cell]: the same
  T* grad_products;                       // [T,B,products]
  T* grad_runs;                           // [runs,B,products]: summed over the steps of each run; null: a run is a step
  T *grad_interface, *grad_meta;          // [accesses,B,interface] [accesses,B,meta]
  // By sample, so that no grouping shows in the sums; added to.
  T* grad_norms; // [B,2,5,H]: of weight and bias
  T* grad_keys;  // [B,n,P,K]: of the squashed keys
  T* scratch;    // sequence_backward_scratch
};

inline int64_t sequence_scratch(const SequenceLayout& l, int64_t count) {
  const int64_t held = in_lines(count * l.controller.products()) + control_scratch(l.controller);
  if (!l.programs.count) return held;
  return held + in_lines(count * l.programs.count * l.interface) + program_scratch(l.programs);
}

inline int64_t sequence_backward_scratch(const SequenceLayout& l, int64_t count) {
  const int64_t own = 2 * in_lines(count * l.top()) + control_scratch(l.controller);
  if (!l.programs.count) return own;
  return own + in_lines(count * l.interface) + in_lines(count * l.programs.count * l.controller.hidden) +
         program_scratch(l.programs);
}

// Room for the packed programs of all heads, on the way back.
inline int64_t packed_programs_size(const ProgramLayout& l) {
  int64_t size = 0;
  for (int64_t head = 0; head < l.heads; ++head) size += packed_size(l.widths[head], l.count * l.hidden);
  return size;
}

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

template <class T> FASTMEM_INLINE uint8_t bits_of(const SequenceGroup<T>& g, int64_t t, int64_t b) {
  return g.step_mask ? g.step_mask[t * g.layout.batch + b] : uint8_t(kControls | kWrites | kReads);
}

// Whether any sample of the group does any of `bits` in a step.
template <class T> bool any(const SequenceGroup<T>& g, int64_t t, int bits) {
  for (int64_t b = g.first; b < g.first + g.count; ++b)
    if (bits_of(g, t, b) & bits) return true;
  return false;
}

template <class T> FASTMEM_INLINE uint8_t bits_at(const SequenceGroup<T>& g, int64_t access, int64_t b) {
  return bits_of(g, g.access_steps[access], b);
}

template <class T> FASTMEM_INLINE T* control_of(const SequenceGroup<T>& g, int64_t t, int64_t b) {
  return g.controls + (t % g.control_steps * g.layout.batch + b) * g.layout.control_row();
}

template <class T> FASTMEM_INLINE T* row_of(const SequenceGroup<T>& g, int64_t access, int64_t b) {
  return g.rows + (access % g.row_accesses * g.layout.batch + b) * g.layout.row();
}

// The k-th sample that goes through its memory in an access: there and back again, so that an access begins with the
// state that the one before left in the cache.
template <class T> FASTMEM_INLINE int64_t sample_in_turn(const SequenceGroup<T>& g, int64_t access, int64_t k) {
  return g.first + (access % 2 ? g.count - 1 - k : k);
}

// Before step t, so top_of(g, t + 1, b) is what step t gives.
template <class T> FASTMEM_INLINE T* top_of(const SequenceGroup<T>& g, int64_t t, int64_t b) {
  return g.tops + (t * g.layout.batch + b) * g.layout.top();
}

template <class T> FASTMEM_INLINE const T* cell_of(const SequenceGroup<T>& g, int64_t t, int64_t b) {
  return t == 0 ? g.cell + b * g.layout.controller.cell() : control_of(g, t - 1, b) + g.layout.cell_at();
}

// After an access: the memory or link that sample b has `now` is copied to the kept ones, if there are any, or to where
// it is returned.
template <class T>
void keep(const SequenceLayout& l, T* kept, const T* now, T* final, int64_t size, int64_t access, int64_t b) {
  if (kept && l.keeps(access)) copy(kept + (((access + 1) / l.spacing - 1) * l.batch + b) * size, now, size);
  if (access + 1 == l.accesses && now != final + b * size) copy(final + b * size, now, size);
}

// The memory or link that chunk `chunk` begins with; `initial`: of sample b.
template <class T>
const T* begin_of(const SequenceLayout& l, const T* initial, const T* kept, int64_t size, int64_t chunk, int64_t b) {
  return chunk == 0 ? initial : kept + ((chunk - 1) * l.batch + b) * size;
}

// Before an access on the way back: memory.enter_chunk(chunk, its end) makes the states before each segment of a chunk,
// and memory.enter_segment(segment, its end), from memory.segment_begin on, what its accesses need.
template <class Memory> void enter(Memory& memory, const SequenceLayout& l, int64_t access) {
  const int64_t end = memory.segment_begin, chunk = access / l.spacing, segment = access % l.spacing / kSegment;
  if (access >= end) return;
  if (end == l.accesses || end % l.spacing == 0) memory.enter_chunk(chunk, end);
  memory.segment_begin = chunk * l.spacing + segment * kSegment;
  memory.enter_segment(segment, end);
}

template <class T> ProgramsOfSample<T> programs_of(const SequenceGroup<T>& g, int64_t access, int64_t b, T* scratch) {
  T* const fields = row_of(g, access, b) + g.layout.programs_at();
  return {.layout = g.layout.programs,
          .similarity = g.program_similarity,
          .keys = g.program_keys,
          .meta = fields,
          .attention = fields + g.layout.programs.meta(),
          .scratch = scratch};
}

// The interface vectors of an access, in step t.
template <class T> void tell(const SequenceForward<T>& s, int64_t t, int64_t access, Scratch<T> scratch) {
  const SequenceGroup<T>& g = s.group;
  const SequenceLayout& l = g.layout;
  const ProgramLayout& p = l.programs;
  const int64_t hidden = l.controller.hidden, made_row = p.count * l.interface;
  T* const made = p.count ? scratch.take(g.count * made_row) : row_of(g, access, g.first);
  PackedProduct<T> product{.rows = g.count,
                           .inputs = hidden,
                           .outputs = p.count ? made_row : l.interface,
                           .begin = 0,
                           .end = hidden,
                           .x = top_of(g, t + 1, g.first),
                           .x_row = l.top(),
                           .packed = s.interface_weights,
                           .start = g.interface_bias,
                           .start_row = 0,
                           .out = made,
                           .out_row = p.count ? made_row : l.row()};
  packed_product(product);
  if (!p.count) return;
  product.outputs = p.meta();
  product.packed = s.meta;
  product.start = s.meta_bias;
  product.out = row_of(g, access, g.first) + l.programs_at();
  product.out_row = l.row();
  packed_product(product);
  for (int64_t i = 0; i < g.count; ++i) {
    if (!(bits_of(g, t, g.first + i) & (kWrites | kReads))) continue;
    const ProgramsOfSample<T> programs = programs_of(g, access, g.first + i, scratch.next);
    attend(programs);
    mix_programs(programs, made + i * made_row, row_of(g, access, g.first + i));
  }
}

// Adds to `above` [count,top], gradients of what step t gave, those through the interface vectors.
template <class T>
void tell_backward(const SequenceBackward<T>& s, int64_t t, int64_t access, T* above, Scratch<T> scratch) {
  const SequenceGroup<T>& g = s.group;
  const SequenceLayout& l = g.layout;
  const ProgramLayout& p = l.programs;
  const int64_t hidden = l.controller.hidden, pulled_row = p.count * hidden;
  const T* const grad_interface = s.grad_interface + (access * l.batch + g.first) * l.interface;
  PackedProduct<T> product{.rows = g.count,
                           .inputs = l.interface,
                           .outputs = hidden,
                           .begin = 0,
                           .end = l.interface,
                           .x = grad_interface,
                           .x_row = l.interface,
                           .packed = s.interface_weights,
                           .start = above,
                           .start_row = l.top(),
                           .out = above,
                           .out_row = l.top()};
  if (!p.count) {
    packed_product(product);
    return;
  }
  T *const columns = scratch.take(g.count * l.interface), *const pulled = scratch.take(g.count * pulled_row);
  T* const grad_meta = s.grad_meta + (access * l.batch + g.first) * p.meta();
  for (int64_t i = 0; i < g.count; ++i) by_column(p, grad_interface + i * l.interface, columns + i * l.interface);
  product.outputs = pulled_row;
  product.start = nullptr;
  product.out = pulled;
  product.out_row = pulled_row;
  int64_t column = 0;
  for (int64_t head = 0; head < p.heads; column += p.widths[head++]) {
    product.inputs = product.end = p.widths[head];
    product.x = columns + column;
    packed_product(product);
    product.packed += packed_size(p.widths[head], pulled_row);
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t b = g.first + i;
      if (!(bits_of(g, t, b) & (kWrites | kReads))) continue;
      attend_backward(programs_of(g, access, b, scratch.next), head, g.interface_bias + column, top_of(g, t + 1, b),
                      pulled + i * pulled_row, columns + i * l.interface + column, above + i * l.top(),
                      grad_meta + i * p.meta(), s.grad_keys + b * p.keys());
    }
  }
  for (int64_t i = 0; i < g.count; ++i)
    if (!(bits_of(g, t, g.first + i) & (kWrites | kReads))) clear(grad_meta + i * p.meta(), p.meta());
  product.inputs = product.end = p.meta();
  product.outputs = hidden;
  product.x = grad_meta;
  product.x_row = p.meta();
  product.packed = s.meta;
  product.start = product.out = above;
  product.start_row = product.out_row = l.top();
  packed_product(product);
}

// memory.step(access, sample, bits, reads) writes the memory's fields of the row, and what it reads.
template <class T, class Memory> void run_forward(const SequenceForward<T>& s, Memory& memory) {
  const SequenceGroup<T>& g = s.group;
  const SequenceLayout& l = g.layout;
  const int64_t hidden = l.controller.hidden, products = l.controller.products(), end = g.first + g.count;
  const bool recurrent = l.controller.recurrent();
  Scratch<T> scratch{s.scratch};
  T* const held = scratch.take(g.count * products); // of reads that several steps see: their part of the products
  bool holds = false;
  int64_t access = 0;
  for (int64_t t = 0; t < l.steps; ++t) {
    if (g.interrupt()) return;
    const bool accesses = access < l.accesses && g.access_steps[access] == t;
    const bool begins = t == 0 || (access > 0 && g.access_steps[access - 1] == t - 1); // a run of the same reads
    if (any(g, t, kControls)) {
      const T* const driven = s.driven + (t * l.batch + g.first) * products;
      PackedProduct<T> product{.rows = g.count,
                               .inputs = recurrent ? l.top() : l.reads,
                               .outputs = products,
                               .begin = 0,
                               .end = recurrent ? l.top() : l.reads,
                               .x = top_of(g, t, g.first) + (recurrent ? 0 : hidden),
                               .x_row = l.top(),
                               .packed = s.recurrent,
                               .start = driven,
                               .start_row = products,
                               .out = recurrent ? control_of(g, t, g.first) : top_of(g, t + 1, g.first),
                               .out_row = recurrent ? l.control_row() : l.top()};
      if (accesses && begins) { // by what the whole batch does, so that no grouping shows in the sums
        packed_product(product);
      } else {
        PackedProduct<T> of_reads = product;
        of_reads.begin = recurrent ? hidden : 0;
        of_reads.start = nullptr;
        of_reads.out = held;
        of_reads.out_row = products;
        if (!holds) packed_product(of_reads);
        holds = true;
        for (int64_t i = 0; i < g.count; ++i)
          map(product.out + i * product.out_row, products, [](Vec<T> a, Vec<T> b) { return a + b; },
              driven + i * products, static_cast<const T*>(held) + i * products);
        product.start = product.out;
        product.start_row = product.out_row;
        product.end = hidden;
        if (recurrent) packed_product(product);
      }
    }
    for (int64_t b = g.first; b < end; ++b) {
      T *const row = control_of(g, t, b), *const top = top_of(g, t + 1, b);
      if (bits_of(g, t, b) & kControls) {
        control<T>({.layout = l.controller,
                    .bias = s.bias,
                    .norm_weight = g.norm_weight,
                    .norm_bias = g.norm_bias,
                    .gates = row,
                    .cell = cell_of(g, t, b),
                    .new_cell = row + l.cell_at(),
                    .hidden = top,
                    .scratch = scratch.next});
      } else {
        clear(row, l.controller.gates());
        copy(row + l.cell_at(), cell_of(g, t, b), l.controller.cell());
        if (recurrent) copy(top, static_cast<const T*>(top_of(g, t, b)), hidden);
        else clear(top, hidden);
      }
    }
    if (accesses && any(g, t, kWrites | kReads)) tell(s, t, access, scratch);
    for (int64_t k = 0; k < g.count; ++k) {
      const int64_t b = sample_in_turn(g, access, k);
      const uint8_t bits = bits_of(g, t, b);
      T* const reads = top_of(g, t + 1, b) + hidden;
      if (accesses) {
        if (!(bits & (kWrites | kReads))) {
          clear(row_of(g, access, b), l.interface);
          clear(row_of(g, access, b) + l.programs_at(), l.programs.fields());
        }
        memory.step(access, b, bits, reads);
      }
      if (!(bits & kReads)) copy(reads, static_cast<const T*>(top_of(g, t, b)) + hidden, l.reads);
    }
    if (accesses) {
      ++access;
      holds = false;
    }
  }
}

// Of a memory that can be entered; memory.step_backward(access, sample, bits, grad_reads, grad_interface) takes the
// gradients of what an access gave to those of what it was given.
template <class T, class Memory> void run_backward(const SequenceBackward<T>& s, Memory& memory) {
  const SequenceGroup<T>& g = s.group;
  const SequenceLayout& l = g.layout;
  const int64_t hidden = l.controller.hidden, products = l.controller.products(), end = g.first + g.count;
  const int64_t norms = l.controller.norms();
  const bool recurrent = l.controller.recurrent();
  Scratch<T> scratch{s.scratch};
  T* const above = scratch.take(g.count * l.top()); // gradients of what the step gave
  T* const wide = scratch.take(g.count * l.top());
  T* const carried = s.carried + g.first * l.top();
  const auto grad_interface_of = [&](int64_t access, int64_t b) {
    return s.grad_interface + (access * l.batch + b) * l.interface;
  };
  const auto grad_product_of = [&](int64_t t, int64_t b) { return s.grad_products + (t * l.batch + b) * products; };
  int64_t access = l.accesses; // of which all from here on are done
  bool sums = false;           // the gradients of this run's products so far
  for (int64_t t = l.steps - 1; t >= 0; --t) {
    if (g.interrupt()) return;
    copy(above, static_cast<const T*>(carried), g.count * l.top());
    add(above, s.grad_tops + (t * l.batch + g.first) * l.top(), g.count * l.top());
    if (access > 0 && g.access_steps[access - 1] == t) {
      --access;
      enter(memory, l, access);
      for (int64_t k = 0; k < g.count; ++k) {
        const int64_t b = sample_in_turn(g, access, k);
        const uint8_t bits = bits_of(g, t, b);
        T* const grad_interface = grad_interface_of(access, b);
        if (bits & (kWrites | kReads))
          memory.step_backward(access, b, bits, above + (b - g.first) * l.top() + hidden, grad_interface);
        else clear(grad_interface, l.interface);
      }
      if (any(g, t, kWrites | kReads)) tell_backward(s, t, access, above, scratch);
      else clear(s.grad_meta + (access * l.batch + g.first) * l.programs.meta(), g.count * l.programs.meta());
    }
    for (int64_t b = g.first; b < end; ++b) {
      if (!(bits_of(g, t, b) & kControls)) {
        clear(grad_product_of(t, b), products);
        continue;
      }
      const T* const row = control_of(g, t, b);
      control_backward<T>({.layout = l.controller,
                           .norm_weight = g.norm_weight,
                           .norm_bias = g.norm_bias,
                           .gates = row,
                           .cell = cell_of(g, t, b),
                           .new_cell = row + l.cell_at(),
                           .hidden = top_of(g, t + 1, b),
                           .grad_hidden = above + (b - g.first) * l.top(),
                           .grad_cell = s.grad_cell + b * l.controller.cell(),
                           .grad_product = grad_product_of(t, b),
                           .grad_norm_weight = s.grad_norms + 2 * b * norms,
                           .grad_norm_bias = s.grad_norms + (2 * b + 1) * norms,
                           .scratch = scratch.next});
    }
    // The first step of a run passes on to the reads what all its steps saw of them.
    const bool begins = t == 0 || (access > 0 && g.access_steps[access - 1] == t - 1);
    T* const run = s.grad_runs ? s.grad_runs + (access * l.batch + g.first) * products : nullptr;
    if (run) {
      const T* const more = grad_product_of(t, g.first);
      if (sums) add(run, more, g.count * products);
      else copy(run, more, g.count * products);
    }
    PackedProduct<T> product{.rows = g.count,
                             .inputs = products,
                             .outputs = recurrent ? l.top() : l.reads,
                             .begin = 0,
                             .end = products,
                             .x = grad_product_of(t, g.first),
                             .x_row = products,
                             .packed = s.recurrent,
                             .start = nullptr,
                             .start_row = 0,
                             .out = carried + (recurrent ? 0 : hidden),
                             .out_row = l.top()};
    if (begins && !sums) {
      packed_product(product);
    } else {
      PackedProduct<T> of_reads = product;
      product.outputs = hidden;
      if (recurrent) packed_product(product);
      if (begins) {
        of_reads.first_output = recurrent ? hidden : 0;
        of_reads.x = run;
        of_reads.out = wide;
        packed_product(of_reads);
      }
      for (int64_t i = 0; i < g.count; ++i) {
        T* const reads = carried + i * l.top() + hidden;
        if (begins) copy(reads, static_cast<const T*>(wide) + i * l.top() + (recurrent ? hidden : 0), l.reads);
        else clear(reads, l.reads);
      }
    }
    sums = !begins;
    // What a sample kept from the step before has its gradient there.
    for (int64_t b = g.first; b < end; ++b) {
      const uint8_t bits = bits_of(g, t, b);
      T* const before = s.carried + b * l.top();
      const T* const after = above + (b - g.first) * l.top();
      if (!recurrent) clear(before, hidden);
      else if (!(bits & kControls)) copy(before, after, hidden); // the product of zeros is zero
      if (!(bits & kReads)) add(before + hidden, after + hidden, l.reads);
    }
  }
}

} // namespace fastmem::FASTMEM_ISA
#endif
