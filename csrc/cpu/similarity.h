// Content scores: how much a key resembles the rows of a memory, one sample at a time.
//
//   score[h,i] = s[h] D[h,i],   D[h,i] = (k_h . m_i) / (|k_h| |m_i| + delta),
//   |x| = sqrt(max(sum x^2 + inside, floor)) + added, of a key times W where the norm counts it by width
//
// With a key mask c_h, D lies between c_h k_h and c_h m_i. A slot whose mask is false has score -inf.
#pragma once

#include "isa.h"
#include "scratch.h"

#include <cstdint>
#include <string>

namespace fastmem {

// A norm of the content scores as numbers; the slope of |x| is x over the root, and 0 where the floor is reached.
template <class T> struct Similarity {
  T inside, floor, added, delta;
  bool by_width; // the length of a key counts once for each of its words
};

// By name: inner, outer, rsqrt, clamp or width. Throws for another name.
template <class T> Similarity<T> similarity(const std::string& norm, double eps);

// What is compared with what. Heads share the memory: keys of several samples over one memory are heads of one search.
template <class T> struct Search {
  int64_t slots, heads, word;
  const T* memory; // [N,W]
  int64_t memory_row;
  const T *keys, *strengths, *key_mask; // [A,W] [A] [A,W]; no key mask: null
  const bool* slot_mask;                // [N]; none: null
  Similarity<T> similarity;
};

} // namespace fastmem

#ifdef FASTMEM_ISA
#include "simd.h"

namespace fastmem::FASTMEM_ISA {

inline constexpr int kHeadGroup = 5;                         // heads that share a pass over a tile of rows
inline constexpr int kInFlight = kVectorBytes == 64 ? 4 : 2; // rows, or vectors of a row, in registers beside them
template <class T> inline constexpr int64_t kTile = 4 * kLanes<T>; // rows at a time, few enough for the first cache
template <class T> inline constexpr int64_t kPad = 64 / int64_t(sizeof(T));

template <class T> FASTMEM_INLINE int64_t rounded_up(int64_t count, int64_t multiple) {
  return (count + multiple - 1) / multiple * multiple;
}

// f(first head, Count of heads) over all heads, in groups as even as can be.
template <class F> FASTMEM_INLINE void for_each_head_group(int64_t heads, const F& f) {
  const int64_t groups = (heads + kHeadGroup - 1) / kHeadGroup;
  for (int64_t group = 0; group < groups; ++group) {
    const int64_t head = heads * group / groups;
    switch (heads * (group + 1) / groups - head) {
      case 1: f(head, Count<1>{}); break;
      case 2: f(head, Count<2>{}); break;
      case 3: f(head, Count<3>{}); break;
      case 4: f(head, Count<4>{}); break;
      default: f(head, Count<kHeadGroup>{});
    }
  }
}

template <class T> struct Length {
  Vec<T> length, slope; // slope * x = d length / d x
};

template <class T> FASTMEM_INLINE Length<T> length_of(Vec<T> squares, const Similarity<T>& similarity) {
  const Vec<T> inside = squares + similarity.inside;
  const IntVec<T> floored = inside <= similarity.floor;
  const Vec<T> root = sqrt<T>(floored ? broadcast(similarity.floor) : inside);
  return {root + similarity.added, floored ? Vec<T>{} : T(1) / root};
}

// The keys of a search as the kernels read them: whole vectors, padded with 0, times the mask's square.
template <class T> struct Heads {
  int64_t pitch;         // distance of two heads
  const T *keys, *masks; // masks: the squares; none: null
  const T *lengths, *slopes;
};

// Heads that are not `alive` [A] count as zero; null: all are.
template <class T> Heads<T> prepare(const Search<T>& s, const T* alive, Scratch<T>& scratch) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = rounded_up<T>(s.word, kPad<T>);
  T* const keys = scratch.zeros(s.heads * pitch);
  T* const masks = s.key_mask ? scratch.zeros(s.heads * pitch) : nullptr;
  T* const lengths = scratch.take(s.heads);
  T* const slopes = scratch.take(s.heads);
  const T count = s.similarity.by_width ? T(s.word) : T(1);
  for (int64_t h = 0; h < s.heads; ++h) {
    Vec<T> squares{};
    if (!alive || alive[h] != 0)
      for (int64_t w = 0; w < s.word; w += lanes) {
        const Vec<T> key = load_upto(s.keys + h * s.word + w, s.word - w);
        Vec<T> masked = key;
        if (masks) {
          const Vec<T> mask = load_upto(s.key_mask + h * s.word + w, s.word - w);
          masked = key * (mask * mask);
          store(masks + h * pitch + w, mask * mask);
        }
        store(keys + h * pitch + w, masked);
        squares += key * masked;
      }
    const Length<T> length = length_of<T>(broadcast(sum<T>(squares)), s.similarity);
    lengths[h] = count * length.length[0];
    slopes[h] = count * length.slope[0];
  }
  return {pitch, keys, masks, lengths, slopes};
}

