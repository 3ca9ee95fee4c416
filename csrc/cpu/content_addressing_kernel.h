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
  T *grad_keys, *grad_strengths, *grad_key_mask; // [A,W] [A] [A,W]; unwanted: null
  T* scratch;                                    // addressing_scratch(heads, word)
};

// Elements of scratch that either direction needs.
int64_t addressing_scratch(int64_t heads, int64_t word);

FASTMEM_EACH_ISA(
  template <class T> void content_addressing(const Addressing<T>& s);
  template <class T> void content_addressing_backward(const AddressingBackward<T>& s);
)

} // namespace fastmem
