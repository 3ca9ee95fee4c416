// A DNC's memory through all time steps of a group of samples: csrc/cpu/sequence.h runs the controller around it.
//
// Forward, link and memory are updated in place, where they stay in the cache, and copied to be kept. Backward, the
// accesses of a chunk between two kept states are gone through segment by segment: memories are written again and stay
// for a segment, links are updated again inside the pass that needs them. Time is counted in accesses here.
#pragma once

#include "dnc_step_kernel.h"
#include "sequence.h"

namespace fastmem {

struct DncSequenceLayout {
  SequenceLayout sequence;
  DncLayout step;
  bool deallocates;
  bool begins_alike; // memory and link before the first access are one for all samples

  int64_t memory() const { return step.slots * step.word; }
  int64_t link() const { return step.write_heads * step.slots * step.slots; }
  int64_t first_memory(int64_t b) const { return begins_alike ? 0 : b * memory(); } // where those of sample b are
  int64_t first_link(int64_t b) const { return begins_alike ? 0 : b * link(); }
  // Usage, precedence, write weights, read weights: the state without memory and link.
  int64_t vectors() const { return step.slots * (1 + 2 * step.write_heads + step.read_heads); }
  int64_t ways() const { return step.write_heads * step.read_heads * step.slots; }
  // The vectors, the content weights of all heads, allocation, retention to deallocate, four kinds of ways to sharpen.
  int64_t fields() const {
    return vectors() + step.slots * (2 * step.write_heads + step.read_heads + (deallocates ? 1 : 0)) +
           (step.sharpened ? 4 * ways() : 0);
  }
};

// Tensors of the whole batch.
template <class T> struct DncSequence {
  DncSequenceLayout layout;
  DncVariant<T> variant;
  SequenceForward<T> forward;
  DncState<const T> state;
  T *new_memory, *new_link; // of the final state
  T *memories, *links;      // [kept,B,...]; null where nothing is kept
  T* scratch;               // dnc_sequence_scratch
  const T** pointers;       // [2 count]
};

template <class T> struct DncSequenceBackward {
  DncSequenceLayout layout;
  DncVariant<T> variant;
  SequenceBackward<T> backward;
  DncState<const T> state;
  const T *memories, *links;
  DncState<const T> grad_new_state; // absent: null
  DncState<T> grad_state;           // an unwanted memory or link: null
  T* scratch;                       // dnc_sequence_backward_scratch
  const T** pointers;               // [dnc_sequence_backward_pointers]
};

inline int64_t dnc_sequence_scratch(const DncSequenceLayout& l) {
  return in_lines(l.step.slots) + 2 * in_lines(l.ways()) + in_lines(dnc_step_scratch(l.step));
}

inline int64_t dnc_sequence_backward_scratch(const DncSequenceLayout& l, int64_t count) {
  const int64_t kept = in_lines(l.memory()) + in_lines(l.link());
  return count * (l.sequence.segments() * kept + kSegment * in_lines(l.memory()) + 2 * in_lines(l.vectors())) +
         in_lines(l.step.interface()) + in_lines(dnc_step_backward_scratch(l.step, kSegment - 1));
}

inline int64_t dnc_sequence_backward_pointers(const DncSequenceLayout& l, int64_t count) {
  return count * (2 * l.sequence.segments() + kSegment + 1 + 4);
}

FASTMEM_EACH_ISA(template <class T> void dnc_sequence(const DncSequence<T>& s);
                 template <class T> void dnc_sequence_backward(const DncSequenceBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

// The part of a row that is the memory's.
template <class T> struct DncRow {
  T *usage, *precedence, *write_weights, *read_weights;
  DncTape<T> tape; // unsharpened: without forward and backward; without deallocation: without retention
  T* end;
};

template <class T> DncRow<T> dnc_row(T* row, const DncSequenceLayout& l) {
  const int64_t n = l.step.slots, writes = l.step.write_heads * n, reads = l.step.read_heads * n;
  Parts<T> parts{row + l.sequence.memory_at()};
  DncRow<T> r{};
  r.usage = parts.take(n);
  r.precedence = parts.take(writes);
  r.write_weights = parts.take(writes);
  r.read_weights = parts.take(reads);
  r.tape.allocated = parts.take(writes);
  r.tape.found = parts.take(writes);
  r.tape.content = parts.take(reads);
  if (l.deallocates) r.tape.retention = parts.take(n);
  if (l.step.sharpened) {
    r.tape.forward = parts.take(l.ways());
    r.tape.backward = parts.take(l.ways());
    r.tape.sharp_forward = parts.take(l.ways());
    r.tape.sharp_backward = parts.take(l.ways());
  }
  r.end = parts.next;
  return r;
}

// The state of a sample before an access, but for memory and link.
template <class T>
DncState<const T> dnc_vectors(const SequenceGroup<T>& g, const DncSequenceLayout& l, const DncState<const T>& initial,
                              int64_t access, int64_t b) {
  const int64_t n = l.step.slots, writes = l.step.write_heads * n, reads = l.step.read_heads * n;
  if (access == 0)
    return {nullptr,
            initial.usage + b * n,
            initial.precedence + b * writes,
            nullptr,
            initial.write_weights + b * writes,
            initial.read_weights + b * reads};
  const DncRow<T> row = dnc_row(row_of(g, access - 1, b), l);
  return {nullptr, row.usage, row.precedence, nullptr, row.write_weights, row.read_weights};
}

template <class T> struct DncForward {
  const DncSequence<T>& s;
  const SequenceGroup<T>& g;
  const T **memory_now, **link_now; // where each sample of the group has them
  T *retention, *ways, *scratch;

  explicit DncForward(const DncSequence<T>& sequence) : s(sequence), g(sequence.forward.group) {
    memory_now = s.pointers;
    link_now = memory_now + g.count;
    for (int64_t i = 0; i < g.count; ++i) {
      memory_now[i] = s.state.memory + s.layout.first_memory(g.first + i);
      link_now[i] = s.state.link + s.layout.first_link(g.first + i);
    }
    Scratch<T> space{s.scratch};
    retention = space.take(s.layout.step.slots);
    ways = space.take(2 * s.layout.ways());
    scratch = space.take(0);
  }

  void step(int64_t access, int64_t b, uint8_t bits, T* reads_out) {
    const DncSequenceLayout& l = s.layout;
    const int64_t n = l.step.slots, writes = l.step.write_heads * n, reads = l.step.read_heads * n;
    const bool writing = bits & kWrites, reading = bits & kReads;
    T* const numbers = row_of(g, access, b);
    const DncRow<T> row = dnc_row(numbers, l);
    DncState<const T> old = dnc_vectors(g, l, s.state, access, b);
    const T *&memory = memory_now[b - g.first], *&link = link_now[b - g.first];
    old.memory = memory;
    old.link = link;
    T *const new_memory = s.new_memory + b * l.memory(), *const new_link = s.new_link + b * l.link();
    if (!writing || !reading) clear(row.tape.allocated, row.end - row.tape.allocated);
    if (writing || reading) {
      DncTape<T> tape = row.tape;
      if (!tape.retention) tape.retention = retention;
      if (!tape.forward) {
        tape.forward = tape.sharp_forward = ways;
        tape.backward = tape.sharp_backward = ways + l.ways();
      }
      dnc_step<T>({.layout = l.step,
                   .variant = s.variant,
                   .interface = numbers,
                   .state = old,
                   .new_state = {new_memory, row.usage, row.precedence, writing ? new_link : const_cast<T*>(link),
                                 row.write_weights, row.read_weights},
                   .reads = reads_out,
                   .tape = tape,
                   .scratch = scratch,
                   .writes = writing,
                   .reads_from = reading});
    }
    if (writing) {
      memory = new_memory;
      link = new_link;
    } else {
      copy(row.usage, old.usage, n);
      copy(row.precedence, old.precedence, writes);
      copy(row.write_weights, old.write_weights, writes);
    }
    keep(l.sequence, s.memories, memory, s.new_memory, l.memory(), access, b);
    keep(l.sequence, s.links, link, s.new_link, l.link(), access, b);
    if (!reading) copy(row.read_weights, old.read_weights, reads);
  }
};

template <class T> struct DncBackward {
  const DncSequenceBackward<T>& s;
  const SequenceGroup<T>& g;
  const T **memory_at, **link_at; // [segments,count]: before the first access of each segment
  const T** memory_of;            // [kSegment + 1,count]: before and after each access of this segment
  const T **grad_memory, **grad_link, **grad_vectors, **spare_vectors; // [count]: gradients of what the access gave
  T *memory_buffers, *link_buffers, *segment_buffers, *vector_buffers, *fields, *scratch;
  T *grad_memory_buffers, *grad_link_buffers;
  int64_t segment_begin;

  explicit DncBackward(const DncSequenceBackward<T>& sequence) : s(sequence), g(sequence.backward.group) {
    const DncSequenceLayout& l = s.layout;
    Parts<const T*> pointers{s.pointers};
    memory_at = pointers.take(l.sequence.segments() * g.count);
    link_at = pointers.take(l.sequence.segments() * g.count);
    memory_of = pointers.take((kSegment + 1) * g.count);
    grad_memory = pointers.take(g.count);
    grad_link = pointers.take(g.count);
    grad_vectors = pointers.take(g.count);
    spare_vectors = pointers.take(g.count);
    Scratch<T> space{s.scratch};
    const auto buffers = [&](int64_t count, int64_t size) { return space.take(count * g.count * in_lines(size)); };
    memory_buffers = buffers(l.sequence.segments() - 1, l.memory());
    link_buffers = buffers(l.sequence.segments() - 1, l.link());
    grad_memory_buffers = buffers(1, l.memory());
    grad_link_buffers = buffers(1, l.link());
    segment_buffers = buffers(kSegment, l.memory());
    vector_buffers = buffers(2, l.vectors());
    fields = space.take(l.step.interface());
    scratch = space.take(0);
    segment_begin = l.sequence.accesses;
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t b = g.first + i;
      const auto upstream = [&](const T* all, int64_t size) { return all ? all + b * size : nullptr; };
      grad_memory[i] = upstream(s.grad_new_state.memory, l.memory());
      grad_link[i] = upstream(s.grad_new_state.link, l.link());
      T* const vectors = vector_buffers + 2 * i * in_lines(l.vectors());
      grad_vectors[i] = vectors;
      spare_vectors[i] = vectors + in_lines(l.vectors());
      clear(vectors, l.vectors());
      const DncState<T> grads = parts_of(vectors);
      const int64_t n = l.step.slots, writes = l.step.write_heads * n, reads = l.step.read_heads * n;
      add(grads.usage, upstream(s.grad_new_state.usage, n), n);
      add(grads.precedence, upstream(s.grad_new_state.precedence, writes), writes);
      add(grads.write_weights, upstream(s.grad_new_state.write_weights, writes), writes);
      add(grads.read_weights, upstream(s.grad_new_state.read_weights, reads), reads);
    }
  }

  template <class Number> DncState<Number> parts_of(Number* vectors) const {
    const int64_t n = s.layout.step.slots, writes = s.layout.step.write_heads * n;
    return {nullptr, vectors, vectors + n, nullptr, vectors + n + writes, vectors + n + 2 * writes};
  }

  bool writes(int64_t access, int64_t b) const { return bits_at(g, access, b) & kWrites; }

  // The updates in accesses [begin, end), from the first write head on: how many, of at most kSegment.
  int64_t updates_of(int64_t begin, int64_t end, int64_t b, LinkUpdate<T>* updates) const {
    int64_t count = 0;
    for (int64_t access = begin; access < end; ++access) {
      if (!writes(access, b)) continue;
      const DncRow<T> row = dnc_row(row_of(g, access, b), s.layout);
      updates[count++] = {row.write_weights, dnc_vectors(g, s.layout, s.state, access, b).precedence};
    }
    return count;
  }

  void write_again(int64_t access, int64_t b, const T* memory, T* new_memory) const {
    const DncSequenceLayout& l = s.layout;
    T* const numbers = row_of(g, access, b);
    const DncRow<T> row = dnc_row(numbers, l);
    const DncFields<T> raw = fields_of(numbers, l.step), f = fields_of(fields, l.step);
    constrain_written(raw, f, l.step, s.variant);
    memory_write<T>({.slots = l.step.slots,
                     .word = l.step.word,
                     .write_heads = l.step.write_heads,
                     .memory = memory,
                     .memory_row = l.step.word,
                     .write_weights = row.write_weights,
                     .erase = f.erase,
                     .values = f.values,
                     .retention = row.tape.retention,
                     .new_memory = new_memory,
                     .new_memory_row = l.step.word});
  }

  // From the state that was kept at the chunk's begin, memory and link before each of its segments.
  void enter_chunk(int64_t chunk, int64_t end) {
    const DncSequenceLayout& l = s.layout;
    const int64_t begin = chunk * l.sequence.spacing, heads = l.step.write_heads;
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t b = g.first + i;
      const T* memory = begin_of(l.sequence, s.state.memory + l.first_memory(b), s.memories, l.memory(), chunk, b);
      const T* link = begin_of(l.sequence, s.state.link + l.first_link(b), s.links, l.link(), chunk, b);
      memory_at[i] = memory;
      link_at[i] = link;
      for (int64_t k = 1; begin + k * kSegment < end; ++k) {
        const int64_t buffer = (k - 1) * g.count + i, from = begin + (k - 1) * kSegment;
        T* const new_memory = memory_buffers + buffer * in_lines(l.memory());
        T* const new_link = link_buffers + buffer * in_lines(l.link());
        for (int64_t access = from; access < from + kSegment; ++access) {
          if (!writes(access, b)) continue;
          write_again(access, b, memory, new_memory);
          memory = new_memory;
        }
        LinkUpdate<T> updates[kSegment];
        const int64_t count = updates_of(from, from + kSegment, b, updates);
        for (int64_t q = 0; count > 0 && q < heads; ++q) {
          const int64_t at = q * l.step.slots * l.step.slots;
          relink<T>({l.step.slots, link + at, updates, count, q * l.step.slots, new_link + at});
        }
        if (count > 0) link = new_link;
        memory_at[k * g.count + i] = memory;
        link_at[k * g.count + i] = link;
      }
    }
  }

  void enter_segment(int64_t segment, int64_t end) {
    const int64_t size = in_lines(s.layout.memory());
    for (int64_t i = 0; i < g.count; ++i) {
      const T* memory = memory_of[i] = memory_at[segment * g.count + i];
      for (int64_t access = segment_begin; access < end; ++access) {
        const int64_t after = access - segment_begin + 1;
        T* const new_memory = segment_buffers + ((after - 1) * g.count + i) * size;
        if (writes(access, g.first + i)) {
          write_again(access, g.first + i, memory, new_memory);
          memory = new_memory;
        }
        memory_of[after * g.count + i] = memory;
      }
    }
  }

  void step_backward(int64_t access, int64_t b, uint8_t bits, const T* grad_reads, T* grad_interface) {
    const DncSequenceLayout& l = s.layout;
    const int64_t i = b - g.first, step = access - segment_begin;
    T* const numbers = row_of(g, access, b);
    const DncRow<const T> row = dnc_row<const T>(numbers, l);
    const int64_t segment = (segment_begin % l.sequence.spacing) / kSegment;
    DncState<const T> old = dnc_vectors(g, l, s.state, access, b);
    old.memory = memory_of[step * g.count + i];
    old.link = link_at[segment * g.count + i];
    LinkUpdate<T> pending[kSegment];
    const int64_t pending_count = updates_of(segment_begin, access, b, pending);
    DncState<const T> upstream = parts_of(grad_vectors[i]);
    upstream.memory = grad_memory[i];
    upstream.link = grad_link[i];
    DncState<T> grads = parts_of(const_cast<T*>(spare_vectors[i]));
    grads.memory =
        s.grad_state.memory ? s.grad_state.memory + b * l.memory() : grad_memory_buffers + i * in_lines(l.memory());
    grads.link = s.grad_state.link ? s.grad_state.link + b * l.link()
                 : access > 0      ? grad_link_buffers + i * in_lines(l.link())
                                   : nullptr; // nobody asks for it
    dnc_step_backward<T>({.layout = l.step,
                          .variant = s.variant,
                          .interface = numbers,
                          .state = old,
                          .new_state = {memory_of[(step + 1) * g.count + i], row.usage, nullptr, nullptr,
                                        row.write_weights, row.read_weights},
                          .tape = row.tape,
                          .grad_new_state = upstream,
                          .grad_reads = grad_reads,
                          .grad_interface = grad_interface,
                          .grad_state = grads,
                          .scratch = scratch,
                          .pending = pending,
                          .pending_count = pending_count,
                          .writes = bool(bits & kWrites),
                          .reads_from = bool(bits & kReads)});
    grad_memory[i] = grads.memory;
    grad_link[i] = grads.link;
    const T* const spare = grad_vectors[i];
    grad_vectors[i] = spare_vectors[i];
    spare_vectors[i] = spare;
  }

  // The gradients of the initial state, where no step left them.
  void finish() const {
    const DncSequenceLayout& l = s.layout;
    const int64_t n = l.step.slots, writes = l.step.write_heads * n, reads = l.step.read_heads * n;
    const auto settle = [](T* all, const T* found, int64_t b, int64_t size) {
      if (!all || found == all + b * size) return;
      if (found) copy(all + b * size, found, size);
      else clear(all + b * size, size);
    };
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t b = g.first + i;
      settle(s.grad_state.memory, grad_memory[i], b, l.memory());
      settle(s.grad_state.link, grad_link[i], b, l.link());
      const DncState<const T> grads = parts_of(grad_vectors[i]);
      settle(s.grad_state.usage, grads.usage, b, n);
      settle(s.grad_state.precedence, grads.precedence, b, writes);
      settle(s.grad_state.write_weights, grads.write_weights, b, writes);
      settle(s.grad_state.read_weights, grads.read_weights, b, reads);
    }
  }
};

template <class T> void dnc_sequence(const DncSequence<T>& s) {
  DncForward<T> memory(s);
  run_forward(s.forward, memory);
}

template <class T> void dnc_sequence_backward(const DncSequenceBackward<T>& s) {
  DncBackward<T> memory(s);
  run_backward(s.backward, memory);
  memory.finish();
}

template void dnc_sequence(const DncSequence<float>&);
template void dnc_sequence(const DncSequence<double>&);
template void dnc_sequence_backward(const DncSequenceBackward<float>&);
template void dnc_sequence_backward(const DncSequenceBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