// Rows of a word each, zero padded to whole vectors like the keys: what grad_reads needs.
template <class T> const T* padded(const T* rows, int64_t count, int64_t word, Scratch<T>& scratch) {
  const int64_t pitch = rounded_up<T>(word, kPad<T>);
  T* const copy = scratch.zeros(count * pitch);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t w = 0; w < word; ++w) copy[i * pitch + w] = rows[i * word + w];
  return copy;
}

// A tile of memory rows: whole vectors in whole blocks of kLanes rows. Hidden and missing rows are 0.
template <class T> struct Tile {
  int64_t begin, count; // of the rows that exist
  int64_t blocks, words;
  const T* rows;
  int64_t row;
  bool whole;        // no row hidden or missing
  T shown[kTile<T>]; // 1 or 0 a row, unless whole
};

// The memory itself where it is fit to be read, else a copy in `packed` [kTile,pitch].
template <class T> FASTMEM_INLINE void take_tile(const Search<T>& s, int64_t begin, T* packed, Tile<T>& tile) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t left = s.slots - begin;
  tile.begin = begin;
  tile.count = left < kTile<T> ? left : kTile<T>;
  tile.blocks = (tile.count + lanes - 1) / lanes;
  tile.words = rounded_up<T>(s.word, lanes);
  tile.whole = tile.count % lanes == 0;
  if (s.slot_mask)
    for (int64_t i = 0; i < tile.count; ++i) tile.whole = tile.whole && s.slot_mask[begin + i];
  if (tile.whole && s.word % lanes == 0) {
    tile.rows = s.memory + begin * s.memory_row;
    tile.row = s.memory_row;
    return;
  }
  for (int64_t i = 0; i < tile.blocks * lanes; ++i) {
    const bool shown = i < tile.count && (!s.slot_mask || s.slot_mask[begin + i]);
    tile.shown[i] = shown ? T(1) : T(0);
    const T* const row = s.memory + (begin + i) * s.memory_row;
    for (int64_t w = 0; w < s.word; w += lanes)
      store(packed + i * tile.words + w, shown ? load_upto(row + w, s.word - w) : Vec<T>{});
  }
  tile.rows = packed;
  tile.row = tile.words;
}

// `value` where the rows of a block are shown, else `other`.
template <class T> FASTMEM_INLINE Vec<T> where_shown(const Tile<T>& tile, int64_t block, Vec<T> value, Vec<T> other) {
  return tile.whole || load(tile.shown + block * kLanes<T>) != Vec<T>{} ? value : other;
}

