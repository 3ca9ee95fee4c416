#include "temporal_linkage_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, write_heads, slots, read_heads;
};

Sizes check(const Tensor& link, const Tensor& precedence, const Tensor& write_weights, const Tensor& read_weights) {
  const Sizes z{link.size(0), link.size(1), link.size(2), read_weights.size(1)};
  require(link, link, {z.batch, z.write_heads, z.slots, z.slots}, "link");
  require(precedence, link, {z.batch, z.write_heads, z.slots}, "precedence");
  require(write_weights, link, {z.batch, z.write_heads, z.slots}, "write_weights");
  require(read_weights, link, {z.batch, z.read_heads, z.slots}, "read_weights");
  return z;
}

// `link` and `new_link` may be the same tensor, and so `precedence` and `new_precedence`.
std::tuple<Tensor, Tensor> step(const Sizes& z, const Tensor& link, const Tensor& precedence,
                                const Tensor& write_weights, const Tensor& read_weights, Tensor& new_link,
                                Tensor& new_precedence) {
  const auto [batch, write_heads, n, read_heads] = z;
  const Tensor forward = empty(link, {batch, write_heads, read_heads, n});
  const Tensor backward = empty(link, {batch, write_heads, read_heads, n});
  const int64_t scratch_size = linkage_scratch(n, read_heads);
  const Tensor scratch = empty(link, {batch, write_heads, scratch_size});
  const int64_t heads = write_heads, readers = read_heads, reads = read_heads * n, size = n;
  dispatch(link, [&]<class T>() {
    const T* w = data<T>(write_weights);
    const T* r = data<T>(read_weights);
    for_each_sample(batch * heads, 2 * size * size * int64_t(sizeof(T)), [&](int64_t k) {
      const int64_t b = k / heads, q = k % heads;
      const Linkage<T> sample{.slots = size,
                              .read_heads = readers,
                              .link = data<T>(link) + b * link.stride(0) + q * link.stride(1),
                              .precedence = data<T>(precedence) + b * precedence.stride(0) + q * precedence.stride(1),
                              .write_weights = w + k * size,
                              .read_weights = r + b * reads,
                              .link_row = link.stride(2),
                              .new_link = mutable_data<T>(new_link) + b * new_link.stride(0) + q * new_link.stride(1),
                              .new_precedence = mutable_data<T>(new_precedence) + b * new_precedence.stride(0) +
                                                q * new_precedence.stride(1),
                              .new_link_row = new_link.stride(2),
                              .forward = mutable_data<T>(forward) + k * reads,
                              .backward = mutable_data<T>(backward) + k * reads,
                              .panels = mutable_data<T>(scratch) + k * scratch_size};
      FASTMEM_ON_ISA(temporal_linkage(sample));
    });
  });
  return {forward, backward};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> temporal_linkage(Tensor link, Tensor precedence, Tensor write_weights,
                                                            Tensor read_weights) {
  const Sizes z = check(link, precedence, write_weights, read_weights);
  Tensor new_link = empty_large(link, {z.batch, z.write_heads, z.slots, z.slots});
  Tensor new_precedence = empty(link, {z.batch, z.write_heads, z.slots});
  const auto [forward, backward] = step(z, with_dense_rows(link), dense(precedence), dense(write_weights),
                                        dense(read_weights), new_link, new_precedence);
  return {new_link, new_precedence, forward, backward};
}

std::tuple<Tensor, Tensor> temporal_linkage_(Tensor link, Tensor precedence, Tensor write_weights,
                                             Tensor read_weights) {
  const Sizes z = check(link, precedence, write_weights, read_weights);
  require_writable(link, "link");
  require_writable(precedence, "precedence");
  require_apart(link, precedence, "precedence");
  for (const Tensor& written : {link, precedence}) {
    require_apart(written, write_weights, "write_weights");
    require_apart(written, read_weights, "read_weights");
  }
  return step(z, link, precedence, dense(write_weights), dense(read_weights), link, precedence);
}

std::tuple<Tensor, Tensor, Tensor, Tensor>
temporal_linkage_backward(std::optional<Tensor> grad_link, std::optional<Tensor> grad_precedence,
                          std::optional<Tensor> grad_forward, std::optional<Tensor> grad_backward, Tensor link,
                          Tensor precedence, Tensor write_weights, Tensor read_weights, std::vector<bool> output_mask) {
  const Sizes z = check(link, precedence, write_weights, read_weights);
  const auto [batch, write_heads, slots, read_heads] = z;
  require(grad_link, link, {batch, write_heads, slots, slots}, "grad_link");
  require(grad_precedence, link, {batch, write_heads, slots}, "grad_precedence");
  require(grad_forward, link, {batch, write_heads, read_heads, slots}, "grad_forward");
  require(grad_backward, link, {batch, write_heads, read_heads, slots}, "grad_backward");
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected 4 entries");

  link = with_dense_rows(link);
  precedence = dense(precedence);
  write_weights = dense(write_weights);
  read_weights = dense(read_weights);
  if (grad_link) grad_link = with_dense_rows(*grad_link);
  grad_precedence = contiguous(grad_precedence);
  grad_forward = contiguous(grad_forward);
  grad_backward = contiguous(grad_backward);

  const bool wants_link = output_mask[0];
  const Tensor out_link = wants_link ? empty_large(link, {batch, write_heads, slots, slots}) : nothing(link);
  const Tensor out_precedence = empty(link, {batch, write_heads, slots});
  const Tensor out_write_weights = empty(link, {batch, write_heads, slots});
  const Tensor out_read_weights = zeros(link, {batch, read_heads, slots});
  const Tensor no_gradient = zeros(link, {read_heads + 1, slots});
  const int64_t row_size = in_lines((kBackwardRows + 1) * slots);
  const int64_t scratch_size = row_size + linkage_backward_scratch(slots, read_heads, 0);
  const Tensor scratch = empty(link, {batch, scratch_size});
  const int64_t heads = write_heads, n = slots, readers = read_heads;

  dispatch(link, [&]<class T>() {
    for_each_sample(batch, 3 * heads * n * n * int64_t(sizeof(T)), [&](int64_t b) {
      const T* zero = data<T>(no_gradient);
      T* rows = mutable_data<T>(scratch) + b * scratch_size;
      for (int64_t q = 0; q < heads; ++q) {
        const int64_t k = b * heads + q;
        const LinkageBackward<T> sample{
            .slots = n,
            .read_heads = readers,
            .link = data<T>(link) + b * link.stride(0) + q * link.stride(1),
            .precedence = data<T>(precedence) + k * n,
            .write_weights = data<T>(write_weights) + k * n,
            .read_weights = data<T>(read_weights) + b * readers * n,
            .link_row = link.stride(2),
            .grad_new_link =
                grad_link ? data<T>(grad_link) + b * grad_link->stride(0) + q * grad_link->stride(1) : zero,
            .grad_new_precedence = grad_precedence ? data<T>(grad_precedence) + k * n : zero,
            .grad_forward = grad_forward ? data<T>(grad_forward) + k * readers * n : zero,
            .grad_backward = grad_backward ? data<T>(grad_backward) + k * readers * n : zero,
            .grad_new_link_row = grad_link ? grad_link->stride(2) : 0,
            .grad_read_row = n,
            .grad_link = wants_link ? mutable_data<T>(out_link) + k * n * n : rows + kBackwardRows * n,
            .grad_link_row = wants_link ? n : 0,
            .grad_precedence = mutable_data<T>(out_precedence) + k * n,
            .grad_write_weights = mutable_data<T>(out_write_weights) + k * n,
            .grad_read_weights = mutable_data<T>(out_read_weights) + b * readers * n,
            .partial = rows,
            .panels = rows + row_size};
        FASTMEM_ON_ISA(temporal_linkage_backward(sample));
      }
    });
  });
  return {out_link, output_mask[1] ? out_precedence : nothing(link), output_mask[2] ? out_write_weights : nothing(link),
          output_mask[3] ? out_read_weights : nothing(link)};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("temporal_linkage(Tensor link, Tensor precedence, Tensor write_weights, Tensor read_weights) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("temporal_linkage_(Tensor(a!) link, Tensor(b!) precedence, Tensor write_weights, Tensor read_weights) "
        "-> (Tensor, Tensor)");
  m.def("temporal_linkage_backward(Tensor? grad_link, Tensor? grad_precedence, Tensor? grad_forward, "
        "Tensor? grad_backward, Tensor link, Tensor precedence, Tensor write_weights, Tensor read_weights, "
        "bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("temporal_linkage", TORCH_BOX(&temporal_linkage));
  m.impl("temporal_linkage_", TORCH_BOX(&temporal_linkage_));
  m.impl("temporal_linkage_backward", TORCH_BOX(&temporal_linkage_backward));
}

} // namespace fastmem
