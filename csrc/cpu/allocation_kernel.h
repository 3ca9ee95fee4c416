// Allocation of one sample: write weights that prefer the least used slots.
//
//   u = eps + (1 - eps) usage,   order = stable ascending argsort of u
//   weights[order[j]] = (1 - u[order[j]]) prod_{i<j} u[order[i]]
//
// A later write head sees the usage that the earlier ones would leave: usage + (1 - usage) gates[q] weights[q].
#pragma once

#include "isa.h"

#include <cstdint>

namespace fastmem {

template <class T> struct Allocation {
  int64_t slots, write_heads;
  const T *usage, *gates; // [N] [Q]; gates may be null for one head
  double eps;
  T* weights; // [Q,N]
  T* scratch; // allocation_scratch(slots)
};

template <class T> struct AllocationBackward {
  int64_t slots, write_heads;
  const T *usage, *gates, *weights; // [N] [Q] [Q,N]
  const T* grad_weights;            // [Q,N]
  double eps;
  T *grad_usage, *grad_gates; // [N] [Q]; unwanted gates: null
  T* scratch;                 // allocation_backward_scratch(slots, write_heads)
};

// Two lists of sort keys and slots, and a usage.
inline int64_t allocation_scratch(int64_t slots) { return 5 * (slots + 16); }
// The same, the usage that each head but the first sees, and four numbers of every slot on the way back.
inline int64_t allocation_backward_scratch(int64_t slots, int64_t write_heads) {
  return allocation_scratch(slots) + (write_heads + 3) * (slots + 16);
}

FASTMEM_EACH_ISA(template <class T> void allocation(const Allocation<T>& s);
                 template <class T> void allocation_backward(const AllocationBackward<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

template <class T> struct SortKey;
template <> struct SortKey<float> {
  using type = uint32_t;
};
template <> struct SortKey<double> {
  using type = uint64_t;
};

// A slot and its usage as an unsigned number of the same order; NaN comes last, as torch.sort has it.
template <class T> struct SortEntry {
  typename SortKey<T>::type key, slot;
};

// Up to here every slot is compared with every other; more are sorted by counting bytes.
inline constexpr int64_t kComparedSlots = kVectorBytes == 64 ? 512 : 128;

template <class T> FASTMEM_INLINE typename SortKey<T>::type sort_key(T value) {
  using Key = typename SortKey<T>::type;
  constexpr Key sign = Key(1) << (8 * sizeof(Key) - 1);
  if (value != value) return ~Key(0);
  value += T(0); // -0 becomes 0
  Key bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits & sign ? ~bits : bits | sign;
}

// Stable, by bytes from the lowest; a byte that all keys gain costs one count. Returns the list that holds the result.
template <class T> SortEntry<T>* sort_slots(SortEntry<T>* from, SortEntry<T>* to, int64_t count) {
  using Key = typename SortKey<T>::type;
  for (int shift = 0; shift < 8 * int(sizeof(Key)); shift += 8) {
    int64_t starts[256] = {};
    for (int64_t i = 0; i < count; ++i) ++starts[(from[i].key >> shift) & 255];
    if (count == 0 || starts[(from[0].key >> shift) & 255] == count) continue;
    int64_t start = 0;
    for (int64_t& entry : starts) {
      const int64_t size = entry;
      entry = start;
      start += size;
    }
    for (int64_t i = 0; i < count; ++i) to[starts[(from[i].key >> shift) & 255]++] = from[i];
    SortEntry<T>* const sorted = to;
    to = from;
    from = sorted;
  }
  return from;
}

template <class T> FASTMEM_INLINE T floored(T usage, double eps) { return T(eps) + T(1 - eps) * usage; }
template <class T> FASTMEM_INLINE Vec<T> floored(Vec<T> usage, double eps) { return T(eps) + T(1 - eps) * usage; }

// out[i] = fold(... fold(start, u[j]) ...) over the slots j before slot i in the order: those less used, and those as
// much used of a lower index. u: floored usage in whole vectors, without NaN. For `Vectors` vectors of slots from
// `begin` on, each of which is compared with a slot that is loaded once.
template <int Vectors, class T, class Fold>
FASTMEM_INLINE void fold_before(const T* u, int64_t slots, int64_t begin, T start, const Fold& fold, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> own[Vectors], folded[Vectors];
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) {
    own[v] = load(u + begin + v * lanes);
    folded[v] = broadcast(start);
  }
  const auto compare = [&](int64_t j, const auto& before) __attribute__((always_inline)) {
    const Vec<T> used = broadcast(u[j]);
#pragma GCC unroll 4
    for (int v = 0; v < Vectors; ++v) folded[v] = before(v, used) ? fold(folded[v], used) : folded[v];
  };
  const int64_t end = begin + Vectors * lanes;
  for (int64_t j = 0; j < begin; ++j) compare(j, [&](int v, Vec<T> used) { return used <= own[v]; });
#pragma GCC unroll 4
  for (int block = 0; block < Vectors; ++block)
    for (int64_t lane = 0; lane < lanes && begin + block * lanes + lane < slots; ++lane)
      compare(begin + block * lanes + lane, [&](int v, Vec<T> used) __attribute__((always_inline)) {
        if (v > block) return used <= own[v];
        const IntVec<T> less = used < own[v];
        return v < block ? less : less | ((used == own[v]) & (IntVec<T>{} + Int<T>(lane) < lane_index<T>()));
      });
  for (int64_t j = end; j < slots; ++j) compare(j, [&](int v, Vec<T> used) { return used < own[v]; });
#pragma GCC unroll 4
  for (int v = 0; v < Vectors; ++v) store(out + begin + v * lanes, folded[v]);
}

// The same for all slots. u and out: room for whole vectors.
template <class T, class Fold> void fold_before(const T* u, int64_t slots, T start, const Fold& fold, T* out) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t begin = 0; begin < slots; begin += 4 * lanes) switch ((slots - begin + lanes - 1) / lanes) {
      case 1: fold_before<1>(u, slots, begin, start, fold, out); break;
      case 2: fold_before<2>(u, slots, begin, start, fold, out); break;
      case 3: fold_before<3>(u, slots, begin, start, fold, out); break;
      default: fold_before<4>(u, slots, begin, start, fold, out);
    }
}