// One vector whose lanes sum those of `Rows` vectors, in the order of sum_rows but from lane bit `First` down.
template <int First, class T, int Rows> FASTMEM_INLINE Vec<T> fold(Vec<T> (&rows)[Rows]) {
  const IntVec<T> lane = lane_index<T>();
#pragma GCC unroll 4
  for (int half = First, count = Rows / 2; count > 0; half /= 2, count /= 2) {
    const IntVec<T> upper = (lane & half) != 0;
#pragma GCC unroll 8
    for (int i = 0; i < count; ++i) {
      const Vec<T> low = rows[i], high = rows[i + count];
      rows[i] = (upper ? high : low) + __builtin_shuffle(low, high, (lane ^ half) + (upper & kLanes<T>));
    }
  }
  return rows[0];
}

// In wide vectors the words of two rows side by side, which spares half of the sums over lanes; else those of one row.
inline constexpr bool kPaired = kVectorBytes > 16;
template <class T> inline constexpr int kStep = kPaired ? kLanes<T> / 2 : kLanes<T>; // words of a row in a vector

// The words of a key beside those rows.
template <class T> FASTMEM_INLINE Vec<T> load_key(const T* p) {
  if constexpr (kPaired) return load_twice(p);
  else return load(p);
}

// out[o,i] = sum over the words of row i of term(o, words, w), for every row of the tile. out: [Outputs,kTile]
template <int Outputs, class T, class Term>
FASTMEM_INLINE void reduce_rows(const Tile<T>& tile, const Term& term, T* out) {
  constexpr int lanes = kLanes<T>, step = kStep<T>, together = kInFlight < step ? kInFlight : step;
  constexpr int rounds = step / together;
  for (int64_t block = 0; block < tile.blocks; ++block) {
    Vec<T> partial[Outputs][rounds];
#pragma GCC unroll 4
    for (int round = 0; round < rounds; ++round) {
      const T* const rows = tile.rows + (block * lanes + round) * tile.row;
      Vec<T> sums[Outputs][together];
#pragma GCC unroll 6
      for (int o = 0; o < Outputs; ++o)
#pragma GCC unroll 4
        for (int k = 0; k < together; ++k) sums[o][k] = Vec<T>{}; // one by one: GCC fills whole arrays by a slow loop
      for (int64_t w = 0; w < tile.words; w += step) {
        Vec<T> words[together];
#pragma GCC unroll 4
        for (int k = 0; k < together; ++k) {
          const T* const row = rows + k * rounds * tile.row + w;
          // The next block. Vectors of two rows take turns where a line is two of them long: each line once.
          __builtin_prefetch(row + (lanes + (kPaired ? w & step : 0)) * tile.row);
          if constexpr (kPaired) words[k] = load_halves(row, row + step * tile.row);
          else words[k] = load(row);
        }
#pragma GCC unroll 6
        for (int o = 0; o < Outputs; ++o)
#pragma GCC unroll 4
          for (int k = 0; k < together; ++k) sums[o][k] += term(o, words[k], w);
      }
#pragma GCC unroll 6
      for (int o = 0; o < Outputs; ++o) partial[o][round] = fold<step / 2, T>(sums[o]);
    }
#pragma GCC unroll 6
    for (int o = 0; o < Outputs; ++o) store(out + o * kTile<T> + block * lanes, fold<rounds / 2, T>(partial[o]));
  }
}

// out[h,i] = keys_h . rows_i, or keys_h . rows_i^2
template <int Group, bool Squared, class T>
__attribute__((noinline)) void products(const Tile<T>& tile, const T* keys, int64_t pitch, T* out) {
  reduce_rows<Group>(tile, [&](int h, Vec<T> row, int64_t w) __attribute__((always_inline)) {
    return (Squared ? row * row : row) * load_key(keys + h * pitch + w);
  }, out);
}

// The same, and out[Group,i] = rows_i . rows_i
template <int Group, class T>
__attribute__((noinline)) void products_and_squares(const Tile<T>& tile, const T* keys, int64_t pitch, T* out) {
  reduce_rows<Group + 1>(tile, [&](int h, Vec<T> row, int64_t w) __attribute__((always_inline)) {
    return row * (h == Group ? row : load_key(keys + h * pitch + w));
  }, out);
}

