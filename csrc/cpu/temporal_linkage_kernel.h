// Temporal linkage of one sample and write head: update, forward and backward reads in one pass over the link matrix.
//
//   link'[i,j] = (1 - w[i] - w[j]) link[i,j] + w[i] p[j],  0 where i = j
//   p' = (1 - sum w) p + w,   forward[r,i] = sum_j link'[i,j] r[j],   backward[r,j] = sum_i link'[i,j] r[i]
#pragma once

#include "isa.h"
#include "scratch.h"

#include <cstdint>

namespace fastmem {

template <class T> struct Linkage {
  int64_t slots, read_heads;
  const T *link, *precedence, *write_weights, *read_weights; // [N,N] [N] [N] [R,N]
  int64_t link_row;                                          // distance of two rows of `link`
  T *new_link, *new_precedence;                              // [N,N] [N]; may be `link` and `precedence`
  int64_t new_link_row;
  T *forward, *backward; // [R,N] [R,N]
  T* panels;             // scratch linkage_scratch(N, R)
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
  T* partial; // scratch [kBackwardRows, N], used with more read heads than share a pass
  T* panels;  // scratch linkage_backward_scratch
};

inline constexpr int kBackwardRows = 4;

// w, 1 - w, p, and r and its backward reads of up to as many heads as share a pass.
inline int64_t linkage_scratch(int64_t slots, int64_t read_heads) {
  return (3 + 2 * (read_heads < 4 ? read_heads : 4)) * in_lines(slots);
}
// The same, for every group of heads: see BackwardPanels.
inline int64_t linkage_backward_scratch(int64_t slots, int64_t read_heads, int64_t pending_count) {
  return ((5 + 3 * pending_count) * (read_heads / 2 + 1) + 4 * read_heads) * in_lines(slots);
}

FASTMEM_EACH_ISA(template <class T> void temporal_linkage(const Linkage<T>& s);
                 template <class T> void temporal_linkage_backward(const LinkageBackward<T>& s);
                 template <class T> void relink(const Relinking<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "ranges.h"

namespace fastmem::FASTMEM_ISA {

// Up to this many read heads share a pass; their row sums then fit the registers beside everything else.
inline constexpr int kReadGroup = kVectorBytes == 64 ? 4 : 2;
static_assert(kReadGroup >= 2 && kReadGroup <= 4); // as the sizes of scratch have it
// Up to this many leave the registers for eight rows, and half the blocks to begin and to sum up.
inline constexpr int kTallHeads = kVectorBytes == 64 ? 2 : 0;
// A link of so many bytes may come from beyond the second cache.
inline constexpr int64_t kFarBytes = 1 << 18;

// Calls tile(index, crosses the diagonal, is partial) for the vectors [from, to) of the columns of a block of rows.
template <int Rows, class T, class Tile>
FASTMEM_INLINE void for_each_tile(int64_t n, int64_t row, int64_t from, int64_t to, const Tile& tile) {
  constexpr int64_t lanes = kLanes<T>, diagonals = Rows < lanes ? 1 : Rows / lanes;
  const int64_t whole = n / lanes < to ? n / lanes : to, crossed = row / lanes, beyond = crossed + diagonals;
  int64_t t = from;
  for (; t < crossed && t < whole; ++t) tile(t, Bool<false>{}, Bool<false>{});
  for (; t < beyond && t < whole; ++t) tile(t, Bool<true>{}, Bool<false>{});
  for (; t < whole; ++t) tile(t, Bool<false>{}, Bool<false>{});
  if (t < to) tile(t, Bool<true>{}, Bool<true>{});
}

template <class T> FASTMEM_INLINE int64_t tiles_of(int64_t n) { return (n + kLanes<T> - 1) / kLanes<T>; }

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

// What the vectors of the slots are to a tile: those of `lanes` slots side by side, so that a tile finds them at one
// address, whole and aligned. Of missing slots all are 0 but 1 - w. A panel begins with those of an update.
template <class T> struct UpdatePanel {
  static constexpr int64_t lanes = kLanes<T>;
  static constexpr int64_t writes = 0, kept = lanes, precedence = 2 * lanes; // w, 1 - w, p
  static constexpr int64_t update_size = 3 * lanes;
  static void fill(T* panel, Vec<T> w, Vec<T> p) {
    store(panel + writes, w);
    store(panel + kept, T(1) - w);
    store(panel + precedence, p);
  }
};

// What a panel has summed joins the total, and begins again.
template <class T> void join(T* total, T* sums, int64_t count) {
  store_upto(total, load_upto(total, count) + load(sums), count);
  store(sums, Vec<T>{});
}

// The panels of a pass forward: those of the update, then of each head r and the sum of its backward reads so far.
template <int Heads, class T> struct Panels : UpdatePanel<T> {
  using UpdatePanel<T>::lanes, UpdatePanel<T>::update_size;
  static constexpr int64_t size = update_size + 2 * Heads * lanes;
  T* first;
  explicit Panels(T* panels) : first(panels) {}
  T* at(int64_t tile) const { return first + tile * size; }
  static constexpr int64_t reads(int64_t head) { return update_size + 2 * head * lanes; }
  static constexpr int64_t backward(int64_t head) { return reads(head) + lanes; }
  // A number of row k of a block of rows, from the panel where the block begins.
  static constexpr int64_t of_row(int64_t k) { return k / lanes * size + k % lanes; }
};

// Rows [row, row + Rows) and tiles [from, to) for a group of heads from `head` on. The first group updates the link,
// later ones only read it.
template <int Rows, int Heads, bool Update, bool Far, class T>
FASTMEM_INLINE void linkage_rows(const Linkage<T>& s, const Panels<Heads, T>& panels, int64_t head, int64_t row,
                                 int64_t from, int64_t to) {
  using P = Panels<Heads, T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t n = s.slots, old_row = Update ? s.link_row : s.new_link_row, new_row = s.new_link_row;
  const T* const link = (Update ? s.link : s.new_link) + row * old_row;
  T* const new_link = s.new_link + row * new_row;
  const T* const own = panels.at(row / lanes) + row % lanes;
  Vec<T> forward[Rows * (Heads ? Heads : 1)] = {};
  const auto tile = [&](int64_t index, auto diagonal, auto part) __attribute__((always_inline)) {
    constexpr bool Diagonal = decltype(diagonal)::value, Part = decltype(part)::value;
    const int64_t j = index * lanes, count = n - j;
    T* const panel = panels.at(index);
    // All rows are loaded before any is stored: rows 4 KiB apart would otherwise wait for each other's stores.
    Vec<T> l[Rows];
#pragma GCC unroll 8
    for (int k = 0; k < Rows; ++k) l[k] = load_tile<Part>(link + k * old_row + j, count);
    // What the next block of rows will write. Prefetching what it reads as well only crowds the cache.
    if constexpr (Far)
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) __builtin_prefetch(new_link + (Rows + k) * new_row + j, 1);
    if constexpr (Update) {
      const Vec<T> kept_j = load(panel + P::kept), p_j = load(panel + P::precedence);
      const T* const w_i = opaque(own + P::writes);
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k)
        l[k] = off_diagonal<Diagonal, T>(updated(l[k], w_i[P::of_row(k)], kept_j, p_j), j, row + k);
    }
    const T* const r_i = opaque(own);
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
      const Vec<T> r_j = load(panel + P::reads(h));
      Vec<T> b_j = load(panel + P::backward(h));
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) {
        forward[h * Rows + k] += l[k] * r_j;
        b_j += l[k] * r_i[P::reads(h) + P::of_row(k)];
      }
      store(panel + P::backward(h), b_j);
    }
    if constexpr (Update)
#pragma GCC unroll 8
      for (int k = 0; k < Rows; ++k) store_tile<Part>(new_link + k * new_row + j, l[k], count);
  };
  for_each_tile<Rows, T>(n, row, from, to, tile);
  T sums[Rows * (Heads ? Heads : 1)];
  sum_each(forward, sums);
  for (int h = 0; h < Heads; ++h)
    for (int k = 0; k < Rows; ++k) s.forward[(head + h) * n + row + k] += sums[h * Rows + k];
}

