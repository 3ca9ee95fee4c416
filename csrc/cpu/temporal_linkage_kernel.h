// Temporal linkage of one sample and write head: update, forward and backward reads in one pass over the link matrix.
//
//   link'[i,j] = (1 - w[i] - w[j]) link[i,j] + w[i] p[j],  0 where i = j
//   p' = (1 - sum w) p + w,   forward[r,i] = sum_j link'[i,j] r[j],   backward[r,j] = sum_i link'[i,j] r[i]
#pragma once

#include "isa.h"

#include <cstdint>

namespace fastmem {

template <class T> struct Linkage {
  int64_t slots, read_heads;
  const T *link, *precedence, *write_weights, *read_weights; // [N,N] [N] [N] [R,N]
  int64_t link_row;                                          // distance of two rows of `link`
  T *new_link, *new_precedence;                              // [N,N] [N]; may be `link` and `precedence`
  int64_t new_link_row;
  T *forward, *backward; // [R,N] [R,N]
  T* columns;            // scratch [R,N]
  bool updates = true;   // else new_link is read as it is, and nothing else
};

// A step that the link went through: w and p of the update above.
template <class T> struct LinkUpdate {
  const T *write_weights, *precedence; // [N] [N]
};

// Several updates in one pass: new_link is what they make of `link`.
template <class T> struct Relinking {
  int64_t slots;
  const T* link; // [N,N]
  const LinkUpdate<T>* updates;
  int64_t count, offset; // the offset: as that of `pending` below
  T* new_link;           // [N,N]; may be `link`
};

template <class T> struct LinkageBackward {
  int64_t slots, read_heads;
  const T *link, *precedence, *write_weights, *read_weights;
  int64_t link_row;
  const LinkUpdate<T>* pending = nullptr;        // what `link` has yet to go through before this step
  int64_t pending_count = 0, pending_offset = 0; // the offset: to this write head in the vectors of the updates
  const T *grad_new_link, *grad_new_precedence, *grad_forward, *grad_backward; // absent: a row of zeros, stride 0
  int64_t grad_new_link_row, grad_read_row;                                    // grad_read_row: of forward and backward
  T* grad_link;                                                                // unwanted: a scratch row, stride 0
  int64_t grad_link_row;
  T *grad_precedence, *grad_write_weights;               // [N] [N]
  T* grad_read_weights;                                  // [R,N], added to: write heads share the read weights
  T *along_forward = nullptr, *along_backward = nullptr; // [R]: <grad_forward, forward>, its like; unwanted: null
  bool updates = true;                                   // else write_weights are zero, and link' is `link`
  T* partial;                                            // scratch [kBackwardRows, N], used with more than 4 read heads
  T* columns;                                            // scratch [R + 2, N]
};

inline constexpr int kBackwardRows = 4;

FASTMEM_EACH_ISA(template <class T> void temporal_linkage(const Linkage<T>& s);
                 template <class T> void temporal_linkage_backward(const LinkageBackward<T>& s);
                 template <class T> void relink(const Relinking<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

// Up to this many read heads share a pass; their row sums then fit the registers beside everything else.
inline constexpr int kReadGroup = 4;

// Calls tile(column, columns, crosses the diagonal, is partial) over rows [row, row + rows) of N columns, vector by
// vector.
template <class T, class Tile>
FASTMEM_INLINE void for_each_tile(int64_t n, int64_t row, int64_t rows, const Tile& tile) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t whole = n / lanes * lanes;
  int64_t before = row / lanes * lanes, after = (row + rows + lanes - 1) / lanes * lanes;
  before = before < whole ? before : whole;
  after = after < whole ? after : whole;
  int64_t j = 0;
  for (; j < before; j += lanes) tile(j, lanes, Bool<false>{}, Bool<false>{});
  for (; j < after; j += lanes) tile(j, lanes, Bool<true>{}, Bool<false>{});
  for (; j < whole; j += lanes) tile(j, lanes, Bool<false>{}, Bool<false>{});
  if (j < n) tile(j, n - j, Bool<true>{}, Bool<true>{});
}

template <bool Diagonal, class T> FASTMEM_INLINE Vec<T> off_diagonal(Vec<T> v, int64_t column, int64_t row) {
  if constexpr (Diagonal) return lane_index<T>() == IntVec<T>{} + Int<T>(row - column) ? Vec<T>{} : v;
  else return v;
}

// The update, but for the diagonal; kept_j = 1 - w_j.
template <class T> FASTMEM_INLINE Vec<T> updated(Vec<T> l, T w_i, Vec<T> kept_j, Vec<T> p_j) {
  return (kept_j - w_i) * l + w_i * p_j;
}

// Takes Rows vectors of the link at column j through some updates.
template <int Rows, bool Diagonal, bool Part, class T>
FASTMEM_INLINE void update_tile(Vec<T> (&l)[Rows], const LinkUpdate<T>* updates, int64_t updates_count, int64_t offset,
                                int64_t row, int64_t j, int64_t count) {
  for (int64_t u = 0; u < updates_count; ++u) {
    const T *const w = updates[u].write_weights + offset, *const w_i = opaque(w + row);
    const Vec<T> kept_j = T(1) - load_tile<Part>(w + j, count),
                 p_j = load_tile<Part>(updates[u].precedence + offset + j, count);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) l[k] = updated(l[k], w_i[k], kept_j, p_j);
  }
#pragma GCC unroll 4
  for (int k = 0; k < Rows; ++k) l[k] = off_diagonal<Diagonal, T>(l[k], j, row + k);
}

// Rows [row, row + Rows) for heads [head, head + Heads). The first group updates the link, later ones only read it.
// Everything a tile needs is a local here: a store could alias the fields of `s` and make the compiler load them again.
template <int Rows, int Heads, bool Update, class T>
FASTMEM_INLINE void linkage_rows(const Linkage<T>& s, int64_t row, int64_t head) {
  const int64_t n = s.slots;
  const T *const w = s.write_weights, *const p = s.precedence;
  const T* const r = s.read_weights + head * n;
  T* const columns = s.columns + head * n;
  const int64_t next_block = Rows * s.new_link_row;
  const T* link[Rows];
  T* new_link[Rows];
  Vec<T> forward[Rows * (Heads ? Heads : 1)] = {};
#pragma GCC unroll 8
  for (int k = 0; k < Rows; ++k) {
    link[k] = s.link + (row + k) * s.link_row;
    new_link[k] = s.new_link + (row + k) * s.new_link_row;
  }
  for_each_tile<T>(n, row, Rows,
                   [&](int64_t j, int64_t count, auto diagonal, auto part) __attribute__((always_inline)) {
    constexpr bool Diagonal = decltype(diagonal)::value, Part = decltype(part)::value;
    // All rows are loaded before any is stored: rows 4 KiB apart would otherwise wait for each other's stores.
    Vec<T> l[Rows];
#pragma GCC unroll 8
    for (int k = 0; k < Rows; ++k) l[k] = load_tile<Part>((Update ? link[k] : new_link[k]) + j, count);
    // What the next block of rows will write. Prefetching what it reads as well only crowds the cache.
#pragma GCC unroll 8
    for (int k = 0; k < Rows; ++k) __builtin_prefetch(new_link[k] + j + next_block, 1);
    if constexpr (Update) {
      const Vec<T> kept_j = T(1) - load_tile<Part>(w + j, count), p_j = load_tile<Part>(p + j, count);
      const T* const w_i = opaque(w + row);
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) l[k] = off_diagonal<Diagonal, T>(updated(l[k], w_i[k], kept_j, p_j), j, row + k);
    }
#pragma GCC unroll 8
    for (int h = 0; h < Heads; ++h) {
      const Vec<T> r_j = load_tile<Part>(r + h * n + j, count);
      Vec<T> b_j = load_tile<Part>(columns + h * n + j, count);
      const T* const r_i = opaque(r + h * n + row);
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) {
        forward[h * Rows + k] += l[k] * r_j;
        b_j += l[k] * r_i[k];
      }
      store_tile<Part>(columns + h * n + j, b_j, count);
    }
    if constexpr (Update)
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) store_tile<Part>(new_link[k] + j, l[k], count);
  });
  T sums[Rows * (Heads ? Heads : 1)];
  sum_each(forward, sums);
  for (int h = 0; h < Heads; ++h)
    for (int k = 0; k < Rows; ++k) s.forward[(head + h) * n + row + k] = sums[h * Rows + k];
}