// sums[h] += sum_i coefficients[h,i] rows_i, or rows_i^2. coefficients: [Group,kTile]
template <int Group, bool Squared, class T>
__attribute__((noinline)) void pull(const Tile<T>& tile, const T* coefficients, T* sums, int64_t pitch) {
  const auto columns = [&](int64_t w, auto width) __attribute__((always_inline)) {
    constexpr int Width = decltype(width)::value;
    constexpr int lanes = kLanes<T>;
    Vec<T> acc[Group][Width]; // of this tile alone: many short sums round less than a long one
#pragma GCC unroll 5
    for (int h = 0; h < Group; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) acc[h][v] = Vec<T>{};
    for (int64_t i = 0; i < tile.count; ++i) {
      Vec<T> row[Width];
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) {
        row[v] = load(tile.rows + i * tile.row + w + v * lanes);
        if constexpr (Squared) row[v] *= row[v];
      }
#pragma GCC unroll 5
      for (int h = 0; h < Group; ++h)
#pragma GCC unroll 4
        for (int v = 0; v < Width; ++v) acc[h][v] += row[v] * coefficients[h * kTile<T> + i];
    }
#pragma GCC unroll 5
    for (int h = 0; h < Group; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) {
        T* const sum = sums + h * pitch + w + v * lanes;
        store(sum, load(sum) + acc[h][v]);
      }
  };
  for_each_width<kInFlight, T>(tile.words, columns);
}

// out_i (+)= sum_h coefficients[h,i] keys_h - along_i rows_i. coefficients: [Group,kTile], along: [kTile], null: 0.
// With masks: - sum_h along[h,i] masks_h rows_i, along: [Group,kTile]. Hidden rows get 0.
template <int Group, class T> struct Push {
  const T *coefficients, *keys, *along, *masks;
  int64_t pitch;
  T* out;
  int64_t out_row, word;
  bool first; // out holds nothing yet
};

template <int Group, bool Masked, class T>
__attribute__((noinline)) void push(const Tile<T>& tile, const Push<Group, T>& given) {
  // Copies: the compiler would otherwise read them again after every store.
  const Push<Group, T> p = given;
  const T *const rows = tile.rows, *const shown = tile.whole ? nullptr : tile.shown;
  const int64_t distance = tile.row, begin = tile.begin, count = tile.count;
  for_each_width<kInFlight, T>(tile.words, [&](int64_t w, auto width) __attribute__((always_inline)) {
    constexpr int Width = decltype(width)::value;
    constexpr int lanes = kLanes<T>;
    Vec<T> keys[Group][Width];
#pragma GCC unroll 5
    for (int h = 0; h < Group; ++h)
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) keys[h][v] = load(p.keys + h * p.pitch + w + v * lanes);
    const int64_t last = p.word - w - (Width - 1) * lanes; // words of the last vector
    const bool part = last < lanes;
    for (int64_t i = 0; i < count; ++i) {
      const T* const row = rows + i * distance + w;
      T* const out = p.out + (begin + i) * p.out_row + w;
      Vec<T> acc[Width];
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v)
        acc[v] = p.first ? Vec<T>{} : v + 1 == Width && part ? load_part(out + v * lanes, last) : load(out + v * lanes);
      if (!shown || shown[i] != 0) {
#pragma GCC unroll 5
        for (int h = 0; h < Group; ++h)
#pragma GCC unroll 4
          for (int v = 0; v < Width; ++v) acc[v] += keys[h][v] * p.coefficients[h * kTile<T> + i];
        if constexpr (Masked) {
#pragma GCC unroll 4
          for (int v = 0; v < Width; ++v) {
            Vec<T> scale{};
#pragma GCC unroll 5
            for (int h = 0; h < Group; ++h)
              scale += load(p.masks + h * p.pitch + w + v * lanes) * p.along[h * kTile<T> + i];
            acc[v] -= scale * load(row + v * lanes);
          }
        } else if (p.along) {
#pragma GCC unroll 4
          for (int v = 0; v < Width; ++v) acc[v] -= load(row + v * lanes) * p.along[i];
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < Width; ++v) {
        if (v + 1 == Width && part) store_part(out + v * lanes, acc[v], last);
        else store(out + v * lanes, acc[v]);
      }
    }
  });
}