template <class T> T total(const T* values, int64_t n) {
  constexpr int64_t lanes = kLanes<T>;
  Vec<T> acc{};
  for (int64_t j = 0; j < n; j += lanes) acc += load_upto(values + j, n - j);
  return sum<T>(acc);
}

// All rows for the heads of one group.
template <int Heads, bool Update, bool Far, class T> void linkage_group(const Linkage<T>& s, int64_t head) {
  using P = Panels<Heads, T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t n = s.slots, tiles = tiles_of<T>(n);
  const P panels{s.panels};
  for (int64_t j = 0; j < n; j += lanes) {
    T* const panel = panels.at(j / lanes);
    if constexpr (Update) P::fill(panel, load_upto(s.write_weights + j, n - j), load_upto(s.precedence + j, n - j));
    for (int h = 0; h < Heads; ++h) {
      store(panel + P::reads(h), load_upto(s.read_weights + (head + h) * n + j, n - j));
      store(panel + P::backward(h), Vec<T>{});
      store_upto(s.forward + (head + h) * n + j, Vec<T>{}, n - j);
      store_upto(s.backward + (head + h) * n + j, Vec<T>{}, n - j);
    }
  }
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = block + kSumBlock < n ? block + kSumBlock : n;
    int64_t row = block;
    const auto rows = [&](auto count) __attribute__((always_inline)) {
      constexpr int Rows = decltype(count)::value;
      for (; row + Rows <= end; row += Rows)
        for (int64_t from = 0; from < tiles; from += kSumBlock)
          linkage_rows<Rows, Heads, Update, Far>(s, panels, head, row, from,
                                                 from + kSumBlock < tiles ? from + kSumBlock : tiles);
    };
    if constexpr (Heads <= kTallHeads) rows(Count<8>{});
    rows(Count<4>{});
    rows(Count<1>{});
    for (int64_t j = 0; j < n; j += lanes)
      for (int h = 0; h < Heads; ++h)
        join(s.backward + (head + h) * n + j, panels.at(j / lanes) + P::backward(h), n - j);
  }
}

