// Memory for large results, kept for the next result of the same size when torch lets go of it.
//
// glibc returns large blocks to the system when they are freed, and the kernel hands them out again page by page, at
// about 250 us a MiB: several times what temporal_linkage needs to fill one. A training loop frees and asks for the
// same sizes at every step.
#pragma once

#include "tensor.h"

namespace fastmem {

// Like `empty`, uninitialised.
Tensor empty_large(const Tensor& like, std::initializer_list<int64_t> sizes);
Tensor empty_large(const Tensor& like); // of the same shape

// For tests: new results hold NaN until they are written.
void set_poison(bool poison);

// Returns what is kept to the system; gives its size in bytes.
int64_t empty_cache();

} // namespace fastmem
