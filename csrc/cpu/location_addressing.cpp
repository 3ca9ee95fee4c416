#include "location_addressing_kernel.h"

#include "parallel.h"
#include "tensor.h"
#include "workspace.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, heads, slots, reach;
};

Sizes check(const Tensor& content, const Tensor& previous, const Tensor& gate, const Tensor& shift,
            const Tensor& sharpness) {
  STD_TORCH_CHECK(content.dim() == 3 && shift.dim() == 3, "wrong number of dimensions");
  const int64_t taps = shift.size(2);
  STD_TORCH_CHECK(taps % 2 == 1, "shift: expected an odd number of taps");
  const Sizes z{content.size(0), content.size(1), content.size(2), taps / 2};
  require(content, content, {z.batch, z.heads, z.slots}, "content");
  require(previous, content, {z.batch, z.heads, z.slots}, "previous");
  require(gate, content, {z.batch, z.heads}, "gate");
  require(shift, content, {z.batch, z.heads, taps}, "shift");
  require(sharpness, content, {z.batch, z.heads}, "sharpness");
  return z;
}

Tensor location_addressing(Tensor content, Tensor previous, Tensor gate, Tensor shift, Tensor sharpness, bool reversed,
                           bool in_powers, double eps) {
  const Sizes z = check(content, previous, gate, shift, sharpness);
  content = dense(content);
  previous = dense(previous);
  gate = dense(gate);
  shift = dense(shift);
  sharpness = dense(sharpness);
  const Tensor weights = empty(content, {z.batch, z.heads, z.slots});
  dispatch(content, [&]<class T>() {
    const int64_t heads = z.batch * z.heads, workers = shares(heads, 4 * z.slots * int64_t(sizeof(T)));
    const int64_t size = location_scratch(z.slots, z.reach);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(heads, workers, [&](int64_t k, int64_t worker) {
      const LocationAddressing<T> head{.slots = z.slots,
                                       .reach = z.reach,
                                       .content = data<T>(content) + k * z.slots,
                                       .previous = data<T>(previous) + k * z.slots,
                                       .shift = data<T>(shift) + k * (2 * z.reach + 1),
                                       .gate = data<T>(gate)[k],
                                       .sharpness = data<T>(sharpness)[k],
                                       .reversed = reversed,
                                       .form = {in_powers, T(eps)},
                                       .weights = mutable_data<T>(weights) + k * z.slots,
                                       .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(location_addressing(head));
    });
  });
  return weights;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>
location_addressing_backward(Tensor grad_weights, Tensor weights, Tensor content, Tensor previous, Tensor gate,
                             Tensor shift, Tensor sharpness, bool reversed, bool in_powers, double eps,
                             std::vector<bool> output_mask) {
  const Sizes z = check(content, previous, gate, shift, sharpness);
  require(grad_weights, content, {z.batch, z.heads, z.slots}, "grad_weights");
  require(weights, content, {z.batch, z.heads, z.slots}, "weights");
  STD_TORCH_CHECK(output_mask.size() == 5, "output_mask: expected 5 entries");
  grad_weights = dense(grad_weights);
  weights = dense(weights);
  content = dense(content);
  previous = dense(previous);
  gate = dense(gate);
  shift = dense(shift);
  sharpness = dense(sharpness);
  const int64_t taps = 2 * z.reach + 1;
  const Tensor grad_content = wanted(output_mask[0], content, {z.batch, z.heads, z.slots});
  const Tensor grad_previous = wanted(output_mask[1], content, {z.batch, z.heads, z.slots});
  const Tensor grad_gate = wanted(output_mask[2], content, {z.batch, z.heads});
  const Tensor grad_shift = wanted(output_mask[3], content, {z.batch, z.heads, taps});
  const Tensor grad_sharpness = wanted(output_mask[4], content, {z.batch, z.heads});
  dispatch(content, [&]<class T>() {
    const int64_t heads = z.batch * z.heads, workers = shares(heads, 8 * z.slots * int64_t(sizeof(T)));
    const int64_t size = location_scratch(z.slots, z.reach);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(heads, workers, [&](int64_t k, int64_t worker) {
      const LocationAddressingBackward<T> head{.slots = z.slots,
                                               .reach = z.reach,
                                               .content = data<T>(content) + k * z.slots,
                                               .previous = data<T>(previous) + k * z.slots,
                                               .shift = data<T>(shift) + k * taps,
                                               .gate = data<T>(gate)[k],
                                               .sharpness = data<T>(sharpness)[k],
                                               .reversed = reversed,
                                               .form = {in_powers, T(eps)},
                                               .weights = data<T>(weights) + k * z.slots,
                                               .grad_weights = data<T>(grad_weights) + k * z.slots,
                                               .grad_content = at<T>(output_mask[0], grad_content, k * z.slots),
                                               .grad_previous = at<T>(output_mask[1], grad_previous, k * z.slots),
                                               .grad_gate = at<T>(output_mask[2], grad_gate, k),
                                               .grad_shift = at<T>(output_mask[3], grad_shift, k * taps),
                                               .grad_sharpness = at<T>(output_mask[4], grad_sharpness, k),
                                               .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(location_addressing_backward(head));
    });
  });
  return {grad_content, grad_previous, grad_gate, grad_shift, grad_sharpness};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("location_addressing(Tensor content, Tensor previous, Tensor gate, Tensor shift, Tensor sharpness, "
        "bool reversed, bool in_powers, float eps) -> Tensor");
  m.def("location_addressing_backward(Tensor grad_weights, Tensor weights, Tensor content, Tensor previous, "
        "Tensor gate, Tensor shift, Tensor sharpness, bool reversed, bool in_powers, float eps, bool[5] output_mask) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("location_addressing", TORCH_BOX(&location_addressing));
  m.impl("location_addressing_backward", TORCH_BOX(&location_addressing_backward));
}

} // namespace fastmem
