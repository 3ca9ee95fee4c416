// An NTM's memory through all time steps of a group of samples: csrc/cpu/sequence.h runs the controller around it.
//
// Forward, the memory is updated in place, where it stays in the cache, and copied to be kept. Backward, the accesses
// of a chunk between two kept memories are gone through segment by segment, and the memories of a segment written
// again: those that accesses begin with, and those that heads of one access see after others have written. Time is
// counted in accesses here.
#pragma once

#include "ntm_step_kernel.h"
#include "sequence.h"

namespace fastmem {

struct NtmSequenceLayout {
  SequenceLayout sequence;
  NtmLayout step;

  int64_t memory() const { return step.slots * step.word; }
  int64_t weights() const { return step.heads * step.slots; }
  int64_t fields() const { return 2 * weights(); } // weights, content weights
  // What the runs of one step write, one after the other.
  int64_t written() const { return in_lines(step.write_runs() * memory()); }
};

// Tensors of the whole batch.
template <class T> struct NtmSequence {
  NtmSequenceLayout layout;
  NtmVariant<T> variant;
  SequenceForward<T> forward;
  const T *memory, *weights; // initial
  T *new_memory, *memories;  // final; [kept,B,N,W], null where nothing is kept
  T* scratch;                // ntm_sequence_scratch
  const T** pointers;        // [count]
};

template <class T> struct NtmSequenceBackward {
  NtmSequenceLayout layout;
  NtmVariant<T> variant;
  SequenceBackward<T> backward;
  const T *memory, *weights, *memories;
  T *grad_memory, *grad_weights; // of the final state; become those of the initial one
  T* scratch;                    // ntm_sequence_backward_scratch
  const T** pointers;            // [ntm_sequence_backward_pointers]
};

inline int64_t ntm_sequence_scratch(const NtmSequenceLayout& l) { return in_lines(ntm_step_scratch(l.step)); }

inline int64_t ntm_sequence_backward_scratch(const NtmSequenceLayout& l, int64_t count) {
  return count * ((l.sequence.segments() - 1) * in_lines(l.memory()) + kSegment * l.written()) +
         in_lines(ntm_step_backward_scratch(l.step));
}

inline int64_t ntm_sequence_backward_pointers(const NtmSequenceLayout& l, int64_t count) {
  return count * (l.sequence.segments() + kSegment);
}

FASTMEM_EACH_ISA(template <class T> void ntm_sequence(const NtmSequence<T>& s);
                 template <class T> void ntm_sequence_backward(const NtmSequenceBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

// The part of a row that is the memory's.
template <class T> struct NtmRow {
  T *weights, *content; // [A,N] [A,N]
};

template <class T> NtmRow<T> ntm_row(const SequenceGroup<T>& g, const NtmSequenceLayout& l, int64_t access, int64_t b) {
  T* const fields = row_of(g, access, b) + l.sequence.memory_at();
  return {fields, fields + l.weights()};
}

// Before an access.
template <class T>
const T* ntm_weights(const SequenceGroup<T>& g, const NtmSequenceLayout& l, const T* initial, int64_t access,
                     int64_t b) {
  return access == 0 ? initial + b * l.weights() : ntm_row(g, l, access - 1, b).weights;
}

// Whether the memory changes: not where no head writes.
template <class T> bool ntm_writes(const SequenceGroup<T>& g, const NtmSequenceLayout& l, int64_t access, int64_t b) {
  return (bits_at(g, access, b) & kWrites) && l.step.write_runs() > 0;
}

template <class T> struct NtmForward {
  const NtmSequence<T>& s;
  const SequenceGroup<T>& g;
  const T** memory_now; // where each sample of the group has it

  explicit NtmForward(const NtmSequence<T>& sequence)
      : s(sequence), g(sequence.forward.group), memory_now(sequence.pointers) {
    for (int64_t i = 0; i < g.count; ++i) memory_now[i] = s.memory + (g.first + i) * s.layout.memory();
  }

  void step(int64_t access, int64_t b, uint8_t bits, T* reads) {
    const NtmSequenceLayout& l = s.layout;
    const bool writing = ntm_writes(g, l, access, b), reading = bits & kReads;
    const NtmRow<T> row = ntm_row(g, l, access, b);
    const T* const weights = ntm_weights(g, l, s.weights, access, b);
    const T*& memory = memory_now[b - g.first];
    T* const new_memory = s.new_memory + b * l.memory();
    if (!(bits & kWrites) || !reading) {
      copy(row.weights, weights, l.weights());
      clear(row.content, l.weights());
    }
    if (writing || reading)
      ntm_step<T>({.layout = l.step,
                   .variant = s.variant,
                   .interface = row_of(g, access, b),
                   .memory = memory,
                   .weights = weights,
                   .new_memory = new_memory,
                   .new_weights = row.weights,
                   .reads = reads,
                   .content = row.content,
                   .kept = nullptr,
                   .scratch = s.scratch,
                   .writes = writing,
                   .reads_from = reading});
    if (writing) memory = new_memory;
    keep(l.sequence, s.memories, memory, s.new_memory, l.memory(), access, b);
  }
};

template <class T> struct NtmBackward {
  const NtmSequenceBackward<T>& s;
  const SequenceGroup<T>& g;
  const T** memory_at; // [segments,count]: before the first access of each segment
  const T** memory_of; // [kSegment,count]: before each access of this segment
  T *memory_buffers, *segment_buffers, *scratch;
  int64_t segment_begin;

  explicit NtmBackward(const NtmSequenceBackward<T>& sequence) : s(sequence), g(sequence.backward.group) {
    const NtmSequenceLayout& l = s.layout;
    memory_at = s.pointers;
    memory_of = memory_at + l.sequence.segments() * g.count;
    Scratch<T> space{s.scratch};
    memory_buffers = space.take((l.sequence.segments() - 1) * g.count * in_lines(l.memory()));
    segment_buffers = space.take(kSegment * g.count * l.written());
    scratch = space.take(0);
    segment_begin = l.sequence.accesses;
  }

  // What an access wrote, again: each run to a place of its own, `pitch` after that of the run before; 0: all to one.
  const T* write_again(int64_t access, int64_t b, const T* memory, T* new_memory, int64_t pitch) const {
    const NtmLayout& l = s.layout.step;
    const T* const weights = ntm_row(g, s.layout, access, b).weights;
    Scratch<T> space{scratch};
    const NtmFields<T> f = constrain(static_cast<const T*>(row_of(g, access, b)), l, s.variant.clip, space, Of::writes);
    T* const gathered = space.take(l.write_heads() * l.slots);
    int64_t writer = 0;
    for (int64_t first = 0, last; first < l.heads; first = last) {
      last = l.run_end(first);
      const int64_t writes = write_run(l, f, weights, first, last, writer, memory, new_memory, gathered);
      if (writes == 0) break; // only the last run can be without
      memory = new_memory;
      new_memory += pitch;
      writer += writes;
    }
    return memory;
  }

  T* segment_buffer(int64_t step, int64_t i) const {
    return segment_buffers + (step * g.count + i) * s.layout.written();
  }

  // From the memory that was kept at the chunk's begin, those before each of its segments.
  void enter_chunk(int64_t chunk, int64_t end) {
    const NtmSequenceLayout& l = s.layout;
    const int64_t begin = chunk * l.sequence.spacing;
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t b = g.first + i;
      const T* memory = begin_of(l.sequence, s.memory + b * l.memory(), s.memories, l.memory(), chunk, b);
      memory_at[i] = memory;
      for (int64_t k = 1; begin + k * kSegment < end; ++k) {
        T* const new_memory = memory_buffers + ((k - 1) * g.count + i) * in_lines(l.memory());
        for (int64_t access = begin + (k - 1) * kSegment; access < begin + k * kSegment; ++access)
          if (ntm_writes(g, l, access, b)) memory = write_again(access, b, memory, new_memory, 0);
        memory_at[k * g.count + i] = memory;
      }
    }
  }

  void enter_segment(int64_t segment, int64_t end) {
    const NtmSequenceLayout& l = s.layout;
    const bool seen_within = l.step.kept_memories() > 0; // what a run writes, by another of the same step
    for (int64_t i = 0; i < g.count; ++i) {
      const int64_t b = g.first + i;
      const T* memory = memory_at[segment * g.count + i];
      for (int64_t access = segment_begin; access < end; ++access) {
        const int64_t step = access - segment_begin;
        memory_of[step * g.count + i] = memory;
        if (ntm_writes(g, l, access, b) && (seen_within || access + 1 < end))
          memory = write_again(access, b, memory, segment_buffer(step, i), l.memory());
      }
    }
  }

  void step_backward(int64_t access, int64_t b, uint8_t bits, const T* grad_reads, T* grad_interface) {
    const NtmSequenceLayout& l = s.layout;
    const int64_t i = b - g.first, step = access - segment_begin;
    const NtmRow<T> row = ntm_row(g, l, access, b);
    T *const grad_memory = s.grad_memory + b * l.memory(), *const grad_weights = s.grad_weights + b * l.weights();
    ntm_step_backward<T>({.layout = l.step,
                          .variant = s.variant,
                          .interface = row_of(g, access, b),
                          .memory = memory_of[step * g.count + i],
                          .weights = ntm_weights(g, l, s.weights, access, b),
                          .new_weights = row.weights,
                          .content = row.content,
                          .kept = segment_buffer(step, i),
                          .grad_new_memory = grad_memory,
                          .grad_new_weights = grad_weights,
                          .grad_reads = grad_reads,
                          .grad_interface = grad_interface,
                          .grad_memory = grad_memory,
                          .grad_weights = grad_weights,
                          .scratch = scratch,
                          .writes = bool(bits & kWrites),
                          .reads_from = bool(bits & kReads)});
  }
};

template <class T> void ntm_sequence(const NtmSequence<T>& s) {
  NtmForward<T> memory(s);
  run_forward(s.forward, memory);
}

template <class T> void ntm_sequence_backward(const NtmSequenceBackward<T>& s) {
  NtmBackward<T> memory(s);
  run_backward(s.backward, memory);
}

template void ntm_sequence(const NtmSequence<float>&);
template void ntm_sequence(const NtmSequence<double>&);
template void ntm_sequence_backward(const NtmSequenceBackward<float>&);
template void ntm_sequence_backward(const NtmSequenceBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
