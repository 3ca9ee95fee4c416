#include "weighted_read_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, slots, word, heads;
};

Sizes check(const Tensor& memory, const Tensor& weights) {
  STD_TORCH_CHECK(memory.dim() == 3 && weights.dim() == 3, "wrong number of dimensions");
  const Sizes z{memory.size(0), memory.size(1), memory.size(2), weights.size(1)};
  require(memory, memory, {z.batch, z.slots, z.word}, "memory");
  require(weights, memory, {z.batch, z.heads, z.slots}, "weights");
  return z;
}

Tensor weighted_read(Tensor memory, Tensor weights) {
  const Sizes z = check(memory, weights);
  memory = with_dense_rows(memory);
  weights = dense(weights);
  const Tensor reads = empty(memory, {z.batch, z.heads, z.word});
  dispatch(memory, [&]<class T>() {
    for_each_sample(z.batch, z.slots * (z.word + z.heads) * int64_t(sizeof(T)), [&](int64_t b) {
      const WeightedRead<T> sample{.slots = z.slots,
                                   .word = z.word,
                                   .heads = z.heads,
                                   .memory = data<T>(memory) + b * memory.stride(0),
                                   .memory_row = memory.stride(1),
                                   .weights = data<T>(weights) + b * z.heads * z.slots,
                                   .reads = mutable_data<T>(reads) + b * z.heads * z.word};
      FASTMEM_ON_ISA(weighted_read(sample));
    });
  });
  return reads;
}

std::tuple<Tensor, Tensor> weighted_read_backward(Tensor grad_reads, Tensor memory, Tensor weights,
                                                  std::vector<bool> output_mask) {
  const Sizes z = check(memory, weights);
  require(grad_reads, memory, {z.batch, z.heads, z.word}, "grad_reads");
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask: expected 2 entries");
  memory = with_dense_rows(memory);
  weights = dense(weights);
  grad_reads = dense(grad_reads);
  const auto memory_like = [&] {
    return z.heads > 0 ? empty_large(memory, {z.batch, z.slots, z.word}) : zeros(memory, {z.batch, z.slots, z.word});
  };
  const Tensor grad_memory = output_mask[0] ? memory_like() : nothing(memory);
  const Tensor grad_weights = wanted(output_mask[1], memory, {z.batch, z.heads, z.slots});
  dispatch(memory, [&]<class T>() {
    for_each_sample(z.batch, 2 * z.slots * (z.word + z.heads) * int64_t(sizeof(T)), [&](int64_t b) {
      const WeightedReadBackward<T> sample{.slots = z.slots,
                                           .word = z.word,
                                           .heads = z.heads,
                                           .memory = data<T>(memory) + b * memory.stride(0),
                                           .memory_row = memory.stride(1),
                                           .weights = data<T>(weights) + b * z.heads * z.slots,
                                           .grad_reads = data<T>(grad_reads) + b * z.heads * z.word,
                                           .grad_memory = at<T>(output_mask[0], grad_memory, b * z.slots * z.word),
                                           .grad_weights = at<T>(output_mask[1], grad_weights, b * z.heads * z.slots),
                                           .grad_memory_row = z.word,
                                           .accumulate = false};
      FASTMEM_ON_ISA(weighted_read_backward(sample));
    });
  });
  return {grad_memory, grad_weights};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("weighted_read(Tensor memory, Tensor weights) -> Tensor");
  m.def("weighted_read_backward(Tensor grad_reads, Tensor memory, Tensor weights, bool[2] output_mask) "
        "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("weighted_read", TORCH_BOX(&weighted_read));
  m.impl("weighted_read_backward", TORCH_BOX(&weighted_read_backward));
}

} // namespace fastmem