// Floored usage in whole vectors to compare by: NaN counts as infinite, and so comes last.
template <class T> void comparable(const T* usage, int64_t slots, double eps, T* u) {
  for (int64_t i = 0; i < slots; i += kLanes<T>) {
    const Vec<T> used = floored<T>(load_upto(usage + i, slots - i), eps);
    store(u + i, used == used ? used : broadcast(T(__builtin_inf())));
  }
}

// Slots in ascending order of usage.
template <class T> SortEntry<T>* order_of(const T* usage, int64_t slots, double eps, T* scratch) {
  SortEntry<T>* const entries = reinterpret_cast<SortEntry<T>*>(scratch);
  if (slots <= kComparedSlots) {
    T *const u = scratch + 2 * (slots + 16), *const ranks = u + slots + 16; // a rank is how many come before
    comparable(usage, slots, eps, u);
    fold_before(u, slots, T(0), [](Vec<T> count, Vec<T>) { return count + T(1); }, ranks);
    for (int64_t i = 0; i < slots; ++i) entries[int64_t(ranks[i])].slot = typename SortKey<T>::type(i);
    return entries;
  }
  for (int64_t i = 0; i < slots; ++i) entries[i] = {sort_key(floored(usage[i], eps)), typename SortKey<T>::type(i)};
  return sort_slots(entries, entries + slots, slots);
}

// What the head leaves for the next: usage + (1 - usage) gate weights.
template <class T> void simulate(const T* usage, T gate, const T* weights, T* left, int64_t slots) {
  for (int64_t i = 0; i < slots; i += kLanes<T>) {
    const Vec<T> used = load_upto(usage + i, slots - i);
    store_upto(left + i, used + (T(1) - used) * (gate * load_upto(weights + i, slots - i)), slots - i);
  }
}

