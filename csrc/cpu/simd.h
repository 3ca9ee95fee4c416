// Vectors of the width of one instruction set, on GNU vector types: + - * / and comparisons are the language's own.
// Included only by kernel units, which define FASTMEM_ISA. No std templates here: a linker could keep the wide copy.
#pragma once

#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastmem::FASTMEM_ISA {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
#else
inline constexpr int kVectorBytes = 16;
#endif

template <class T> struct VectorType;
template <> struct VectorType<float> {
  typedef float values __attribute__((vector_size(kVectorBytes)));
  typedef int32_t integers __attribute__((vector_size(kVectorBytes)));
};
template <> struct VectorType<double> {
  typedef double values __attribute__((vector_size(kVectorBytes)));
  typedef int64_t integers __attribute__((vector_size(kVectorBytes)));
};
template <class T> using Vec = typename VectorType<T>::values;
template <class T> using IntVec = typename VectorType<T>::integers;
template <class T> using Int = __typeof__(IntVec<T>{}[0] + 0);
template <class T> inline constexpr int kLanes = kVectorBytes / int(sizeof(T));

#define FASTMEM_INLINE inline __attribute__((always_inline))

// Sums over rows collect over this many before they join the total: a long sum stays as exact as a tree.
inline constexpr int64_t kSumBlock = 64;

template <class T> FASTMEM_INLINE Vec<T> broadcast(T x) { return x - Vec<T>{}; }

template <class T> FASTMEM_INLINE Vec<T> load(const T* p) {
  Vec<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

template <class T> FASTMEM_INLINE void store(T* p, Vec<T> v) { __builtin_memcpy(p, &v, sizeof v); }

template <class T> FASTMEM_INLINE IntVec<T> lane_index() {
  IntVec<T> index;
  for (int lane = 0; lane < kLanes<T>; ++lane) index[lane] = lane;
  return index;
}

// The first `count` lanes; the others read as zero and are not written.
template <class T> FASTMEM_INLINE Vec<T> load_part(const T* p, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  else return (Vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
#elif defined(__AVX2__)
  const __m256i within = (__m256i)(lane_index<T>() < IntVec<T>{} + Int<T>(count));
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_maskload_ps(p, within);
  else return (Vec<T>)_mm256_maskload_pd(p, within);
#else
  Vec<T> v{};
  for (int64_t lane = 0; lane < count; ++lane) v[lane] = p[lane];
  return v;
#endif
}

template <class T> FASTMEM_INLINE void store_part(T* p, Vec<T> v, int64_t count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
  else _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
#elif defined(__AVX2__)
  const __m256i within = (__m256i)(lane_index<T>() < IntVec<T>{} + Int<T>(count));
  if constexpr (sizeof(T) == 4) _mm256_maskstore_ps(p, within, (__m256)v);
  else _mm256_maskstore_pd(p, within, (__m256d)v);
#else
  for (int64_t lane = 0; lane < count; ++lane) p[lane] = v[lane];
#endif
}

// `count` at least the full width means all of it.
template <class T> FASTMEM_INLINE Vec<T> load_upto(const T* p, int64_t count) {
  return count >= kLanes<T> ? load(p) : load_part(p, count);
}

template <class T> FASTMEM_INLINE void store_upto(T* p, Vec<T> v, int64_t count) {
  if (count >= kLanes<T>) store(p, v);
  else store_part(p, v, count);
}

// The first `count` lanes of a vector, and 0 for the others.
template <class T> FASTMEM_INLINE Vec<T> first_lanes(Vec<T> v, int64_t count) {
  return lane_index<T>() < IntVec<T>{} + Int<T>(count < kLanes<T> ? count : kLanes<T>) ? v : Vec<T>{};
}

// Half a vector from `low`, the other half from `high`.
template <class T> FASTMEM_INLINE Vec<T> load_halves(const T* low, const T* high) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4)
    return (Vec<T>)_mm512_insertf32x8(_mm512_zextps256_ps512(_mm256_loadu_ps(low)), _mm256_loadu_ps(high), 1);
  else return (Vec<T>)_mm512_insertf64x4(_mm512_zextpd256_pd512(_mm256_loadu_pd(low)), _mm256_loadu_pd(high), 1);
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_loadu2_m128(high, low);
  else return (Vec<T>)_mm256_loadu2_m128d(high, low);
#elif defined(__x86_64__)
  const __m128d lower = _mm_load_sd((const double*)low);
  return (Vec<T>)_mm_loadh_pd(lower, (const double*)high);
#else
  Vec<T> v;
  __builtin_memcpy(&v, low, sizeof v / 2);
  __builtin_memcpy((char*)&v + sizeof v / 2, high, sizeof v / 2);
  return v;
#endif
}

// Half a vector, twice.
template <class T> FASTMEM_INLINE Vec<T> load_twice(const T* p) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_maskz_broadcast_f32x8(__mmask16(-1), _mm256_loadu_ps(p));
  else return (Vec<T>)_mm512_maskz_broadcast_f64x4(__mmask8(-1), _mm256_loadu_pd(p));
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm256_broadcast_ps((const __m128*)p);
  else return (Vec<T>)_mm256_broadcast_pd((const __m128d*)p);
