// Content read of one chunk of a memory: reads[h] = sum_i softmax_i(score[h,i]) m_i, the weights never stored.
//
// A chunk leaves, for every head, the highest score and the sums of exp(score - highest) and exp(score - highest) m_i.
// Chunks are put together in their order, so that the result does not depend on who worked on which.
#pragma once

#include "similarity.h"

namespace fastmem {

template <class T> struct Read {
  Search<T> search; // of the chunk's rows
  T* partial;       // read_partial(heads, word, pad)
  T* scratch;       // read_scratch(heads, word)
};

template <class T> struct ReadResult {
  int64_t heads, word, chunks;
  const T* partials;    // [chunks, read_partial]
  T *reads, *logsumexp; // [A,W] [A]
};

template <class T> struct ReadBackward {
  Search<T> search;                        // of the chunk's rows
  const T *reads, *logsumexp, *grad_reads; // [A,W] [A] [A,W]
  T* grad_memory;                          // [N,W] of the chunk; unwanted: null
  int64_t grad_memory_row;
  bool accumulate; // grad_memory holds the gradient of earlier samples
  bool wants_keys; // or the key mask
  T* partial;      // read_backward_partial
  T* scratch;
};

template <class T> struct ReadGradient {
  Search<T> search; // its memory is not read
  int64_t chunks;
  T* partials;                                   // [chunks, read_backward_partial]; the first becomes the sum
  const T* logsumexp;                            // [A]
  T *grad_keys, *grad_strengths, *grad_key_mask; // [A,W] [A] [A,W]; unwanted: null
  T* scratch;
};

// Elements of scratch, and of what one chunk leaves in the two directions. `pad`: elements of a cache line.
int64_t read_scratch(int64_t heads, int64_t word);
int64_t read_partial(int64_t heads, int64_t word, int64_t pad);
int64_t read_backward_partial(int64_t heads, int64_t word, bool masked, int64_t pad);

FASTMEM_EACH_ISA(template <class T> void content_read(const Read<T>& s);
                 template <class T> void content_read_result(const ReadResult<T>& s);
                 template <class T> void content_read_backward(const ReadBackward<T>& s);
                 template <class T> void content_read_gradient(const ReadGradient<T>& s);)

} // namespace fastmem

#ifdef FASTMEM_ISA