template <class T> void allocation(const Allocation<T>& s) {
  const int64_t n = s.slots;
  const double eps = s.eps;
  const T* usage = s.usage;
  T* const left = s.scratch + 4 * (n + 16);
  for (int64_t q = 0; q < s.write_heads; ++q) {
    T* const weights = s.weights + q * n;
    if (n <= kComparedSlots) {
      T *const u = s.scratch, *const earlier = u + n + 16;
      comparable(usage, n, eps, u);
      fold_before(u, n, T(1), [](Vec<T> product, Vec<T> used) { return product * used; }, earlier);
      map(weights, n, [eps](Vec<T> used, Vec<T> product) { return (T(1) - floored<T>(used, eps)) * product; }, usage,
          earlier);
    } else {
      const SortEntry<T>* const order = order_of(usage, n, eps, s.scratch);
      T earlier = 1;
      for (int64_t j = 0; j < n; ++j) {
        const T used = floored(usage[order[j].slot], eps);
        weights[order[j].slot] = (1 - used) * earlier;
        earlier *= used;
      }
    }
    if (q + 1 == s.write_heads) break;
    simulate(usage, s.gates[q], weights, left, n);
    usage = left;
  }
}

// With s = u in order and g = grad_weights in order, and no division:
//   earlier[j] = s[j-1] earlier[j-1], from the least used slot up
//   later[j] = g[j+1] (1 - s[j+1]) + s[j+1] later[j+1], from the most used slot down
//   grad s[j] = (later[j] - g[j]) earlier[j]
template <class T> void allocation_backward(const AllocationBackward<T>& s) {
  const int64_t n = s.slots, row = n + 16;
  const double eps = s.eps;
  T *const seen = s.scratch + allocation_scratch(n), *const earlier = s.scratch + 4 * (n + 16),
           *const grad = seen + (s.write_heads - 1) * row, *const used = grad + row, *const gain = used + row,
           *const later = gain + row;
  const auto usage_of = [&](int64_t q) { return q == 0 ? s.usage : seen + (q - 1) * row; };
  for (int64_t q = 0; q + 1 < s.write_heads; ++q)
    simulate(usage_of(q), s.gates[q], s.weights + q * n, seen + q * row, n);
  for (int64_t i = 0; i < n; ++i) s.grad_usage[i] = 0;
  for (int64_t q = s.write_heads - 1; q >= 0; --q) {
    const T *const usage = usage_of(q), *const weights = s.weights + q * n;
    const bool passes_on = q + 1 < s.write_heads;
    const T gate = passes_on ? s.gates[q] : T(0);
    Vec<T> grad_gate{};
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      Vec<T> g = load_upto(s.grad_weights + q * n + i, n - i);
      if (passes_on) {
        const Vec<T> used = load_upto(usage + i, n - i), after = load_upto(s.grad_usage + i, n - i);
        const Vec<T> w = load_upto(weights + i, n - i), reached = after * (T(1) - used);
        grad_gate += reached * w;
        g += gate * reached;
        store_upto(s.grad_usage + i, after * (T(1) - gate * w), n - i);
      }
      store_upto(grad + i, g, n - i);
    }
    if (s.grad_gates) s.grad_gates[q] = sum<T>(grad_gate);

    const SortEntry<T>* const order = order_of(usage, n, eps, s.scratch);
    for (int64_t i = 0; i < n; i += kLanes<T>) {
      const Vec<T> u = floored<T>(load_upto(usage + i, n - i), eps);
      store(used + i, u);
      store(gain + i, load_upto(grad + i, n - i) * (T(1) - u));
    }
    // Both together, as neither waits for the other; results by slot.
    T product = 1, rest = 0;
    for (int64_t j = 0; j < n; ++j) {
      const int64_t up = int64_t(order[j].slot), down = int64_t(order[n - 1 - j].slot);
      earlier[up] = product;
      product *= used[up];
      later[down] = rest;
      rest = gain[down] + used[down] * rest;
    }
    map(s.grad_usage, n, [eps](Vec<T> total, Vec<T> before, Vec<T> after, Vec<T> g) {
      return total + T(1 - eps) * (before * (after - g));
    }, s.grad_usage, earlier, later, grad);
  }
}

template void allocation(const Allocation<float>&);
template void allocation(const Allocation<double>&);
template void allocation_backward(const AllocationBackward<float>&);
template void allocation_backward(const AllocationBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