template <bool Update, bool Far, class T> void linkage_heads(const Linkage<T>& s, int64_t head) {
  const int64_t left = s.read_heads - head;
  switch (left < kReadGroup ? left : kReadGroup) {
    case 0: return linkage_group<0, Update, Far>(s, head);
    case 1: return linkage_group<1, Update, Far>(s, head);
#if defined(__AVX512F__)
    case 2: return linkage_group<2, Update, Far>(s, head);
    case 3: return linkage_group<3, Update, Far>(s, head);
#endif
    default: return linkage_group<kReadGroup, Update, Far>(s, head);
  }
}

template <class T> void temporal_linkage(const Linkage<T>& s) {
  const int64_t n = s.slots;
  if (!s.updates) linkage_heads<false, false>(s, 0);
  else if (n * n * int64_t(sizeof(T)) < kFarBytes) linkage_heads<true, false>(s, 0);
  else linkage_heads<true, true>(s, 0);
  for (int64_t head = kReadGroup; head < s.read_heads; head += kReadGroup) linkage_heads<false, false>(s, head);
  if (!s.updates) return;
  const T kept = T(1) - total(s.write_weights, n);
  for (int64_t j = 0; j < n; ++j) s.new_precedence[j] = kept * s.precedence[j] + s.write_weights[j];
}

// Those of a pass back: after the update the gradients of w and p from the rows so far, of each head r, the gradients
// of forward and backward and that of r so far, and each pending update.
template <class T> struct BackwardPanels : UpdatePanel<T> {
  using UpdatePanel<T>::lanes;
  T* first;
  int64_t size;
  BackwardPanels(T* panels, int64_t panel_size) : first(panels), size(panel_size) {}
  T* at(int64_t tile) const { return first + tile * size; }
  int64_t of_row(int64_t k) const { return k / lanes * size + k % lanes; }
  static constexpr int64_t grad_writes = 3 * lanes, grad_precedence = 4 * lanes;
  static constexpr int64_t fields(int64_t heads) { return 5 + 4 * heads; } // and 3 for each pending update
  static constexpr int64_t head(int64_t h) { return fields(h) * lanes; }
  static constexpr int64_t reads = 0, grad_forward = lanes, grad_backward = 2 * lanes, grad_reads = 3 * lanes;
};

