#include "usage_update_kernel.h"

#include "parallel.h"
#include "tensor.h"
#include "workspace.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, slots, write_heads, read_heads;
};

Sizes check(const Tensor& usage, const Tensor& write_weights, const Tensor& read_weights, const Tensor& free_gates) {
  STD_TORCH_CHECK(usage.dim() == 2 && write_weights.dim() == 3 && read_weights.dim() == 3,
                  "wrong number of dimensions");
  const Sizes z{usage.size(0), usage.size(1), write_weights.size(1), read_weights.size(1)};
  require(usage, usage, {z.batch, z.slots}, "usage");
  require(write_weights, usage, {z.batch, z.write_heads, z.slots}, "write_weights");
  require(read_weights, usage, {z.batch, z.read_heads, z.slots}, "read_weights");
  require(free_gates, usage, {z.batch, z.read_heads}, "free_gates");
  return z;
}

std::tuple<Tensor, Tensor> usage_update(Tensor usage, Tensor write_weights, Tensor read_weights, Tensor free_gates) {
  const Sizes z = check(usage, write_weights, read_weights, free_gates);
  usage = dense(usage);
  write_weights = dense(write_weights);
  read_weights = dense(read_weights);
  free_gates = dense(free_gates);
  const Tensor new_usage = empty(usage, {z.batch, z.slots}), retention = empty(usage, {z.batch, z.slots});
  dispatch(usage, [&]<class T>() {
    for_each_sample(z.batch, (3 + z.write_heads + z.read_heads) * z.slots * int64_t(sizeof(T)), [&](int64_t b) {
      const UsageUpdate<T> sample{.slots = z.slots,
                                  .write_heads = z.write_heads,
                                  .read_heads = z.read_heads,
                                  .usage = data<T>(usage) + b * z.slots,
                                  .write_weights = data<T>(write_weights) + b * z.write_heads * z.slots,
                                  .read_weights = data<T>(read_weights) + b * z.read_heads * z.slots,
                                  .free_gates = data<T>(free_gates) + b * z.read_heads,
                                  .new_usage = mutable_data<T>(new_usage) + b * z.slots,
                                  .retention = mutable_data<T>(retention) + b * z.slots};
      FASTMEM_ON_ISA(usage_update(sample));
    });
  });
  return {new_usage, retention};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> usage_update_backward(std::optional<Tensor> grad_usage,
                                                                 std::optional<Tensor> grad_retention, Tensor usage,
                                                                 Tensor write_weights, Tensor read_weights,
                                                                 Tensor free_gates, std::vector<bool> output_mask) {
  const Sizes z = check(usage, write_weights, read_weights, free_gates);
  require(grad_usage, usage, {z.batch, z.slots}, "grad_usage");
  require(grad_retention, usage, {z.batch, z.slots}, "grad_retention");
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected 4 entries");
  usage = dense(usage);
  write_weights = dense(write_weights);
  read_weights = dense(read_weights);
  free_gates = dense(free_gates);
  grad_usage = contiguous(grad_usage);
  grad_retention = contiguous(grad_retention);
  const Tensor out_usage = wanted(output_mask[0], usage, {z.batch, z.slots});
  const Tensor out_write_weights = wanted(output_mask[1], usage, {z.batch, z.write_heads, z.slots});
  const Tensor out_read_weights = wanted(output_mask[2], usage, {z.batch, z.read_heads, z.slots});
  const Tensor out_free_gates = wanted(output_mask[3], usage, {z.batch, z.read_heads});
  dispatch(usage, [&]<class T>() {
    const int64_t workers = shares(z.batch, (4 + 2 * (z.write_heads + z.read_heads)) * z.slots * int64_t(sizeof(T)));
    const int64_t size = usage_update_scratch(z.write_heads, z.read_heads);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const int64_t row = b * z.slots, writes = row * z.write_heads, reads = row * z.read_heads;
      const UsageUpdateBackward<T> sample{.slots = z.slots,
                                          .write_heads = z.write_heads,
                                          .read_heads = z.read_heads,
                                          .usage = data<T>(usage) + row,
                                          .write_weights = data<T>(write_weights) + writes,
                                          .read_weights = data<T>(read_weights) + reads,
                                          .free_gates = data<T>(free_gates) + b * z.read_heads,
                                          .grad_new_usage = at<T>(grad_usage, row),
                                          .grad_retention = at<T>(grad_retention, row),
                                          .grad_usage = at<T>(output_mask[0], out_usage, row),
                                          .grad_write_weights = at<T>(output_mask[1], out_write_weights, writes),
                                          .grad_read_weights = at<T>(output_mask[2], out_read_weights, reads),
                                          .grad_gates = at<T>(output_mask[3], out_free_gates, b * z.read_heads),
                                          .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(usage_update_backward(sample));
    });
  });
  return {out_usage, out_write_weights, out_read_weights, out_free_gates};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("usage_update(Tensor usage, Tensor write_weights, Tensor read_weights, Tensor free_gates) -> (Tensor, Tensor)");
  m.def("usage_update_backward(Tensor? grad_usage, Tensor? grad_retention, Tensor usage, Tensor write_weights, "
        "Tensor read_weights, Tensor free_gates, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("usage_update", TORCH_BOX(&usage_update));
  m.impl("usage_update_backward", TORCH_BOX(&usage_update_backward));
}

} // namespace fastmem
