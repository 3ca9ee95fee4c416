#include "memory_write_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, slots, word, write_heads;
};

Sizes check(const Tensor& memory, const Tensor& write_weights, const Tensor& erase, const Tensor& values,
            const std::optional<Tensor>& retention) {
  STD_TORCH_CHECK(memory.dim() == 3 && write_weights.dim() == 3, "wrong number of dimensions");
  const Sizes z{memory.size(0), memory.size(1), memory.size(2), write_weights.size(1)};
  require(memory, memory, {z.batch, z.slots, z.word}, "memory");
  require(write_weights, memory, {z.batch, z.write_heads, z.slots}, "write_weights");
  require(erase, memory, {z.batch, z.write_heads, z.word}, "erase");
  require(values, memory, {z.batch, z.write_heads, z.word}, "values");
  require(retention, memory, {z.batch, z.slots}, "retention");
  return z;
}

// `memory` and `new_memory` may be the same tensor.
void step(const Sizes& z, const Tensor& memory, const Tensor& write_weights, const Tensor& erase, const Tensor& values,
          const std::optional<Tensor>& retention, Tensor& new_memory) {
  dispatch(memory, [&]<class T>() {
    for_each_sample(z.batch, 2 * z.slots * z.word * int64_t(sizeof(T)), [&](int64_t b) {
      const MemoryWrite<T> sample{.slots = z.slots,
                                  .word = z.word,
                                  .write_heads = z.write_heads,
                                  .memory = data<T>(memory) + b * memory.stride(0),
                                  .memory_row = memory.stride(1),
                                  .write_weights = data<T>(write_weights) + b * z.write_heads * z.slots,
                                  .erase = data<T>(erase) + b * z.write_heads * z.word,
                                  .values = data<T>(values) + b * z.write_heads * z.word,
                                  .retention = at<T>(retention, b * z.slots),
                                  .new_memory = mutable_data<T>(new_memory) + b * new_memory.stride(0),
                                  .new_memory_row = new_memory.stride(1)};
      FASTMEM_ON_ISA(memory_write(sample));
    });
  });
}

Tensor memory_write(Tensor memory, Tensor write_weights, Tensor erase, Tensor values, std::optional<Tensor> retention) {
  const Sizes z = check(memory, write_weights, erase, values, retention);
  Tensor new_memory = empty_large(memory, {z.batch, z.slots, z.word});
  step(z, with_dense_rows(memory), dense(write_weights), dense(erase), dense(values), contiguous(retention),
       new_memory);
  return new_memory;
}

void memory_write_(Tensor memory, Tensor write_weights, Tensor erase, Tensor values, std::optional<Tensor> retention) {
  const Sizes z = check(memory, write_weights, erase, values, retention);
  require_writable(memory, "memory");
  require_apart(memory, write_weights, "write_weights");
  require_apart(memory, erase, "erase");
  require_apart(memory, values, "values");
  if (retention) require_apart(memory, *retention, "retention");
  step(z, memory, dense(write_weights), dense(erase), dense(values), contiguous(retention), memory);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> memory_write_backward(Tensor grad_new_memory, Tensor memory,
                                                                         Tensor write_weights, Tensor erase,
                                                                         Tensor values, std::optional<Tensor> retention,
                                                                         std::vector<bool> output_mask) {
  const Sizes z = check(memory, write_weights, erase, values, retention);
  require(grad_new_memory, memory, {z.batch, z.slots, z.word}, "grad_new_memory");
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask: expected 5 entries");
  grad_new_memory = with_dense_rows(grad_new_memory);
  memory = with_dense_rows(memory);
  write_weights = dense(write_weights);
  erase = dense(erase);
  values = dense(values);
  retention = contiguous(retention);
  const bool wants_retention = output_mask[4] && retention;
  const Tensor grad_memory = output_mask[0] ? empty_large(memory, {z.batch, z.slots, z.word}) : nothing(memory);
  const Tensor grad_write_weights = wanted(output_mask[1], memory, {z.batch, z.write_heads, z.slots});
  const Tensor grad_erase = wanted(output_mask[2], memory, {z.batch, z.write_heads, z.word});
  const Tensor grad_values = wanted(output_mask[3], memory, {z.batch, z.write_heads, z.word});
  const Tensor grad_retention = wanted(wants_retention, memory, {z.batch, z.slots});
  dispatch(memory, [&]<class T>() {
    const int64_t workers = shares(z.batch, 3 * z.slots * z.word * int64_t(sizeof(T)));
    const int64_t size = memory_write_scratch(z.word, z.write_heads);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const int64_t weights = b * z.write_heads * z.slots, words = b * z.write_heads * z.word;
      const MemoryWriteBackward<T> sample{.slots = z.slots,
                                          .word = z.word,
                                          .write_heads = z.write_heads,
                                          .memory = data<T>(memory) + b * memory.stride(0),
                                          .memory_row = memory.stride(1),
                                          .write_weights = data<T>(write_weights) + weights,
                                          .erase = data<T>(erase) + words,
                                          .values = data<T>(values) + words,
                                          .retention = at<T>(retention, b * z.slots),
                                          .grad_new_memory = data<T>(grad_new_memory) + b * grad_new_memory.stride(0),
                                          .grad_new_memory_row = grad_new_memory.stride(1),
                                          .grad_memory = at<T>(output_mask[0], grad_memory, b * z.slots * z.word),
                                          .grad_memory_row = z.word,
                                          .grad_write_weights = at<T>(output_mask[1], grad_write_weights, weights),
                                          .grad_erase = at<T>(output_mask[2], grad_erase, words),
                                          .grad_values = at<T>(output_mask[3], grad_values, words),
                                          .grad_retention = at<T>(wants_retention, grad_retention, b * z.slots),
                                          .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(memory_write_backward(sample));
    });
  });
  return {grad_memory, grad_write_weights, grad_erase, grad_values, grad_retention};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("memory_write(Tensor memory, Tensor write_weights, Tensor erase, Tensor values, Tensor? retention) -> Tensor");
  m.def("memory_write_(Tensor(a!) memory, Tensor write_weights, Tensor erase, Tensor values, Tensor? retention) -> ()");
  m.def("memory_write_backward(Tensor grad_memory, Tensor memory, Tensor write_weights, Tensor erase, Tensor values, "
        "Tensor? retention, bool[5] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("memory_write", TORCH_BOX(&memory_write));
  m.impl("memory_write_", TORCH_BOX(&memory_write_));
  m.impl("memory_write_backward", TORCH_BOX(&memory_write_backward));
}

} // namespace fastmem