// With G = grad_link' + sum_r (grad_forward[r,i] r[j] + r[i] grad_backward[r,j]), 0 on the diagonal:
//   grad_link = (1 - w[i] - w[j]) G
//   grad_w[i] = sum_j G[i,j] (p[j] - link[i,j]) - sum_j G[j,i] link[j,i] + grad_p'[i] - <grad_p', p>
//   grad_p[j] = sum_i G[i,j] w[i] + (1 - sum w) grad_p'[j]
//   grad_r[j] = sum_i link'[i,j] grad_forward[r,i] + sum_i link'[j,i] grad_backward[r,i]
// Sums over j stay in registers, sums over i go through the panels. `Last` is the head group that completes G.
// `Pending`: the link has updates to go through first, which nothing keeps.
template <int Rows, int Heads, bool Last, bool Pending, class T>
FASTMEM_INLINE void linkage_backward_rows(const LinkageBackward<T>& s, const BackwardPanels<T>& panels, int64_t row,
                                          int64_t head) {
  using P = BackwardPanels<T>;
  constexpr int64_t lanes = kLanes<T>;
  const int64_t n = s.slots, link_row = s.link_row;
  const int64_t above_row = head == 0 ? s.grad_new_link_row : n, out_row = Last ? s.grad_link_row : n;
  const T* const link = s.link + row * link_row;
  const T* const above = head == 0 ? s.grad_new_link + row * above_row : s.partial;
  T* const out = Last ? s.grad_link + row * out_row : s.partial;
  const T* const own = panels.at(row / lanes) + row % lanes;
  Vec<T> row_w[Rows] = {}, row_r[Rows][Heads ? Heads : 1] = {};
  const auto tile = [&](int64_t index, auto diagonal, auto part) __attribute__((always_inline)) {
    constexpr bool Diagonal = decltype(diagonal)::value, Part = decltype(part)::value;
    const int64_t j = index * lanes, count = n - j;
    T* const panel = panels.at(index);
    Vec<T> g[Rows], old_l[Rows], new_l[Rows];
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) old_l[k] = load_tile<Part>(link + k * link_row + j, count);
    if constexpr (Pending) {
      const T *update = panel + P::head(Heads), *w_i = own + P::head(Heads); // behind those of the heads
      for (int64_t u = 0; u < s.pending_count; ++u, update += P::update_size, w_i += P::update_size) {
        const Vec<T> kept_j = load(update + P::kept), p_j = load(update + P::precedence);
#pragma GCC unroll 4
        for (int k = 0; k < Rows; ++k) old_l[k] = updated(old_l[k], w_i[panels.of_row(k)], kept_j, p_j);
      }
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) old_l[k] = off_diagonal<Diagonal, T>(old_l[k], j, row + k);
    }
    const Vec<T> kept_j = load(panel + P::kept), p_j = load(panel + P::precedence);
    const T* const i = opaque(own);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) {
      g[k] = load_tile<Part>(above + k * above_row + j, count);
      new_l[k] = off_diagonal<Diagonal, T>(updated(old_l[k], i[P::writes + panels.of_row(k)], kept_j, p_j), j, row + k);
      if (Diagonal && !s.updates) new_l[k] = old_l[k];
    }
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
      T* const of_head = panel + P::head(h);
      const T* const own_head = i + P::head(h);
      const Vec<T> r_j = load(of_head + P::reads), db_j = load(of_head + P::grad_backward);
      Vec<T> dr_j = load(of_head + P::grad_reads);
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) {
        const T df_i = own_head[P::grad_forward + panels.of_row(k)];
        g[k] += df_i * r_j;
        g[k] += own_head[P::reads + panels.of_row(k)] * db_j;
        dr_j += new_l[k] * df_i;
        row_r[k][h] += new_l[k] * db_j;
      }
      store(of_head + P::grad_reads, dr_j);
    }
    if constexpr (Last) {
      Vec<T> dw_j = load(panel + P::grad_writes), dp_j = load(panel + P::grad_precedence);
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) {
        const T w_i = i[P::writes + panels.of_row(k)];
        if (s.updates) g[k] = off_diagonal<Diagonal, T>(g[k], j, row + k);
        const Vec<T> l = Pending ? old_l[k] : load_tile<Part>(opaque(link + k * link_row) + j, count); // not to keep it
        row_w[k] += g[k] * (p_j - l);
        dw_j -= g[k] * l;
        dp_j += g[k] * w_i;
        store_tile<Part>(out + k * out_row + j, (kept_j - w_i) * g[k], count);
      }
      store(panel + P::grad_writes, dw_j);
      store(panel + P::grad_precedence, dp_j);
    } else {
#pragma GCC unroll 4
      for (int k = 0; k < Rows; ++k) store_tile<Part>(out + k * out_row + j, g[k], count);
    }
  };
  for_each_tile<Rows, T>(n, row, 0, tiles_of<T>(n), tile);