template <int Rows, bool Update, class T>
FASTMEM_INLINE void linkage_heads(const Linkage<T>& s, int64_t row, int64_t head, int64_t heads) {
  switch (heads) {
    case 0: return linkage_rows<Rows, 0, Update>(s, row, head);
    case 1: return linkage_rows<Rows, 1, Update>(s, row, head);
    case 2: return linkage_rows<Rows, 2, Update>(s, row, head);
    case 3: return linkage_rows<Rows, 3, Update>(s, row, head);
    default: return linkage_rows<Rows, kReadGroup, Update>(s, row, head);
  }
}

// Up to one head leaves the registers for eight rows, and half the blocks to begin and to sum up.
template <class T> void linkage_tall_block(const Linkage<T>& s, int64_t row) {
  if (s.read_heads == 0) linkage_rows<8, 0, true>(s, row, 0);
  else linkage_rows<8, 1, true>(s, row, 0);
}

template <int Rows, class T> void linkage_block(const Linkage<T>& s, int64_t row) {
  if (s.updates) linkage_heads<Rows, true>(s, row, 0, s.read_heads);
  else linkage_heads<Rows, false>(s, row, 0, s.read_heads);
  for (int64_t head = kReadGroup; head < s.read_heads; head += kReadGroup)
    linkage_heads<Rows, false>(s, row, head, s.read_heads - head);
}

