#include "content_addressing_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

#include <string>
#include <tuple>

namespace fastmem {

// Padded keys, masks and their two sums; sums by lane and maxima; lengths, slopes, means, who is alive; a packed tile.
int64_t addressing_scratch(int64_t heads, int64_t word) {
  const int64_t pitch = in_lines(word);
  return heads * (4 * pitch + 4 * 16) + 4 * (heads + 15) + 64 * pitch;
}

namespace {

struct Sizes {
  int64_t batch, slots, word, heads;
};

Sizes check(const Tensor& memory, const Tensor& keys, const Tensor& strengths, const std::optional<Tensor>& key_mask,
            const std::optional<Tensor>& slot_mask) {
  STD_TORCH_CHECK(memory.dim() == 3 && keys.dim() == 3, "memory and keys: expected 3 dimensions");
  const Sizes z{memory.size(0), memory.size(1), memory.size(2), keys.size(1)};
  require(memory, memory, {z.batch, z.slots, z.word}, "memory");
  require(keys, memory, {z.batch, z.heads, z.word}, "keys");
  require(strengths, memory, {z.batch, z.heads}, "strengths");
  require(key_mask, memory, {z.batch, z.heads, z.word}, "key_mask");
  require_mask(slot_mask, {z.batch, z.slots}, "slot_mask");
  return z;
}

// The arguments in the layout that the kernel walks.
struct Arguments {
  Tensor memory, keys, strengths;
  std::optional<Tensor> key_mask, slot_mask;

  template <class T> Search<T> sample(int64_t b, const Sizes& z, const Similarity<T>& similarity) const {
    return {.slots = z.slots,
            .heads = z.heads,
            .word = z.word,
            .memory = data<T>(memory) + b * memory.stride(0),
            .memory_row = memory.stride(1),
            .keys = data<T>(keys) + b * z.heads * z.word,
            .strengths = data<T>(strengths) + b * z.heads,
            .key_mask = at<T>(key_mask, b * z.heads * z.word),
            .slot_mask = slot_mask ? data<bool>(slot_mask) + b * z.slots : nullptr,
            .similarity = similarity};
  }
};

Arguments arrange(const Tensor& memory, const Tensor& keys, const Tensor& strengths,
                  const std::optional<Tensor>& key_mask, const std::optional<Tensor>& slot_mask) {
  return {with_dense_rows(memory), dense(keys), dense(strengths), contiguous(key_mask), contiguous(slot_mask)};
}

Tensor content_addressing(Tensor memory, Tensor keys, Tensor strengths, std::optional<Tensor> key_mask,
                          std::optional<Tensor> slot_mask, Text norm_text, double eps) {
  const std::string norm = take(norm_text);
  const Sizes z = check(memory, keys, strengths, key_mask, slot_mask);
  const Arguments arguments = arrange(memory, keys, strengths, key_mask, slot_mask);
  const Tensor weights = empty(memory, {z.batch, z.heads, z.slots});
  dispatch(memory, [&]<class T>() {
    const Similarity<T> measure = similarity<T>(norm, eps);
    const int64_t workers = shares(z.batch, z.slots * (z.word + z.heads) * int64_t(sizeof(T)));
    const int64_t size = addressing_scratch(z.heads, z.word);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const Addressing<T> sample{.search = arguments.sample<T>(b, z, measure),
                                 .weights = mutable_data<T>(weights) + b * z.heads * z.slots,
                                 .weights_row = z.slots,
                                 .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(content_addressing(sample));
    });
  });
  return weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> content_addressing_backward(Tensor grad_weights, Tensor weights,
                                                                       Tensor memory, Tensor keys, Tensor strengths,
                                                                       std::optional<Tensor> key_mask,
                                                                       std::optional<Tensor> slot_mask, Text norm_text,
                                                                       double eps, std::vector<bool> output_mask) {
  const std::string norm = take(norm_text);
  const Sizes z = check(memory, keys, strengths, key_mask, slot_mask);
  require(grad_weights, memory, {z.batch, z.heads, z.slots}, "grad_weights");
  require(weights, memory, {z.batch, z.heads, z.slots}, "weights");
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected 4 entries");
  const Arguments arguments = arrange(memory, keys, strengths, key_mask, slot_mask);
  grad_weights = dense(grad_weights);
  weights = dense(weights);

  const bool wants_mask = output_mask[3] && key_mask;
  const auto made = [&](bool wanted, std::initializer_list<int64_t> sizes) {
    return !wanted ? nothing(memory) : z.heads > 0 ? empty_large(memory, sizes) : zeros(memory, sizes);
  };
  const Tensor grad_memory = made(output_mask[0], {z.batch, z.slots, z.word});
  const Tensor grad_keys = made(output_mask[1], {z.batch, z.heads, z.word});
  const Tensor grad_strengths = made(output_mask[2], {z.batch, z.heads});
  const Tensor grad_key_mask = made(wants_mask, {z.batch, z.heads, z.word});
  if (z.heads == 0) return {grad_memory, grad_keys, grad_strengths, grad_key_mask};
  dispatch(memory, [&]<class T>() {
    const Similarity<T> measure = similarity<T>(norm, eps);
    const int64_t workers = shares(z.batch, 2 * z.slots * (z.word + z.heads) * int64_t(sizeof(T)));
    const int64_t size = addressing_scratch(z.heads, z.word);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const int64_t words = b * z.heads * z.word, row = b * z.heads * z.slots;
      const AddressingBackward<T> sample{.search = arguments.sample<T>(b, z, measure),
                                         .weights = data<T>(weights) + row,
                                         .grad_weights = data<T>(grad_weights) + row,
                                         .weights_row = z.slots,
                                         .grad_memory = at<T>(output_mask[0], grad_memory, b * z.slots * z.word),
                                         .grad_memory_row = z.word,
                                         .accumulate = false,
                                         .grad_keys = at<T>(output_mask[1], grad_keys, words),
                                         .grad_strengths = at<T>(output_mask[2], grad_strengths, b * z.heads),
                                         .grad_key_mask = at<T>(wants_mask, grad_key_mask, words),
                                         .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(content_addressing_backward(sample));
    });
  });
  return {grad_memory, grad_keys, grad_strengths, grad_key_mask};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("content_addressing(Tensor memory, Tensor keys, Tensor strengths, Tensor? key_mask, Tensor? slot_mask, "
        "str norm, float eps) -> Tensor");
  m.def("content_addressing_backward(Tensor grad_weights, Tensor weights, Tensor memory, Tensor keys, "
        "Tensor strengths, Tensor? key_mask, Tensor? slot_mask, str norm, float eps, bool[4] output_mask) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("content_addressing", TORCH_BOX(&content_addressing));
  m.impl("content_addressing_backward", TORCH_BOX(&content_addressing_backward));
}

} // namespace fastmem