#pragma GCC unroll 4
  for (int k = 0; k < Rows; ++k) {
    if constexpr (Last) s.grad_write_weights[row + k] += sum<T>(row_w[k]);
#pragma GCC unroll 4
    for (int h = 0; h < Heads; ++h) {
      const T by_backward = sum<T>(row_r[k][h]);
      s.grad_read_weights[(head + h) * n + row + k] += by_backward;
      if (s.along_backward) s.along_backward[head + h] += by_backward * own[P::head(h) + P::reads + panels.of_row(k)];
    }
  }
}

// f(panels, first head, Count of heads, whether they are the last) over groups of read heads, each with panels of its
// own.
template <class T, class F> FASTMEM_INLINE void for_each_read_group(const LinkageBackward<T>& s, const F& f) {
  BackwardPanels<T> panels{s.panels, 0};
  const auto group = [&](int64_t head, auto heads, auto last) __attribute__((always_inline)) {
    panels.size = (BackwardPanels<T>::fields(decltype(heads)::value) + 3 * s.pending_count) * kLanes<T>;
    f(panels, head, heads, last);
    panels.first += tiles_of<T>(s.slots) * panels.size;
  };
  int64_t head = 0;
  for (; head + kReadGroup < s.read_heads; head += kReadGroup) group(head, Count<kReadGroup>{}, Bool<false>{});
  switch (s.read_heads - head) {
    case 0: return group(head, Count<0>{}, Bool<true>{});
    case 1: return group(head, Count<1>{}, Bool<true>{});
#if defined(__AVX512F__)
    case 2: return group(head, Count<2>{}, Bool<true>{});
    case 3: return group(head, Count<3>{}, Bool<true>{});
#endif
    default: return group(head, Count<kReadGroup>{}, Bool<true>{});
  }
}

template <class T>
void fill(const LinkageBackward<T>& s, const BackwardPanels<T>& panels, int64_t head, int64_t heads) {
  using P = BackwardPanels<T>;
  const int64_t n = s.slots;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    T* const panel = panels.at(j / kLanes<T>);
    const auto take = [&](const T* values) { return load_upto(values + j, n - j); };
    P::fill(panel, take(s.write_weights), take(s.precedence));
    store(panel + P::grad_writes, Vec<T>{});
    store(panel + P::grad_precedence, Vec<T>{});
    for (int64_t h = 0; h < heads; ++h) {
      T* const of_head = panel + P::head(h);
      store(of_head + P::reads, take(s.read_weights + (head + h) * n));
      store(of_head + P::grad_forward, take(s.grad_forward + (head + h) * s.grad_read_row));
      store(of_head + P::grad_backward, take(s.grad_backward + (head + h) * s.grad_read_row));
      store(of_head + P::grad_reads, Vec<T>{});
    }
    for (int64_t u = 0; u < s.pending_count; ++u)
      P::fill(panel + P::head(heads) + u * P::update_size, take(s.pending[u].write_weights + s.pending_offset),
              take(s.pending[u].precedence + s.pending_offset));
  }
}