template <class T> T total(const T* values, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> acc{};
  for (int64_t j = 0; j < n; j += lanes) acc += load_upto(values + j, n - j);
  return sum<T>(acc);
}

// total += columns, columns = 0
template <class T> void fold(T* columns, T* total, int64_t n) {
  for (int64_t j = 0; j < n; ++j) {
    total[j] += columns[j];
    columns[j] = 0;
  }
}

template <class T> void temporal_linkage(const Linkage<T>& s) {
  const int64_t n = s.slots;
  for (int64_t j = 0; j < s.read_heads * n; ++j) s.backward[j] = s.columns[j] = 0;
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = block + kSumBlock < n ? block + kSumBlock : n;
    int64_t row = block;
    if (s.updates && s.read_heads <= 1)
      for (; row + 8 <= end; row += 8) linkage_tall_block(s, row);
    for (; row + 4 <= end; row += 4) linkage_block<4>(s, row);
    for (; row < end; ++row) linkage_block<1>(s, row);
    fold(s.columns, s.backward, s.read_heads * n);
  }
  if (!s.updates) return;
  const T kept = T(1) - total(s.write_weights, n);
  for (int64_t j = 0; j < n; ++j) s.new_precedence[j] = kept * s.precedence[j] + s.write_weights[j];
}

