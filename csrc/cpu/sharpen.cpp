#include "sharpen_kernel.h"

#include "parallel.h"
#include "tensor.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, heads, slots;
};

Sizes check(const Tensor& weights, const Tensor& sharpness) {
  STD_TORCH_CHECK(weights.dim() == 3, "wrong number of dimensions");
  const Sizes z{weights.size(0), weights.size(1), weights.size(2)};
  require(weights, weights, {z.batch, z.heads, z.slots}, "weights");
  require(sharpness, weights, {z.batch, z.heads}, "sharpness");
  return z;
}

Tensor sharpen(Tensor weights, Tensor sharpness, bool in_powers, double eps) {
  const Sizes z = check(weights, sharpness);
  weights = dense(weights);
  sharpness = dense(sharpness);
  const Tensor new_weights = empty(weights, {z.batch, z.heads, z.slots});
  dispatch(weights, [&]<class T>() {
    for_each_sample(z.batch * z.heads, 2 * z.slots * int64_t(sizeof(T)), [&](int64_t k) {
      const Sharpen<T> head{.slots = z.slots,
                            .weights = data<T>(weights) + k * z.slots,
                            .sharpness = data<T>(sharpness)[k],
                            .form = {in_powers, T(eps)},
                            .new_weights = mutable_data<T>(new_weights) + k * z.slots};
      FASTMEM_ON_ISA(sharpen(head));
    });
  });
  return new_weights;
}

std::tuple<Tensor, Tensor> sharpen_backward(Tensor grad_new_weights, Tensor new_weights, Tensor weights,
                                            Tensor sharpness, bool in_powers, double eps,
                                            std::vector<bool> output_mask) {
  const Sizes z = check(weights, sharpness);
  require(grad_new_weights, weights, {z.batch, z.heads, z.slots}, "grad_new_weights");
  require(new_weights, weights, {z.batch, z.heads, z.slots}, "new_weights");
  STD_TORCH_CHECK(output_mask.size() == 2, "output_mask: expected 2 entries");
  weights = dense(weights);
  sharpness = dense(sharpness);
  new_weights = dense(new_weights);
  grad_new_weights = dense(grad_new_weights);
  const Tensor grad_weights = wanted(output_mask[0], weights, {z.batch, z.heads, z.slots});
  const Tensor grad_sharpness = wanted(output_mask[1], weights, {z.batch, z.heads});
  dispatch(weights, [&]<class T>() {
    for_each_sample(z.batch * z.heads, 4 * z.slots * int64_t(sizeof(T)), [&](int64_t k) {
      const SharpenBackward<T> head{.slots = z.slots,
                                    .weights = data<T>(weights) + k * z.slots,
                                    .sharpness = data<T>(sharpness)[k],
                                    .form = {in_powers, T(eps)},
                                    .new_weights = data<T>(new_weights) + k * z.slots,
                                    .grad_new_weights = data<T>(grad_new_weights) + k * z.slots,
                                    .grad_weights = at<T>(output_mask[0], grad_weights, k * z.slots),
                                    .grad_sharpness = at<T>(output_mask[1], grad_sharpness, k)};
      FASTMEM_ON_ISA(sharpen_backward(head));
    });
  });
  return {grad_weights, grad_sharpness};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("sharpen(Tensor weights, Tensor sharpness, bool in_powers, float eps) -> Tensor");
  m.def("sharpen_backward(Tensor grad_new_weights, Tensor new_weights, Tensor weights, Tensor sharpness, "
        "bool in_powers, float eps, bool[2] output_mask) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("sharpen", TORCH_BOX(&sharpen));
  m.impl("sharpen_backward", TORCH_BOX(&sharpen_backward));
}

} // namespace fastmem