template <class T>
void fold(const LinkageBackward<T>& s, const BackwardPanels<T>& panels, int64_t head, int64_t heads) {
  using P = BackwardPanels<T>;
  const int64_t n = s.slots;
  for (int64_t j = 0; j < n; j += kLanes<T>) {
    T* const panel = panels.at(j / kLanes<T>);
    join(s.grad_write_weights + j, panel + P::grad_writes, n - j);
    join(s.grad_precedence + j, panel + P::grad_precedence, n - j);
    for (int64_t h = 0; h < heads; ++h)
      join(s.grad_read_weights + (head + h) * n + j, panel + P::head(h) + P::grad_reads, n - j);
  }
}

// sum_j r[j] sum_i link'[i,j] grad_forward[i] = <grad_forward, forward>, of the rows that the panels have summed.
template <class T>
void add_along(const LinkageBackward<T>& s, const BackwardPanels<T>& panels, int64_t head, int64_t heads) {
  using P = BackwardPanels<T>;
  for (int64_t h = 0; h < heads; ++h) {
    Vec<T> products{};
    for (int64_t t = 0; t * kLanes<T> < s.slots; ++t) {
      const T* const of_head = panels.at(t) + P::head(h);
      products += load(of_head + P::reads) * load(of_head + P::grad_reads);
    }
    s.along_forward[head + h] += sum<T>(products);
  }
}

template <int Rows, bool Pending, class T> void linkage_backward_block(const LinkageBackward<T>& s, int64_t row) {
  for_each_read_group(s, [&](const auto& panels, int64_t head, auto heads, auto last) __attribute__((always_inline)) {
    linkage_backward_rows<Rows, decltype(heads)::value, decltype(last)::value, Pending>(s, panels, row, head);
  });
}

template <bool Pending, class T> void linkage_backward_rows_of(const LinkageBackward<T>& s, int64_t row, int64_t end) {
  for (; row + kBackwardRows <= end; row += kBackwardRows) linkage_backward_block<kBackwardRows, Pending>(s, row);
  for (; row < end; ++row) linkage_backward_block<1, Pending>(s, row);
}

template <class T> void temporal_linkage_backward(const LinkageBackward<T>& s) {
  const int64_t n = s.slots;
  for (int64_t j = 0; j < n; ++j) s.grad_write_weights[j] = s.grad_precedence[j] = 0;
  if (s.along_forward)
    for (int64_t r = 0; r < s.read_heads; ++r) s.along_forward[r] = s.along_backward[r] = 0;
  for_each_read_group(
      s, [&](const auto& panels, int64_t head, auto heads, auto) { fill(s, panels, head, decltype(heads)::value); });
  for (int64_t block = 0; block < n; block += kSumBlock) {
    const int64_t end = block + kSumBlock < n ? block + kSumBlock : n;
    if (s.pending_count > 0) linkage_backward_rows_of<true>(s, block, end);
    else linkage_backward_rows_of<false>(s, block, end);
    for_each_read_group(s, [&](const auto& panels, int64_t head, auto heads, auto) {
      if (s.along_forward) add_along(s, panels, head, decltype(heads)::value);
      fold(s, panels, head, decltype(heads)::value);
    });
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
  const auto tile = [&](int64_t index, auto diagonal, auto part) __attribute__((always_inline)) {
    constexpr bool Diagonal = decltype(diagonal)::value, Part = decltype(part)::value;
    const int64_t j = index * kLanes<T>, count = n - j;
    Vec<T> l[Rows];
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) l[k] = load_tile<Part>(s.link + (row + k) * n + j, count);
    update_tile<Rows, Diagonal, Part>(l, s.updates, s.count, s.offset, row, j, count);
#pragma GCC unroll 4
    for (int k = 0; k < Rows; ++k) store_tile<Part>(s.new_link + (row + k) * n + j, l[k], count);
  };
  for_each_tile<Rows, T>(n, row, 0, tiles_of<T>(n), tile);
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