// With G = grad_link' + sum_r (grad_forward[r,i] r[j] + r[i] grad_backward[r,j]), 0 on the diagonal:
//   grad_link = (1 - w[i] - w[j]) G
//   grad_w[i] = sum_j G[i,j] (p[j] - link[i,j]) - sum_j G[j,i] link[j,i] + grad_p'[i] - <grad_p', p>
//   grad_p[j] = sum_i G[i,j] w[i] + (1 - sum w) grad_p'[j]
//   grad_r[j] = sum_i link'[i,j] grad_forward[r,i] + sum_i link'[j,i] grad_backward[r,i]
// Sums over j stay in registers, sums over i go through `columns`. `Last` is the head group that completes G.
// `Pending`: the link has updates to go through first, which nothing keeps.
template <int Rows, int Heads, bool Last, bool Pending, class T>
FASTMEM_INLINE void linkage_backward_rows(const LinkageBackward<T>& s, int64_t row, int64_t head) {
  const int64_t n = s.slots, read_row = s.grad_read_row;
  const T *const w = s.write_weights, *const p = s.precedence;
  const T* const r = s.read_weights + head * n;
  const T *const df = s.grad_forward + head * read_row, *const db = s.grad_backward + head * read_row;
  T *const dw = s.columns, *const dp = dw + n, *const dr = dp + n + head * n;
  const T *link[Rows], *upstream[Rows];
  T *grad_link[Rows], *partial[Rows];
  Vec<T> row_w[Rows] = {}, row_r[Rows][Heads ? Heads : 1] = {};
#pragma GCC unroll 4
  for (int k = 0; k < Rows; ++k) {
    partial[k] = s.partial + k * n;
    link[k] = s.link + (row + k) * s.link_row;
    upstream[k] = head == 0 ? s.grad_new_link + (row + k) * s.grad_new_link_row : partial[k];
    grad_link[k] = s.grad_link + (row + k) * s.grad_link_row;
  }
  for_each_tile<T>(n, row, Rows,
                   [&](int64_t j, int64_t count, auto diagonal, auto part) __attribute__((always_inline)) {
    constexpr bool Diagonal = decltype(diagonal)::value, Part = decltype(part)::value;
    const Vec<T> kept_j = T(1) - load_tile<Part>(w + j, count), p_j = load_tile<Part>(p + j, count);
    const T* const w_i = opaque(w + row);
    Vec<T> g[Rows], old_l[Rows], new_l[Rows];
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) old_l[k] = load_tile<Part>(link[k] + j, count);
    if constexpr (Pending)
      update_tile<Rows, Diagonal, Part>(old_l, s.pending, s.pending_count, s.pending_offset, row, j, count);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) {
      g[k] = load_tile<Part>(upstream[k] + j, count);
      new_l[k] = off_diagonal<Diagonal, T>(updated(old_l[k], w_i[k], kept_j, p_j), j, row + k);
      if (Diagonal && !s.updates) new_l[k] = old_l[k];
    }
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
      const Vec<T> r_j = load_tile<Part>(r + h * n + j, count), db_j = load_tile<Part>(db + h * read_row + j, count);
      Vec<T> dr_j = load_tile<Part>(dr + h * n + j, count);
      const T *const r_i = opaque(r + h * n + row), *const df_i = opaque(df + h * read_row + row);
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) {
        g[k] += df_i[k] * r_j;
        g[k] += r_i[k] * db_j;
        dr_j += new_l[k] * df_i[k];
        row_r[k][h] += new_l[k] * db_j;
      }
      store_tile<Part>(dr + h * n + j, dr_j, count);
    }
    if constexpr (Last) {
      Vec<T> dw_j = load_tile<Part>(dw + j, count), dp_j = load_tile<Part>(dp + j, count);
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) {
        const Vec<T> l = Pending ? old_l[k] : load_tile<Part>(opaque(link[k]) + j, count);
        if (s.updates) g[k] = off_diagonal<Diagonal, T>(g[k], j, row + k);
        row_w[k] += g[k] * (p_j - l);
        dw_j -= g[k] * l;
        dp_j += g[k] * w_i[k];
      }
      store_tile<Part>(dw + j, dw_j, count);
      store_tile<Part>(dp + j, dp_j, count);
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) store_tile<Part>(grad_link[k] + j, (kept_j - w_i[k]) * g[k], count);
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) store_tile<Part>(partial[k] + j, g[k], count);
    }
  });
#pragma GCC unroll 4
  for (int k = 0; k < Rows; ++k) {
    if constexpr (Last) s.grad_write_weights[row + k] += sum<T>(row_w[k]);
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
      const T by_backward = sum<T>(row_r[k][h]);
      s.grad_read_weights[(head + h) * n + row + k] += by_backward;
      if (s.along_backward) s.along_backward[head + h] += by_backward * r[h * n + row + k];
    }
  }
}