// squares, lengths, slopes: [kTile]; unwanted slopes: null
template <class T>
FASTMEM_INLINE void row_lengths(const Tile<T>& tile, const Similarity<T>& similarity, const T* squares, T* lengths,
                                T* slopes) {
  for (int64_t i = 0; i < tile.blocks * kLanes<T>; i += kLanes<T>) {
    const Length<T> length = length_of<T>(load(squares + i), similarity);
    store(lengths + i, length.length);
    if (slopes) store(slopes + i, length.slope);
  }
}

// What a group of heads finds in a tile. Without a key mask all heads share the first row of lengths and slopes.
template <class T> struct Matches {
  T dots[(kHeadGroup + 1) * kTile<T>], lengths[kHeadGroup * kTile<T>], slopes[kHeadGroup * kTile<T>];
};

template <int Group, class T>
FASTMEM_INLINE void match(const Search<T>& s, const Heads<T>& heads, int64_t head, const Tile<T>& tile,
                          bool wants_slopes, Matches<T>& found) {
  const T* const keys = heads.keys + head * heads.pitch;
  const auto measure = [&](const T* squares, int h) {
    row_lengths(tile, s.similarity, squares, found.lengths + h * kTile<T>,
                wants_slopes ? found.slopes + h * kTile<T> : nullptr);
  };
  if (s.key_mask) {
    products<Group, true>(tile, heads.masks + head * heads.pitch, heads.pitch, found.dots);
    for (int h = 0; h < Group; ++h) measure(found.dots + h * kTile<T>, h);
  } else if (head == 0) {
    products_and_squares<Group>(tile, keys, heads.pitch, found.dots);
    measure(found.dots + Group * kTile<T>, 0);
    return;
  }
  products<Group, false>(tile, keys, heads.pitch, found.dots);
}

// D of head `head`, the h-th of its group, with one block of rows.
template <class T>
FASTMEM_INLINE Vec<T> cosine(const Search<T>& s, const Heads<T>& heads, int64_t head, int h, int64_t block,
                             const Matches<T>& found) {
  const int64_t i = block * kLanes<T>;
  const Vec<T> length = load(found.lengths + (s.key_mask ? h : 0) * kTile<T> + i);
  return load(found.dots + h * kTile<T> + i) / (heads.lengths[head] * length + s.similarity.delta);
}

// a / b, to the last bit as a division has it, given 1 / b: one division serves both.
template <class T> FASTMEM_INLINE Vec<T> quotient(Vec<T> a, Vec<T> b, [[maybe_unused]] Vec<T> inverse) {
#if defined(__FMA__) || defined(__aarch64__)
  const Vec<T> first = a * inverse;
  return first + (a - first * b) * inverse;
#else
  return a / b;
#endif
}

// Sums over rows that the gradients of keys, strengths and key mask are made of. Those of several chunks add up.
template <class T> struct Sums {
  T *pulled, *squares;            // [A,pitch]; squares: null without a key mask
  T *strengths, *along, *weights; // [A,kLanes]; weights: only where they are recomputed
};

template <class T> Sums<T> sums_at(const Search<T>& s, T* memory) {
  const int64_t words = s.heads * rounded_up<T>(s.word, kPad<T>), lanes = s.heads * kPad<T>;
  T* const after = memory + (s.key_mask ? 2 : 1) * words;
  return {memory, s.key_mask ? memory + words : nullptr, after, after + lanes, after + 2 * lanes};
}

