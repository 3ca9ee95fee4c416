// Which instruction set runs. Kernels live in one namespace per set; FASTMEM_ON_ISA calls the chosen one.
#pragma once

namespace fastmem {

enum class Isa { baseline, avx2, avx512 };

Isa widest_isa();         // what this processor and this build have
Isa isa();                // what the kernels use now
void set_isa(Isa choice); // at most widest_isa()

} // namespace fastmem

#if defined(__x86_64__)
#define FASTMEM_EACH_ISA(...) \
  namespace baseline { \
  __VA_ARGS__ \
  } \
  namespace avx2 { \
  __VA_ARGS__ \
  } \
  namespace avx512 { \
  __VA_ARGS__ \
  }
#define FASTMEM_ON_ISA(...) \
  do { \
    switch (::fastmem::isa()) { \
      case ::fastmem::Isa::avx512: ::fastmem::avx512::__VA_ARGS__; break; \
      case ::fastmem::Isa::avx2: ::fastmem::avx2::__VA_ARGS__; break; \
      default: ::fastmem::baseline::__VA_ARGS__; \
    } \
  } while (false)
#else
#define FASTMEM_EACH_ISA(...) \
  namespace baseline { \
  __VA_ARGS__ \
  }
#define FASTMEM_ON_ISA(...) ::fastmem::baseline::__VA_ARGS__
#endif
