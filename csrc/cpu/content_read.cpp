#include "content_read_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

#include <algorithm>
#include <string>
#include <tuple>

namespace fastmem {

// Padded keys, masks and grad_reads; lengths, slopes, means, who is alive; a packed tile.
int64_t read_scratch(int64_t heads, int64_t word) { return (3 * heads + 64) * in_lines(word) + 4 * in_lines(heads); }

int64_t read_partial(int64_t heads, int64_t word, int64_t pad) {
  return heads * ((word + pad - 1) / pad * pad + 2 * pad);
}

int64_t read_backward_partial(int64_t heads, int64_t word, bool masked, int64_t pad) {
  return heads * ((word + pad - 1) / pad * pad * (masked ? 2 : 1) + 3 * pad);
}

namespace {

// A search is a set of heads over one memory under one slot mask: those of one sample, or of the whole batch where it
// shares both. Its rows are cut into chunks that depend on nothing but the shape.
struct Plan {
  int64_t batch, slots, word, heads; // of the arguments
  int64_t searches, search_heads;
  bool shared; // one memory for several searches
  int64_t chunks, chunk_rows;

  int64_t rows(int64_t chunk) const { return std::min(chunk_rows, slots - chunk * chunk_rows); }
};

Plan check(const Tensor& memory, const Tensor& keys, const Tensor& strengths, const std::optional<Tensor>& key_mask,
           const std::optional<Tensor>& slot_mask) {
  STD_TORCH_CHECK(memory.dim() == 3 && keys.dim() == 3, "memory and keys: expected 3 dimensions");
  Plan p{.batch = keys.size(0),
         .slots = memory.size(1),
         .word = memory.size(2),
         .heads = keys.size(1),
         .searches = 0,
         .search_heads = 0,
         .shared = false,
         .chunks = 0,
         .chunk_rows = 0};
  const bool one_memory = memory.size(0) == 1;
  require(memory, memory, {one_memory ? 1 : p.batch, p.slots, p.word}, "memory");
  require(keys, memory, {p.batch, p.heads, p.word}, "keys");
  require(strengths, memory, {p.batch, p.heads}, "strengths");
  require(key_mask, memory, {p.batch, p.heads, p.word}, "key_mask");
  const bool one_mask = !slot_mask || slot_mask->size(0) == 1;
  require_mask(slot_mask, {one_mask ? 1 : p.batch, p.slots}, "slot_mask");

  const bool together = one_memory && one_mask;
  p.searches = together ? 1 : p.batch;
  p.search_heads = together ? p.batch * p.heads : p.heads;
  p.shared = one_memory && !together;
  const int64_t work = std::max<int64_t>(1, p.search_heads * p.word);
  const int64_t rows = std::max({int64_t{64}, (int64_t{1} << 18) / work, (p.slots + 63) / 64});
  p.chunk_rows = (rows + 63) / 64 * 64;
  p.chunks = (p.slots + p.chunk_rows - 1) / p.chunk_rows;
  return p;
}

// The arguments in the layout that the kernel walks.
struct Arguments {
  Tensor memory, keys, strengths;
  std::optional<Tensor> key_mask, slot_mask;