namespace fastmem::FASTMEM_ISA {

// What one chunk leaves: sums [A,pitch], highest score and total, the latter two by lane [A,kLanes].
template <class T> struct Reading {
  T *sums, *highest, *total;
};

template <class T> Reading<T> reading_at(T* partial, int64_t heads, int64_t word) {
  T* const after = partial + heads * rounded_up<T>(word, kPad<T>);
  return {partial, after, after + heads * kPad<T>};
}

// exp(x), for a shift between two maxima of which both may be -inf.
template <class T> FASTMEM_INLINE Vec<T> rescaling(T from, T to) {
  return exp<T>(broadcast(from - (to == T(-__builtin_inf()) ? T(0) : to)));
}

template <class T> void content_read(const Read<T>& a) {
  constexpr int64_t lanes = kLanes<T>;
  constexpr T lowest = T(-__builtin_inf());
  const Search<T>& s = a.search;
  Scratch<T> scratch{a.scratch};
  const Heads<T> heads = prepare<T>(s, nullptr, scratch);
  T* const packed = scratch.take(kTile<T> * heads.pitch);
  const Reading<T> out = reading_at(a.partial, s.heads, s.word);
  for (int64_t i = 0; i < s.heads * heads.pitch; i += lanes) store(out.sums + i, Vec<T>{});
  for (int64_t h = 0; h < s.heads; ++h) {
    store(out.highest + h * kPad<T>, broadcast(lowest));
    store(out.total + h * kPad<T>, Vec<T>{});
  }
  Matches<T> found;
  T powers[kHeadGroup * kTile<T>];
  Tile<T> tile;
  for (int64_t begin = 0; begin < s.slots; begin += kTile<T>) {
    take_tile(s, begin, packed, tile);
    for_each_head_group(s.heads, [&](int64_t head, auto group) __attribute__((always_inline)) {
      constexpr int Group = decltype(group)::value;
      match<Group>(s, heads, head, tile, false, found);
      for (int h = 0; h < Group; ++h) {
        T* const own = powers + h * kTile<T>;
        const T strength = s.strengths[head + h];
        Vec<T> maxima = load(out.highest + (head + h) * kPad<T>);
        const T before = maxima[0];
        for (int64_t block = 0; block < tile.blocks; ++block) {
          const Vec<T> similar = cosine(s, heads, head + h, h, block, found);
          const Vec<T> scores = where_shown(tile, block, strength * similar, broadcast(lowest));
          maxima = scores > maxima ? scores : maxima;
          store(own + block * lanes, similar);
        }
        const T highest = max<T>(maxima), shift = highest == lowest ? T(0) : highest;
        Vec<T> total = load(out.total + (head + h) * kPad<T>);
        if (highest != before) {
          const Vec<T> scale = rescaling<T>(before, highest);
          total *= scale;
          T* const sums = out.sums + (head + h) * heads.pitch;
          for (int64_t w = 0; w < tile.words; w += lanes) store(sums + w, load(sums + w) * scale);
          store(out.highest + (head + h) * kPad<T>, broadcast(highest));
        }
        for (int64_t block = 0; block < tile.blocks; ++block) {
          // The product unrounded, as the backward has it: else the sharpest weights lose a digit.
          const Vec<T> power = where_shown(tile, block, exp<T>(strength * load(own + block * lanes) - shift), Vec<T>{});
          total += power;
          store(own + block * lanes, power);
        }
        store(out.total + (head + h) * kPad<T>, total);
      }
      pull<Group, false>(tile, powers, out.sums + head * heads.pitch, heads.pitch);
    });
  }
}

template <class T> void content_read_result(const ReadResult<T>& a) {
  constexpr int64_t lanes = kLanes<T>;
  const int64_t pitch = rounded_up<T>(a.word, kPad<T>), size = a.heads * (pitch + 2 * kPad<T>);
  for (int64_t h = 0; h < a.heads; ++h) {
    T highest = T(-__builtin_inf());
    const auto chunk = [&](int64_t c) { return reading_at(const_cast<T*>(a.partials) + c * size, a.heads, a.word); };
    for (int64_t c = 0; c < a.chunks; ++c) {
      const T other = chunk(c).highest[h * kPad<T>];
      highest = other > highest ? other : highest;
    }
    Vec<T> totals{};
    for (int64_t c = 0; c < a.chunks; ++c)
      totals += load(chunk(c).total + h * kPad<T>) * rescaling<T>(chunk(c).highest[h * kPad<T>], highest);
    const T total = sum<T>(totals), scale = total == 0 ? T(0) : 1 / total;
    a.logsumexp[h] = highest + T(sizeof(T) == 4 ? __builtin_logf(float(total)) : __builtin_log(total));
    for (int64_t w = 0; w < a.word; w += lanes) {
      Vec<T> read{};
      for (int64_t c = 0; c < a.chunks; ++c)
        read += load(chunk(c).sums + h * pitch + w) * rescaling<T>(chunk(c).highest[h * kPad<T>], highest);
      store_upto(a.reads + h * a.word + w, read * scale, a.word - w);
    }
  }
}

// 0 where no score was finite.
template <class T> T* alive_heads(const T* logsumexp, int64_t heads, Scratch<T>& scratch) {
  T* const alive = scratch.take(heads);
  for (int64_t h = 0; h < heads; ++h) alive[h] = logsumexp[h] == T(-__builtin_inf()) ? T(0) : T(1);
  return alive;
}

template <class T> void content_read_backward(const ReadBackward<T>& a) {
  constexpr int64_t lanes = kLanes<T>;
  const Search<T>& s = a.search;
  Scratch<T> scratch{a.scratch};
  const T* const alive = alive_heads(a.logsumexp, s.heads, scratch);
  const Heads<T> heads = prepare<T>(s, alive, scratch);
  T* const means = scratch.take(s.heads);
  T* const grad_reads = scratch.zeros(s.heads * heads.pitch);
  for (int64_t h = 0; h < s.heads; ++h) {
    Vec<T> mean{};
    if (alive[h] != 0)
      for (int64_t w = 0; w < s.word; w += lanes) {
        const Vec<T> grad = load_upto(a.grad_reads + h * s.word + w, s.word - w);
        store(grad_reads + h * heads.pitch + w, grad);
        mean += grad * load_upto(a.reads + h * s.word + w, s.word - w);
      }
    means[h] = sum<T>(mean);
  }
  const Sums<T> sums = sums_at(s, a.partial);
  for (int64_t i = 0; i < sums_size(s); i += lanes) store(a.partial + i, Vec<T>{});
  const Upstream<T> upstream{.alive = alive,
                             .means = means,
                             .weights = nullptr,
                             .grad_weights = nullptr,
                             .weights_row = 0,
                             .logsumexp = a.logsumexp,
                             .grad_reads = grad_reads};
  const RowGradient<T> memory{.out = a.grad_memory, .row = a.grad_memory_row, .first = !a.accumulate};
  backward_rows<true>(s, heads, upstream, memory, a.wants_keys, sums, scratch);
}

template <class T> void content_read_gradient(const ReadGradient<T>& a) {
  const Search<T>& s = a.search;
  Scratch<T> scratch{a.scratch};
  const T* const alive = alive_heads(a.logsumexp, s.heads, scratch);
  const Heads<T> heads = prepare<T>(s, alive, scratch);
  const int64_t size = sums_size(s);
  for (int64_t c = 1; c < a.chunks; ++c)
    for (int64_t i = 0; i < size; i += kLanes<T>) {
      const Vec<T> chunk = load(a.partials + c * size + i);
      store(a.partials + i, load(a.partials + i) + chunk);
    }
  finish<true>(s, heads, alive, sums_at(s, a.partials), a.grad_keys, a.grad_strengths, a.grad_key_mask);
}

template void content_read(const Read<float>&);
template void content_read(const Read<double>&);
template void content_read_result(const ReadResult<float>&);
template void content_read_result(const ReadResult<double>&);
template void content_read_backward(const ReadBackward<float>&);
template void content_read_backward(const ReadBackward<double>&);
template void content_read_gradient(const ReadGradient<float>&);
template void content_read_gradient(const ReadGradient<double>&);

} // namespace fastmem::FASTMEM_ISA
#endif
