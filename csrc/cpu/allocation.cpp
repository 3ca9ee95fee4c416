#include "allocation_kernel.h"

#include "parallel.h"
#include "tensor.h"
#include "workspace.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, slots, write_heads;
};

Sizes check(const Tensor& usage, const std::optional<Tensor>& gates) {
  STD_TORCH_CHECK(usage.dim() == 2 && (!gates || gates->dim() == 2), "wrong number of dimensions");
  const Sizes z{usage.size(0), usage.size(1), gates ? gates->size(1) : 1};
  require(usage, usage, {z.batch, z.slots}, "usage");
  require(gates, usage, {z.batch, z.write_heads}, "gates");
  return z;
}

Tensor allocation(Tensor usage, std::optional<Tensor> gates, double eps) {
  const Sizes z = check(usage, gates);
  usage = dense(usage);
  gates = contiguous(gates);
  const Tensor weights = empty(usage, {z.batch, z.write_heads, z.slots});
  dispatch(usage, [&]<class T>() {
    const int64_t workers = shares(z.batch, 8 * z.write_heads * z.slots * int64_t(sizeof(T)));
    const int64_t size = allocation_scratch(z.slots);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const Allocation<T> sample{.slots = z.slots,
                                 .write_heads = z.write_heads,
                                 .usage = data<T>(usage) + b * z.slots,
                                 .gates = at<T>(gates, b * z.write_heads),
                                 .eps = eps,
                                 .weights = mutable_data<T>(weights) + b * z.write_heads * z.slots,
                                 .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(allocation(sample));
    });
  });
  return weights;
}

std::tuple<Tensor, Tensor> allocation_backward(Tensor grad_weights, Tensor weights, Tensor usage,
                                               std::optional<Tensor> gates, double eps, std::vector<bool> output_mask) {
  const Sizes z = check(usage, gates);
  require(grad_weights, usage, {z.batch, z.write_heads, z.slots}, "grad_weights");
  require(weights, usage, {z.batch, z.write_heads, z.slots}, "weights");
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask: expected 2 entries");
  usage = dense(usage);
  gates = contiguous(gates);
  grad_weights = dense(grad_weights);
  weights = dense(weights);
  const bool wants_gates = output_mask[1] && gates;
  const Tensor grad_usage = empty(usage, {z.batch, z.slots});
  const Tensor grad_gates = wanted(wants_gates, usage, {z.batch, z.write_heads});
  dispatch(usage, [&]<class T>() {
    const int64_t workers = shares(z.batch, 16 * z.write_heads * z.slots * int64_t(sizeof(T)));
    const int64_t size = allocation_backward_scratch(z.slots, z.write_heads);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const int64_t row = b * z.write_heads * z.slots;
      const AllocationBackward<T> sample{.slots = z.slots,
                                         .write_heads = z.write_heads,
                                         .usage = data<T>(usage) + b * z.slots,
                                         .gates = at<T>(gates, b * z.write_heads),
                                         .weights = data<T>(weights) + row,
                                         .grad_weights = data<T>(grad_weights) + row,
                                         .eps = eps,
                                         .grad_usage = mutable_data<T>(grad_usage) + b * z.slots,
                                         .grad_gates = at<T>(wants_gates, grad_gates, b * z.write_heads),
                                         .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(allocation_backward(sample));
    });
  });
  return {output_mask[0] ? grad_usage : nothing(usage), grad_gates};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("allocation(Tensor usage, Tensor? gates, float eps) -> Tensor");
  m.def("allocation_backward(Tensor grad_weights, Tensor weights, Tensor usage, Tensor? gates, float eps, "
        "bool[2] output_mask) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("allocation", TORCH_BOX(&allocation));
  m.impl("allocation_backward", TORCH_BOX(&allocation_backward));
}

} // namespace fastmem