template <class T> int64_t sums_size(const Search<T>& s) {
  return s.heads * (rounded_up<T>(s.word, kPad<T>) * (s.key_mask ? 2 : 1) + 3 * kPad<T>);
}

// Where the gradient of the weights comes from: given, or the weights and it recomputed from reads.
template <class T> struct Upstream {
  const T* alive;                  // [A] 0: no score was finite
  const T* means;                  // [A] sum_i weights[h,i] grad_weights[h,i]
  const T *weights, *grad_weights; // [A,N]
  int64_t weights_row;
  const T *logsumexp, *grad_reads; // [A] [A,pitch]
};

template <class T> struct RowGradient {
  T* out; // [N,W]; unwanted: null
  int64_t row;
  bool first;
};

// With t = weights (grad_weights - mean) and q = s t / (|k| |m_i| + delta):
//   grad m_i = sum_h q k c^2 - (sum_h c^2 q D |k| / |m_i|) m_i  (+ sum_h weights grad_reads)
//   pulled = sum_i q m_i,   squares = sum_i (q D |k| / |m_i|) m_i^2,   strengths = sum_i t D,   along = sum_i q D |m_i|
template <bool Reads, class T>
void backward_rows(const Search<T>& s, const Heads<T>& heads, const Upstream<T>& up, const RowGradient<T>& memory,
                   bool wants_keys, const Sums<T>& sums, Scratch<T> scratch) {
  constexpr int lanes = kLanes<T>;
  T* const packed = scratch.take(kTile<T> * heads.pitch);
  Matches<T> found;
  T q[kHeadGroup * kTile<T>], along[kHeadGroup * kTile<T>];
  [[maybe_unused]] T weights[kHeadGroup * kTile<T>], grad_weights[kHeadGroup * kTile<T>];
  Tile<T> tile;
  for (int64_t begin = 0; begin < s.slots; begin += kTile<T>) {
    take_tile(s, begin, packed, tile);
    for (int64_t i = 0; i < kTile<T>; ++i) along[i] = 0;
    bool first = memory.first;
    for_each_head_group(s.heads, [&](int64_t head, auto group) __attribute__((always_inline)) {
      constexpr int Group = decltype(group)::value;
      match<Group>(s, heads, head, tile, true, found);
      if constexpr (Reads) products<Group, false>(tile, up.grad_reads + head * heads.pitch, heads.pitch, grad_weights);
      for (int h = 0; h < Group; ++h) {
        const int64_t own = h * kTile<T>, shared = s.key_mask ? own : 0, a = head + h;
        const bool alive = up.alive[a] != 0;
        const T strength = alive ? s.strengths[a] : T(0), mean = up.means[a], length = heads.lengths[a];
        Vec<T> sum_strengths{}, sum_along{};
        [[maybe_unused]] Vec<T> sum_weights{};
        for (int64_t block = 0; block < tile.blocks; ++block) {
          const int64_t i = block * lanes, left = tile.count - i;
          const Vec<T> row_length = load(found.lengths + shared + i), slope = load(found.slopes + shared + i);
          const Vec<T> denominator = length * row_length + s.similarity.delta, inverse = T(1) / denominator;
          const Vec<T> cosine = quotient<T>(load(found.dots + own + i), denominator, inverse);
          Vec<T> weight, grad;
          if constexpr (Reads) {
            weight = exp<T>(strength * cosine - up.logsumexp[a]);
            weight = alive ? where_shown(tile, block, weight, Vec<T>{}) : Vec<T>{};
            store(weights + own + i, weight);
            sum_weights += weight;
            grad = load(grad_weights + own + i);
          } else {
            weight = load_upto(up.weights + a * up.weights_row + tile.begin + i, left);
            grad = load_upto(up.grad_weights + a * up.weights_row + tile.begin + i, left);
          }
          const Vec<T> none{}, t = weight * (grad - mean);
          Vec<T> pull_by = strength * t * inverse, aligned = t * cosine;
          if (!tile.whole || !alive) {
            pull_by = alive ? where_shown(tile, block, pull_by, none) : none;
            aligned = alive ? where_shown(tile, block, aligned, none) : none;
          }
          const Vec<T> turned = alive ? where_shown(tile, block, pull_by * cosine, none) : none;
          const Vec<T> along_row = turned * length * slope;
          sum_strengths += aligned;
          sum_along += turned * row_length;
          store(q + own + i, pull_by);
          store(along + shared + i, s.key_mask ? along_row : load(along + i) + along_row);
        }
        const auto add = [&](T* sums_of, Vec<T> v) { store(sums_of + a * kPad<T>, load(sums_of + a * kPad<T>) + v); };
        add(sums.strengths, sum_strengths);
        add(sums.along, sum_along);
        if constexpr (Reads) add(sums.weights, sum_weights);
      }
      const int64_t at = head * heads.pitch;
      if (wants_keys) {
        pull<Group, false>(tile, q, sums.pulled + at, heads.pitch);
        if (s.key_mask) pull<Group, true>(tile, along, sums.squares + at, heads.pitch);
      }
      if (!memory.out) return;
      Push<Group, T> p{.coefficients = q,
                       .keys = heads.keys + at,
                       .along = along,
                       .masks = heads.masks + at,
                       .pitch = heads.pitch,
                       .out = memory.out,
                       .out_row = memory.row,
                       .word = s.word,
                       .first = first};
      first = false;
      if (s.key_mask) {
        push<Group, true>(tile, p);
      } else {
        if (head + Group < s.heads) p.along = nullptr;
        push<Group, false>(tile, p);
      }
      if constexpr (Reads) {
        p.coefficients = weights;
        p.keys = up.grad_reads + at;
        p.along = nullptr;
        p.first = false;
        push<Group, false>(tile, p);
      }
    });
  }
}