#else
  return load_halves(p, p);
#endif
}

// Compile-time numbers for generic lambdas, and loads and stores that take a flag.
template <bool Value> struct Bool {
  static constexpr bool value = Value;
};

template <int Value> struct Count {
  static constexpr int value = Value;
};

template <bool Part, class T> FASTMEM_INLINE Vec<T> load_tile(const T* p, int64_t count) {
  if constexpr (Part) return load_part(p, count);
  else return load(p);
}

template <bool Part, class T> FASTMEM_INLINE void store_tile(T* p, Vec<T> v, int64_t count) {
  if constexpr (Part) store_part(p, v, count);
  else store(p, v);
}

// columns(first, Count of vectors) over `count` numbers: Widest vectors at a time, then two, then one, which may be
// partial.
template <int Widest, class T, class Columns>
FASTMEM_INLINE void for_each_width(int64_t count, const Columns& columns) {
  constexpr int64_t lanes = kLanes<T>;
  int64_t k = 0;
  for (; k + Widest * lanes <= count; k += Widest * lanes) columns(k, Count<Widest>{});
  if constexpr (Widest > 2)
    for (; k + 2 * lanes <= count; k += 2 * lanes) columns(k, Count<2>{});
  for (; k < count; k += lanes) columns(k, Count<1>{});
}

// Sum over lanes, as a tree: the order depends on nothing but the width.
template <class T> FASTMEM_INLINE T sum(Vec<T> v) {
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) v += __builtin_shuffle(v, lane_index<T>() ^ half);
  return v[0];
}

// Lane l of the result is the sum of rows[l]; one add and two shuffles per row instead of a tree for each. Destroys
// rows.
template <class T> FASTMEM_INLINE Vec<T> sum_rows(Vec<T> (&rows)[kLanes<T>]) {
  const IntVec<T> lane = lane_index<T>();
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    const IntVec<T> upper = (lane & half) != 0;
#pragma GCC unroll 8
    for (int i = 0; i < half; ++i) {
      const Vec<T> low = rows[i], high = rows[i + half];
      rows[i] = (upper ? high : low) + __builtin_shuffle(low, high, (lane ^ half) + (upper & kLanes<T>));
    }
  }
  return rows[0];
}

// Lane k of rows[i] becomes lane i of rows[k].
template <class T> FASTMEM_INLINE void transpose_square(Vec<T> (&rows)[kLanes<T>]) {
  const IntVec<T> lane = lane_index<T>();
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    const IntVec<T> upper = (lane & half) != 0;
#pragma GCC unroll 16
    for (int i = 0; i < kLanes<T>; ++i) {
      if (i & half) continue;
      const Vec<T> low = rows[i], high = rows[i + half];
      rows[i] = __builtin_shuffle(low, high, upper ? lane - half + kLanes<T> : lane);
      rows[i + half] = __builtin_shuffle(low, high, upper ? lane + kLanes<T> : lane + half);
    }
  }
}

// out[column, row] = in[row, column], and 0 for the rows from `rows` on to `width`.
template <class T>
void transpose(const T* in, int64_t in_row, int64_t rows, int64_t columns, T* out, int64_t out_row, int64_t width) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t row = 0; row < width; row += lanes) {
    for (int64_t column = 0; column < columns; column += lanes) {
      Vec<T> square[lanes];
#pragma GCC unroll 16
      for (int r = 0; r < lanes; ++r)
        square[r] = row + r < rows ? load_upto(in + (row + r) * in_row + column, columns - column) : Vec<T>{};
      transpose_square<T>(square);
#pragma GCC unroll 16
      for (int c = 0; c < lanes; ++c)
        if (column + c < columns) store_upto(out + (column + c) * out_row + row, square[c], width - row);
    }
  }
}

// sums[i] = sum of rows[i], for any number of rows.
template <int First = 0, int Count, class T>
FASTMEM_INLINE void sum_each(const Vec<T> (&rows)[Count], T (&sums)[Count]) {
  constexpr int taken = Count - First < kLanes<T> ? Count - First : kLanes<T>;
  Vec<T> group[kLanes<T>] = {};
#pragma GCC unroll 16
  for (int i = 0; i < kLanes<T>; ++i)
    if (i < taken) group[i] = rows[First + (i < taken ? i : 0)];
  store_upto(sums + First, sum_rows<T>(group), taken);
  if constexpr (First + taken < Count) sum_each<First + taken>(rows, sums);
}

// The same pointer, of which the compiler forgets what it knows: loads through it are broadcast where they are used,
// not kept in registers that a loop needs for its sums, and spilled from there.
template <class T> FASTMEM_INLINE const T* opaque(const T* p) {
  __asm__("" : "+r"(p));
  return p;
}