template <int Rows, bool Pending, class T> void linkage_backward_block(const LinkageBackward<T>& s, int64_t row) {
  int64_t head = 0;
  for (; head + kReadGroup < s.read_heads; head += kReadGroup)
    linkage_backward_rows<Rows, kReadGroup, false, Pending>(s, row, head);
  switch (s.read_heads - head) {
    case 0: return linkage_backward_rows<Rows, 0, true, Pending>(s, row, head);
    case 1: return linkage_backward_rows<Rows, 1, true, Pending>(s, row, head);
    case 2: return linkage_backward_rows<Rows, 2, true, Pending>(s, row, head);
    case 3: return linkage_backward_rows<Rows, 3, true, Pending>(s, row, head);
    default: return linkage_backward_rows<Rows, kReadGroup, true, Pending>(s, row, head);
  }
}

template <bool Pending, class T> void linkage_backward_rows_of(const LinkageBackward<T>& s, int64_t row, int64_t end) {
  for (; row + kBackwardRows <= end; row += kBackwardRows) linkage_backward_block<kBackwardRows, Pending>(s, row);
  for (; row < end; ++row) linkage_backward_block<1, Pending>(s, row);
}

template <class T> void temporal_linkage_backward(const LinkageBackward<T>& s) {
  const int64_t n = s.slots;
  for (int64_t j = 0; j < n; ++j) s.grad_write_weights[j] = s.grad_precedence[j] = 0;
  for (int64_t j = 0; j < (s.read_heads + 2) * n; ++j) s.columns[j] = 0;
  if (s.along_forward)
    for (int64_t r = 0; r < s.read_heads; ++r) s.along_forward[r] = s.along_backward[r] = 0;
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = block + kSumBlock < n ? block + kSumBlock : n;
    if (s.pending_count > 0) linkage_backward_rows_of<true>(s, block, end);
    else linkage_backward_rows_of<false>(s, block, end);
    // sum_j r[j] sum_i link'[i,j] grad_forward[i] = <grad_forward, forward>
    if (s.along_forward)
      for (int64_t r = 0; r < s.read_heads; ++r)
        s.along_forward[r] += inner(s.columns + (2 + r) * n, s.read_weights + r * n, n);
    fold(s.columns, s.grad_write_weights, n);
    fold(s.columns + n, s.grad_precedence, n);
    fold(s.columns + 2 * n, s.grad_read_weights, s.read_heads * n);
  }
  // Added last: the sums over the link are small, and would lose digits on top of these.
  T inner = 0;
  for (int64_t j = 0; j < n; ++j) inner += s.grad_new_precedence[j] * s.precedence[j];
  const T kept = T(1) - total(s.write_weights, n);
  for (int64_t j = 0; j < n; ++j) {
    s.grad_write_weights[j] += s.grad_new_precedence[j] - inner;
    s.grad_precedence[j] += kept * s.grad_new_precedence[j];
  }
}

template <int Rows, class T> FASTMEM_INLINE void relink_rows(const Relinking<T>& s, int64_t row) {
  const int64_t n = s.slots;
  for_each_tile<T>(n, row, Rows,
                   [&](int64_t j, int64_t count, auto diagonal, auto part) __attribute__((always_inline)) {
    constexpr bool Diagonal = decltype(diagonal)::value, Part = decltype(part)::value;
    Vec<T> l[Rows];
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) l[k] = load_tile<Part>(s.link + (row + k) * n + j, count);
    update_tile<Rows, Diagonal, Part>(l, s.updates, s.count, s.offset, row, j, count);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) store_tile<Part>(s.new_link + (row + k) * n + j, l[k], count);
  });
}

template <class T> void relink(const Relinking<T>& s) {
  int64_t row = 0;
  for (; row + 4 <= s.slots; row += 4) relink_rows<4>(s, row);
  for (; row < s.slots; ++row) relink_rows<1>(s, row);
}

template void relink(const Relinking<float>&);
template void relink(const Relinking<double>&);
template void temporal_linkage(const Linkage<float>&);
template void temporal_linkage(const Linkage<double>&);
template void temporal_linkage_backward(const LinkageBackward<float>&);
template void temporal_linkage_backward(const LinkageBackward<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