// The gradients of keys [A,W], strengths [A] and key mask [A,W] from the sums over all rows. Unwanted: null.
// Weights recomputed from a rounded logsumexp are all too large by one factor, which their sum tells.
template <bool Reads, class T>
void finish(const Search<T>& s, const Heads<T>& heads, const T* alive, const Sums<T>& sums, T* grad_keys,
            T* grad_strengths, T* grad_key_mask) {
  constexpr int64_t lanes = kLanes<T>;
  for (int64_t h = 0; h < s.heads; ++h) {
    const auto total = [&](const T* sums_of) { return sum<T>(load(sums_of + h * kPad<T>)); };
    const T scale = Reads && alive[h] != 0 ? 1 / total(sums.weights) : T(1);
    const T along = total(sums.along) * heads.slopes[h];
    if (grad_strengths) grad_strengths[h] = scale * total(sums.strengths);
    for (int64_t w = 0; w < s.word; w += lanes) {
      const int64_t left = s.word - w, at = h * s.word + w, padded_at = h * heads.pitch + w;
      const Vec<T> key = load_upto(s.keys + at, left), pulled = load(sums.pulled + padded_at), none{};
      Vec<T> grad_key = pulled - along * key, grad_mask{};
      if (s.key_mask) {
        const Vec<T> mask = load_upto(s.key_mask + at, left);
        grad_mask = mask * (T(2) * key * pulled - along * key * key - load(sums.squares + padded_at));
        grad_key *= mask * mask;
      }
      if (grad_keys) store_upto(grad_keys + at, alive[h] != 0 ? scale * grad_key : none, left);
      if (grad_key_mask) store_upto(grad_key_mask + at, alive[h] != 0 ? scale * grad_mask : none, left);
    }
  }
}

} // namespace fastmem::FASTMEM_ISA
#endif
