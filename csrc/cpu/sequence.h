// A controller and a memory through all time steps of a group of samples, forward and backward. The samples of a group
// go through a step together, so that the weights are read once for all of them; the memory is a class of the kernel
// that includes this, and works on one sample at a time.
//
//   z_t = W_x x_t + W (h_{t-1}, reads_{t-1})   h_t = control(z_t)   interface_t = W_i h_t + b   reads_t =
//   memory(interface_t)
#pragma once

#include "controller_kernel.h"
#include "packed_product_kernel.h"

namespace fastmem {

// Bits of a step mask: what a sample does in a step. What it does not do keeps its part of the state.
inline constexpr uint8_t kControls = 1, kWrites = 2, kReads = 4;

// A chunk, the steps between two kept states, is gone back through in segments: as many steps as have their memories in
// the cache together, and at most so many updates that a link goes through again in one pass.
inline constexpr int64_t kSegment = 4;

struct SequenceLayout {
  int64_t steps, batch, spacing; // spacing: steps between two kept memories
  ControllerLayout controller;
  int64_t reads, interface; // numbers read in a step, numbers in an interface vector
  int64_t memory_fields;    // numbers that the memory keeps of a step

  // A top: what the controller says, then what is read; it goes to the output and to the next step.
  int64_t top() const { return controller.hidden + reads; }
  // A row: interface, gates, cell, and the fields of the memory.
  int64_t gates_at() const { return interface; }
  int64_t cell_at() const { return gates_at() + controller.gates(); }
  int64_t memory_at() const { return cell_at() + controller.cell(); }
  int64_t row() const { return memory_at() + memory_fields; }
  int64_t kept() const { return steps > 0 ? (steps - 1) / spacing : 0; } // states kept, after every `spacing` steps
  bool keeps(int64_t t) const { return t + 1 < steps && (t + 1) % spacing == 0; } // that after step t
  int64_t segments() const { return (spacing + kSegment - 1) / kSegment; }        // of a chunk
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
  int64_t first, count;     // samples
  const uint8_t* step_mask; // [T,B]; null: everything on
  T* rows;                  // [row_steps,B,row]; that of step t is t % row_steps
  int64_t row_steps;
  T* tops;                          // [T+1,B,top]; the first from the initial state
  const T* cell;                    // [B,cell], initial
  const T *norm_weight, *norm_bias; // [5,H]
  Interrupt interrupt;
};

template <class T> struct SequenceForward {
  SequenceGroup<T> group;
  const T* driven;                        // [T,B,products]: W_x x
  const T *recurrent, *interface_weights; // packed: from a top to the products, from the controller to the interface
  const T *bias, *interface_bias;         // [products] [interface]
  T* scratch;                             // control_scratch
};

template <class T> struct SequenceBackward {
  SequenceGroup<T> group;
  const T* grad_tops;                     // [T,B,top], from the outputs
  const T *recurrent, *interface_weights; // packed the other way
  T* carried;                             // [B,top]: gradient of the last top, becomes that of the first
  T* grad_cell;                           // [B,cell]: the same
  T *grad_products, *grad_interface;      // [T,B,products] [T,B,interface]
  T* grad_norms; // [B,2,5,H]: of weight and bias, added to; by sample, so that no grouping shows in the sums
  T* scratch;    // sequence_scratch
};

inline int64_t sequence_scratch(const SequenceLayout& l, int64_t count) {
  return in_lines(count * l.top()) + control_scratch(l.controller);
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

template <class T> FASTMEM_INLINE T* row_of(const SequenceGroup<T>& g, int64_t t, int64_t b) {
  return g.rows + (t % g.row_steps * g.layout.batch + b) * g.layout.row();
}

// The k-th sample that goes through its memory in step t: there and back again, so that a step begins with the state
// that the step before left in the cache.
template <class T> FASTMEM_INLINE int64_t sample_in_turn(const SequenceGroup<T>& g, int64_t t, int64_t k) {
  return g.first + (t % 2 ? g.count - 1 - k : k);
}

// Before step t, so top_of(g, t + 1, b) is what step t gives.
template <class T> FASTMEM_INLINE T* top_of(const SequenceGroup<T>& g, int64_t t, int64_t b) {
  return g.tops + (t * g.layout.batch + b) * g.layout.top();
}

template <class T> FASTMEM_INLINE const T* cell_of(const SequenceGroup<T>& g, int64_t t, int64_t b) {
  return t == 0 ? g.cell + b * g.layout.controller.cell() : row_of(g, t - 1, b) + g.layout.cell_at();
}

// After step t: the memory or link that sample b has `now` is copied to the kept ones, if there are any, or to where it
// is returned.
template <class T>
void keep(const SequenceLayout& l, T* kept, const T* now, T* final, int64_t size, int64_t t, int64_t b) {
  if (kept && l.keeps(t)) copy(kept + (((t + 1) / l.spacing - 1) * l.batch + b) * size, now, size);
  if (t + 1 == l.steps && now != final + b * size) copy(final + b * size, now, size);
}

// The memory or link that chunk `chunk` begins with; `initial`: of sample b.
template <class T>
const T* begin_of(const SequenceLayout& l, const T* initial, const T* kept, int64_t size, int64_t chunk, int64_t b) {
  return chunk == 0 ? initial : kept + ((chunk - 1) * l.batch + b) * size;
}

// Before step t on the way back: memory.enter_chunk(chunk, its end) makes the states before each segment of a chunk,
// and memory.enter_segment(segment, its end), from memory.segment_begin on, what its steps need.
template <class Memory> void enter(Memory& memory, const SequenceLayout& l, int64_t t) {
  const int64_t end = memory.segment_begin, chunk = t / l.spacing, segment = t % l.spacing / kSegment;
  if (t >= end) return;
  if (end == l.steps || end % l.spacing == 0) memory.enter_chunk(chunk, end);
  memory.segment_begin = chunk * l.spacing + segment * kSegment;
  memory.enter_segment(segment, end);
}

// memory.step(t, sample, bits) writes the memory's fields of the row and the reads of the top.
template <class T, class Memory> void run_forward(const SequenceForward<T>& s, Memory& memory) {
  const SequenceGroup<T>& g = s.group;
  const SequenceLayout& l = g.layout;
  const int64_t hidden = l.controller.hidden, end = g.first + g.count;
  const bool recurrent = l.controller.recurrent();
  for (int64_t t = 0; t < l.steps; ++t) {
    if (g.interrupt()) return;
    if (any(g, t, kControls))
      packed_product<T>({.rows = g.count,
                         .inputs = recurrent ? l.top() : l.reads,
                         .outputs = l.controller.products(),
                         .x = top_of(g, t, g.first) + (recurrent ? 0 : hidden),
                         .x_row = l.top(),
                         .packed = s.recurrent,
                         .start = s.driven + (t * l.batch + g.first) * l.controller.products(),
                         .start_row = l.controller.products(),
                         .out = recurrent ? row_of(g, t, g.first) + l.gates_at() : top_of(g, t + 1, g.first),
                         .out_row = recurrent ? l.row() : l.top()});
    for (int64_t b = g.first; b < end; ++b) {
      T *const row = row_of(g, t, b), *const top = top_of(g, t + 1, b);
      if (bits_of(g, t, b) & kControls) {
        control<T>({.layout = l.controller,
                    .bias = s.bias,
                    .norm_weight = g.norm_weight,
                    .norm_bias = g.norm_bias,
                    .gates = row + l.gates_at(),
                    .cell = cell_of(g, t, b),
                    .new_cell = row + l.cell_at(),
                    .hidden = top,
                    .scratch = s.scratch});
      } else {
        clear(row + l.gates_at(), l.controller.gates());
        copy(row + l.cell_at(), cell_of(g, t, b), l.controller.cell());
        if (recurrent) copy(top, static_cast<const T*>(top_of(g, t, b)), hidden);
        else clear(top, hidden);
      }
    }
    if (any(g, t, kWrites | kReads))
      packed_product<T>({.rows = g.count,
                         .inputs = hidden,
                         .outputs = l.interface,
                         .x = top_of(g, t + 1, g.first),
                         .x_row = l.top(),
                         .packed = s.interface_weights,
                         .start = s.interface_bias,
                         .start_row = 0,
                         .out = row_of(g, t, g.first),
                         .out_row = l.row()});
    for (int64_t k = 0; k < g.count; ++k) {
      const int64_t b = sample_in_turn(g, t, k);
      const uint8_t bits = bits_of(g, t, b);
      if (!(bits & (kWrites | kReads))) clear(row_of(g, t, b), l.interface);
      memory.step(t, b, bits);
      if (!(bits & kReads))
        copy(top_of(g, t + 1, b) + hidden, static_cast<const T*>(top_of(g, t, b)) + hidden, l.reads);
    }
  }
}

// Of a memory that can be entered; memory.step_backward(t, sample, bits, grad_reads, grad_interface) takes the
// gradients of what step t gave to those of what it was given.
template <class T, class Memory> void run_backward(const SequenceBackward<T>& s, Memory& memory) {
  const SequenceGroup<T>& g = s.group;
  const SequenceLayout& l = g.layout;
  const int64_t hidden = l.controller.hidden, products = l.controller.products(), end = g.first + g.count;
  const int64_t norms = l.controller.norms();
  const bool recurrent = l.controller.recurrent();
  Scratch<T> scratch{s.scratch};
  T* const above = scratch.take(g.count * l.top()); // gradients of what the step gave
  const auto grad_interface_of = [&](int64_t t, int64_t b) {
    return s.grad_interface + (t * l.batch + b) * l.interface;
  };
  const auto grad_product_of = [&](int64_t t, int64_t b) { return s.grad_products + (t * l.batch + b) * products; };
  for (int64_t t = l.steps - 1; t >= 0; --t) {
    if (g.interrupt()) return;
    enter(memory, l, t);
    copy(above, static_cast<const T*>(s.carried) + g.first * l.top(), g.count * l.top());
    add(above, s.grad_tops + (t * l.batch + g.first) * l.top(), g.count * l.top());
    for (int64_t k = 0; k < g.count; ++k) {
      const int64_t b = sample_in_turn(g, t, k);
      const uint8_t bits = bits_of(g, t, b);
      T* const grad_interface = grad_interface_of(t, b);
      if (bits & (kWrites | kReads))
        memory.step_backward(t, b, bits, above + (b - g.first) * l.top() + hidden, grad_interface);
      else clear(grad_interface, l.interface);
    }
    if (any(g, t, kWrites | kReads))
      packed_product<T>({.rows = g.count,
                         .inputs = l.interface,
                         .outputs = hidden,
                         .x = grad_interface_of(t, g.first),
                         .x_row = l.interface,
                         .packed = s.interface_weights,
                         .start = above,
                         .start_row = l.top(),
                         .out = above,
                         .out_row = l.top()});
    for (int64_t b = g.first; b < end; ++b) {
      if (!(bits_of(g, t, b) & kControls)) {
        clear(grad_product_of(t, b), products);
        continue;
      }
      const T* const row = row_of(g, t, b);
      control_backward<T>({.layout = l.controller,
                           .norm_weight = g.norm_weight,
                           .norm_bias = g.norm_bias,
                           .gates = row + l.gates_at(),
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
    T* const carried = s.carried + g.first * l.top();
    packed_product<T>({.rows = g.count,
                       .inputs = products,
                       .outputs = recurrent ? l.top() : l.reads,
                       .x = grad_product_of(t, g.first),
                       .x_row = products,
                       .packed = s.recurrent,
                       .start = nullptr,
                       .start_row = 0,
                       .out = carried + (recurrent ? 0 : hidden),
                       .out_row = l.top()});
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
