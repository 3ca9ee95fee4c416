// Which stored programs a sample uses: a softmax over the programs of content scores. program_mix_kernel.h has the
// rest.
//
// Samples share the keys of the programs, so the queries of several samples are the heads of one search.
#pragma once

#include "content_addressing_kernel.h"

namespace fastmem {

// Some samples, at most kSearchBlock.
template <class T> struct ProgramSearch {
  int64_t samples, programs, key;
  const T *query, *strength, *keys; // [B,K] [B] [P,K]
  int64_t keys_row;
  Similarity<T> similarity;
  T* scratch; // addressing_scratch(samples, key)
};

template <class T> struct ProgramSearchBackward {
  ProgramSearch<T> search;
  const T *program_weights, *grad_program_weights; // [B,P] [B,P]
  T *grad_query, *grad_strength;                   // [B,K] [B]; unwanted: null
  T* grad_keys;                                    // [P,K], of these samples alone; unwanted: null
};

inline constexpr int64_t kSearchBlock = 16;

FASTMEM_EACH_ISA(template <class T> void program_search(const ProgramSearch<T>& s, T* program_weights);
                 template <class T> void program_search_backward(const ProgramSearchBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

template <class T> Search<T> search_of(const ProgramSearch<T>& s) {
  return {.slots = s.programs,
          .heads = s.samples,
          .word = s.key,
          .memory = s.keys,
          .memory_row = s.keys_row,
          .keys = s.query,
          .strengths = s.strength,
          .key_mask = nullptr,
          .slot_mask = nullptr,
          .similarity = s.similarity};
}

template <class T> void program_search(const ProgramSearch<T>& s, T* program_weights) {
  content_addressing(Addressing<T>{
      .search = search_of(s), .weights = program_weights, .weights_row = s.programs, .scratch = s.scratch});
}

template <class T> void program_search_backward(const ProgramSearchBackward<T>& s) {
  content_addressing_backward(AddressingBackward<T>{.search = search_of(s.search),
                                                    .weights = s.program_weights,
                                                    .grad_weights = s.grad_program_weights,
                                                    .weights_row = s.search.programs,
                                                    .grad_memory = s.grad_keys,
                                                    .grad_memory_row = s.search.key,
                                                    .accumulate = false,
                                                    .grad_keys = s.grad_query,
                                                    .grad_strengths = s.grad_strength,
                                                    .grad_key_mask = nullptr,
                                                    .scratch = s.search.scratch});
}

template void program_search(const ProgramSearch<float>&, float*);
template void program_search(const ProgramSearch<double>&, double*);
template void program_search_backward(const ProgramSearchBackward<float>&);
template void program_search_backward(const ProgramSearchBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
