// Content scores: how much a key resembles the rows of a memory, one sample at a time.
//
//   score[h,i] = s[h] D[h,i],   D[h,i] = (k_h . m_i) / (|k_h| |m_i| + delta),   |x| = sqrt(max(sum x^2 + inside, floor))
//
// With a key mask c_h, D lies between c_h k_h and c_h m_i. A slot whose mask is false has score -inf.
#pragma once

#include "isa.h"

#include <cstdint>
#include <string>

namespace fastmem {

// A norm of the content scores as three numbers; the slope of |x| is x / |x|, and 0 where the floor is reached.
template <class T> struct Similarity {
  T inside, floor, delta;
};

// By name: inner, outer, rsqrt or clamp. Throws for another name.
template <class T> Similarity<T> similarity(const std::string& norm, double eps);

// What is compared with what. Heads share the memory, so keys of several samples over one memory are heads of one search.
template <class T> struct Search {
  int64_t slots, heads, word;
  const T* memory; // [N,W]
  int64_t memory_row;
  const T *keys, *strengths, *key_mask; // [A,W] [A] [A,W]; no key mask: null
  const bool* slot_mask;                // [N]; none: null
  Similarity<T> similarity;
};

} // namespace fastmem