  template <class T> Search<T> search(const Plan& p, int64_t g, int64_t chunk, const Similarity<T>& measure) const {
    const int64_t first = chunk * p.chunk_rows, head = g * p.search_heads;
    const T* const sample = data<T>(memory) + (memory.size(0) == 1 ? 0 : g * memory.stride(0));
    const int64_t mask_row = slot_mask && slot_mask->size(0) != 1 ? g * p.slots : 0;
    return {.slots = p.rows(chunk),
            .heads = p.search_heads,
            .word = p.word,
            .memory = sample + first * memory.stride(1),
            .memory_row = memory.stride(1),
            .keys = data<T>(keys) + head * p.word,
            .strengths = data<T>(strengths) + head,
            .key_mask = at<T>(key_mask, head * p.word),
            .slot_mask = slot_mask ? data<bool>(slot_mask) + mask_row + first : nullptr,
            .similarity = measure};
  }
};

Arguments arrange(const Tensor& memory, const Tensor& keys, const Tensor& strengths,
                  const std::optional<Tensor>& key_mask, const std::optional<Tensor>& slot_mask) {
  return {with_dense_rows(memory), dense(keys), dense(strengths), contiguous(key_mask), contiguous(slot_mask)};
}

std::tuple<Tensor, Tensor> content_read(Tensor memory, Tensor keys, Tensor strengths, std::optional<Tensor> key_mask,
                                        std::optional<Tensor> slot_mask, Text norm_text, double eps) {
  const std::string norm = take(norm_text);
  const Plan p = check(memory, keys, strengths, key_mask, slot_mask);
  const Arguments arguments = arrange(memory, keys, strengths, key_mask, slot_mask);
  const Tensor reads = empty(memory, {p.batch, p.heads, p.word}), logsumexp = empty(memory, {p.batch, p.heads});
  dispatch(memory, [&]<class T>() {
    const Similarity<T> measure = similarity<T>(norm, eps);
    const int64_t units = p.searches * p.chunks, bytes = p.chunk_rows * p.word * int64_t(sizeof(T));
    const int64_t workers = shares(units, bytes), size = read_scratch(p.search_heads, p.word);
    const int64_t partial = read_partial(p.search_heads, p.word, 64 / int64_t(sizeof(T)));
    const Workspace<T> scratch(workers * size), partials(units * partial);
    for_each_sample_in_shares(units, workers, [&](int64_t unit, int64_t worker) {
      const Read<T> chunk{.search = arguments.search<T>(p, unit / p.chunks, unit % p.chunks, measure),
                          .partial = partials.data() + unit * partial,
                          .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(content_read(chunk));
    });
    for_each_sample(p.searches, p.chunks * partial * int64_t(sizeof(T)), [&](int64_t g) {
      const ReadResult<T> result{.heads = p.search_heads,
                                 .word = p.word,
                                 .chunks = p.chunks,
                                 .partials = partials.data() + g * p.chunks * partial,
                                 .reads = mutable_data<T>(reads) + g * p.search_heads * p.word,
                                 .logsumexp = mutable_data<T>(logsumexp) + g * p.search_heads};
      FASTMEM_ON_ISA(content_read_result(result));
    });
  });
  return {reads, logsumexp};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> content_read_backward(Tensor grad_reads, Tensor reads, Tensor logsumexp,
                                                                 Tensor memory, Tensor keys, Tensor strengths,
                                                                 std::optional<Tensor> key_mask,
                                                                 std::optional<Tensor> slot_mask, Text norm_text,
                                                                 double eps, std::vector<bool> output_mask) {
  const std::string norm = take(norm_text);
  const Plan p = check(memory, keys, strengths, key_mask, slot_mask);
  require(grad_reads, memory, {p.batch, p.heads, p.word}, "grad_reads");
  require(reads, memory, {p.batch, p.heads, p.word}, "reads");
  require(logsumexp, memory, {p.batch, p.heads}, "logsumexp");
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected 4 entries");
  const Arguments arguments = arrange(memory, keys, strengths, key_mask, slot_mask);
  grad_reads = dense(grad_reads);
  reads = dense(reads);
  logsumexp = dense(logsumexp);

  const int64_t memories = memory.size(0);
  const bool wants_mask = output_mask[3] && key_mask, any = p.batch * p.heads * p.slots > 0;
  const auto made = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return !wanted ? nothing(memory) : any ? empty_large(memory, sizes) : zeros(memory, sizes);
  };
  const Tensor grad_memory = made(output_mask[0], {memories, p.slots, p.word});
  const Tensor grad_keys = made(output_mask[1], {p.batch, p.heads, p.word});
  const Tensor grad_strengths = made(output_mask[2], {p.batch, p.heads});
  const Tensor grad_key_mask = made(wants_mask, {p.batch, p.heads, p.word});
  if (!any) return {grad_memory, grad_keys, grad_strengths, grad_key_mask};

  dispatch(memory, [&]<class T>() {
    const Similarity<T> measure = similarity<T>(norm, eps);
    // Searches that share a memory add to its gradient in turn; the rows of a chunk belong to one unit.
    const int64_t turns = p.shared ? p.searches : 1, units = p.searches / turns * p.chunks;
    const int64_t workers = shares(units, 2 * turns * p.chunk_rows * p.word * int64_t(sizeof(T)));
    const int64_t size = read_scratch(p.search_heads, p.word), words = p.search_heads * p.word;
    const int64_t pad = 64 / int64_t(sizeof(T));
    const int64_t partial = read_backward_partial(p.search_heads, p.word, key_mask.has_value(), pad);
    const int64_t finishers = shares(p.searches, p.chunks * partial * int64_t(sizeof(T)));
    const Workspace<T> scratch(std::max(workers, finishers) * size), partials(p.searches * p.chunks * partial);
    for_each_sample_in_shares(units, workers, [&](int64_t unit, int64_t worker) {
      const int64_t c = unit % p.chunks;
      for (int64_t turn = 0; turn < turns; ++turn) {
        const int64_t g = unit / p.chunks * turns + turn, g_memory = p.shared ? 0 : g, heads = g * p.search_heads;
        const ReadBackward<T> chunk{
            .search = arguments.search<T>(p, g, c, measure),
            .reads = data<T>(reads) + heads * p.word,
            .logsumexp = data<T>(logsumexp) + heads,
            .grad_reads = data<T>(grad_reads) + heads * p.word,
            .grad_memory = at<T>(output_mask[0], grad_memory, (g_memory * p.slots + c * p.chunk_rows) * p.word),
            .grad_memory_row = p.word,
            .accumulate = turn > 0,
            .wants_keys = output_mask[1] || wants_mask,
            .partial = partials.data() + (g * p.chunks + c) * partial,
            .scratch = scratch.data() + worker * size};
        FASTMEM_ON_ISA(content_read_backward(chunk));
      }
    });
    for_each_sample_in_shares(p.searches, finishers, [&](int64_t g, int64_t worker) {
      const ReadGradient<T> gradient{.search = arguments.search<T>(p, g, 0, measure),
                                     .chunks = p.chunks,
                                     .partials = partials.data() + g * p.chunks * partial,
                                     .logsumexp = data<T>(logsumexp) + g * p.search_heads,
                                     .grad_keys = at<T>(output_mask[1], grad_keys, g * words),
                                     .grad_strengths = at<T>(output_mask[2], grad_strengths, g * p.search_heads),
                                     .grad_key_mask = at<T>(wants_mask, grad_key_mask, g * words),
                                     .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(content_read_gradient(gradient));
    });
  });
  return {grad_memory, grad_keys, grad_strengths, grad_key_mask};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("content_read(Tensor memory, Tensor keys, Tensor strengths, Tensor? key_mask, Tensor? slot_mask, "
        "str norm, float eps) -> (Tensor, Tensor)");
  m.def("content_read_backward(Tensor grad_reads, Tensor reads, Tensor logsumexp, Tensor memory, Tensor keys, "
        "Tensor strengths, Tensor? key_mask, Tensor? slot_mask, str norm, float eps, bool[4] output_mask) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("content_read", TORCH_BOX(&content_read));
  m.impl("content_read_backward", TORCH_BOX(&content_read_backward));
}

} // namespace fastmem