template <class T> FASTMEM_INLINE T max(Vec<T> v) { // of numbers; a NaN lane may be lost
#pragma GCC unroll 4
  for (int half = kLanes<T> / 2; half > 0; half /= 2) {
    const Vec<T> other = __builtin_shuffle(v, lane_index<T>() ^ half);
    v = v > other ? v : other;
  }
  return v[0];
}

template <class T> FASTMEM_INLINE Vec<T> sqrt(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
#if defined(__AVX512F__)
  if constexpr (single) return (Vec<T>)_mm512_maskz_sqrt_ps(__mmask16(-1), (__m512)x);
  else return (Vec<T>)_mm512_maskz_sqrt_pd(__mmask8(-1), (__m512d)x);
#elif defined(__AVX2__)
  if constexpr (single) return (Vec<T>)_mm256_sqrt_ps((__m256)x);
  else return (Vec<T>)_mm256_sqrt_pd((__m256d)x);
#elif defined(__x86_64__)
  if constexpr (single) return (Vec<T>)_mm_sqrt_ps((__m128)x);
  else return (Vec<T>)_mm_sqrt_pd((__m128d)x);
#else
  for (int lane = 0; lane < kLanes<T>; ++lane)
    x[lane] = single ? T(__builtin_sqrtf(float(x[lane]))) : T(__builtin_sqrt(x[lane]));
  return x;
#endif
}

// 1 / x to about its last bit, for x between 2^-100 and 2^100: a fourth of the time of a wide division.
template <class T> FASTMEM_INLINE Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    const Vec<T> near = (Vec<T>)_mm512_maskz_rcp14_ps(__mmask16(-1), (__m512)x);
    return near + near * (T(1) - x * near);
  }
#endif
  return T(1) / x;
}

// e^x for x <= about 88 (709): x = n ln 2 + r, |r| <= ln 2 / 2, Taylor in r. Under- and -inf give 0, NaN gives NaN.
template <class T> FASTMEM_INLINE Vec<T> exp(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr T lowest = single ? T(-87.33654) : T(-708.3964185322641);
  constexpr T round =
      single ? T(12582912.0) : T(6755399441055744.0); // 1.5 * 2^(mantissa bits): adding it rounds to an integer
  const IntVec<T> vanishes = x < lowest;
  const Vec<T> bounded = vanishes ? broadcast(lowest) : x;
  const Vec<T> n = (bounded * T(1.4426950408889634) + round) - round;
  Vec<T> r = bounded - n * (single ? T(0.693359375) : T(6.93147180369123816490e-01));
  r = r - n * (single ? T(-2.12194440e-4) : T(1.90821492927058770002e-10));
  constexpr double factorial[] = {1,    1,     2,      6,       24,       120,       720,
                                  5040, 40320, 362880, 3628800, 39916800, 479001600, 6227020800};
  constexpr int degree = single ? 7 : 13;
  Vec<T> series = broadcast(T(1 / factorial[degree]));
#pragma GCC unroll 14
  for (int k = degree - 1; k >= 0; --k) series = series * r + T(1 / factorial[k]);
  const IntVec<T> exponent = __builtin_convertvector(n, IntVec<T>) + (single ? 127 : 1023);
  const Vec<T> power = (Vec<T>)(exponent << (single ? 23 : 52));
  return vanishes ? Vec<T>{} : series * power;
}

// ln x: x = 2^e m with m within a factor sqrt(2) of 1, then the series of atanh in (m - 1) / (m + 1). 0 gives -inf, a
// negative number NaN.
template <class T> FASTMEM_INLINE Vec<T> log(Vec<T> x) {
  constexpr bool single = sizeof(T) == 4;
  constexpr Int<T> root_half = single ? Int<T>(0x3f3504f3) : Int<T>(0x3fe6a09e667f3bcd);
  constexpr Int<T> mantissa = single ? Int<T>(0x007fffff) : Int<T>(0x000fffffffffffff);
  const IntVec<T> bits = (IntVec<T>)x - root_half;
  const Vec<T> e = __builtin_convertvector(bits >> (single ? 23 : 52), Vec<T>);
  const Vec<T> f = (Vec<T>)((bits & mantissa) + root_half) - T(1);
  const Vec<T> s = f / (f + T(2)), z = s * s;
  constexpr int terms = single ? 5 : 11;
  Vec<T> series = broadcast(T(2.0 / (2 * terms + 1)));
#pragma GCC unroll 11
  for (int k = terms - 1; k > 0; --k) series = series * z + T(2.0 / (2 * k + 1));
  const Vec<T> half = T(0.5) * f * f;
  const Vec<T> low = s * (half + z * series) + e * (single ? T(9.0580006145e-06) : T(1.90821492927058770002e-10));
  const Vec<T> value = e * (single ? T(6.9313812256e-01) : T(6.93147180369123816490e-01)) - ((half - low) - f);
  const T infinity = __builtin_inf();
  const Vec<T> edge = x == T(0) ? broadcast(-infinity) : x < T(0) ? broadcast(T(__builtin_nan(""))) : x; // inf, NaN
  return (x > T(0)) & (x < infinity) ? value : edge;
}

} // namespace fastmem::FASTMEM_ISA
