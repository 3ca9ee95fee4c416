#include "cached_attention_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, length, width, hidden;
};

// The arguments in the layout that the kernel walks. Keys and cache may be slices of a history of any layout.
struct Arguments {
  Tensor query, keys, cache, score_weights;
  std::optional<Tensor> mask;

  template <class T> Attention<T> sample(const Sizes& z, int64_t b) const {
    return {.length = z.length,
            .width = z.width,
            .hidden = z.hidden,
            .query = data<T>(query) + b * query.stride(0),
            .score_weights = data<T>(score_weights),
            .keys = data<T>(keys) + b * keys.stride(0),
            .keys_row = keys.stride(1),
            .cache = data<T>(cache) + b * cache.stride(0),
            .cache_row = cache.stride(1),
            .mask = at<bool>(mask, b * z.length)};
  }
};

Sizes check(const Tensor& query, const Tensor& keys, const Tensor& cache, const Tensor& score_weights,
            const std::optional<Tensor>& mask) {
  STD_TORCH_CHECK(keys.dim() == 3 && cache.dim() == 3, "keys and cache: expected 3 dimensions");
  const Sizes z{keys.size(0), keys.size(1), keys.size(2), cache.size(2)};
  require(query, query, {z.batch, z.width}, "query");
  require(keys, query, {z.batch, z.length, z.width}, "keys");
  require(cache, query, {z.batch, z.length, z.hidden}, "cache");
  require(score_weights, query, {z.width}, "score_weights");
  require_mask(mask, {z.batch, z.length}, "mask");
  return z;
}

Arguments arrange(const Tensor& query, const Tensor& keys, const Tensor& cache, const Tensor& score_weights,
                  const std::optional<Tensor>& mask) {
  return {with_dense_rows(query), with_dense_rows(keys), with_dense_rows(cache), dense(score_weights),
          contiguous(mask)};
}

// What the sharing of work counts in bytes to copy: a tanh takes the time of about four numbers.
template <class T> int64_t sample_bytes(const Sizes& z) {
  return z.length * (4 * z.width + z.hidden) * int64_t(sizeof(T));
}

std::tuple<Tensor, Tensor> cached_attention(Tensor query, Tensor keys, Tensor cache, Tensor score_weights,
                                            std::optional<Tensor> mask) {
  const Sizes z = check(query, keys, cache, score_weights, mask);
  const Arguments arguments = arrange(query, keys, cache, score_weights, mask);
  const Tensor attended = empty(query, {z.batch, z.hidden}), weights = empty(query, {z.batch, z.length});
  dispatch(query, [&]<class T>() {
    const int64_t workers = shares(z.batch, sample_bytes<T>(z));
    const Workspace<T> scratch(workers * z.hidden);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const CachedAttention<T> sample{.attention = arguments.sample<T>(z, b),
                                      .weights = mutable_data<T>(weights) + b * z.length,
                                      .attended = mutable_data<T>(attended) + b * z.hidden,
                                      .scratch = scratch.data() + worker * z.hidden};
      FASTMEM_ON_ISA(cached_attention(sample));
    });
  });
  return {attended, weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cached_attention_backward(std::optional<Tensor> grad_attended,
                                                                     std::optional<Tensor> grad_weights, Tensor weights,
                                                                     Tensor query, Tensor keys, Tensor cache,
                                                                     Tensor score_weights, std::optional<Tensor> mask,
                                                                     std::vector<bool> output_mask) {
  const Sizes z = check(query, keys, cache, score_weights, mask);
  require(grad_attended, query, {z.batch, z.hidden}, "grad_attended");
  require(grad_weights, query, {z.batch, z.length}, "grad_weights");
  require(weights, query, {z.batch, z.length}, "weights");
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected 4 entries");
  const Arguments arguments = arrange(query, keys, cache, score_weights, mask);
  grad_attended = contiguous(grad_attended);
  grad_weights = contiguous(grad_weights);
  weights = dense(weights);

  const auto large = [&](bool wants, int64_t row) {
    return wants ? empty_large(query, {z.batch, z.length, row}) : nothing(query);
  };
  const Tensor grad_query = wanted(output_mask[0], query, {z.batch, z.width});
  const Tensor grad_keys = large(output_mask[1], z.width), grad_cache = large(output_mask[2], z.hidden);
  const Tensor grad_score_weights = wanted(output_mask[3], query, {z.width});
  dispatch(query, [&]<class T>() {
    const int64_t workers = shares(z.batch, 2 * sample_bytes<T>(z));
    const Workspace<T> scratch(workers * z.length), part(output_mask[3] ? z.batch * z.width : 0);
    for_each_sample_in_shares(z.batch, workers, [&](int64_t b, int64_t worker) {
      const CachedAttentionBackward<T> sample{.attention = arguments.sample<T>(z, b),
                                              .weights = data<T>(weights) + b * z.length,
                                              .grad_attended = at<T>(grad_attended, b * z.hidden),
                                              .grad_weights = at<T>(grad_weights, b * z.length),
                                              .grad_query = at<T>(output_mask[0], grad_query, b * z.width),
                                              .grad_keys = at<T>(output_mask[1], grad_keys, b * z.length * z.width),
                                              .grad_cache = at<T>(output_mask[2], grad_cache, b * z.length * z.hidden),
                                              .grad_score_weights =
                                                  output_mask[3] ? part.data() + b * z.width : nullptr,
                                              .scratch = scratch.data() + worker * z.length};
      FASTMEM_ON_ISA(cached_attention_backward(sample));
    });
    if (output_mask[3]) fold<T>(part.data(), z.batch, z.width, z.width, mutable_data<T>(grad_score_weights));
  });
  return {grad_query, grad_keys, grad_cache, grad_score_weights};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("cached_attention(Tensor query, Tensor keys, Tensor cache, Tensor score_weights, Tensor? mask) "
        "-> (Tensor, Tensor)");
  m.def("cached_attention_backward(Tensor? grad_attended, Tensor? grad_weights, Tensor weights, Tensor query, "
        "Tensor keys, Tensor cache, Tensor score_weights, Tensor? mask, bool[4] output_mask) "
        "-> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("cached_attention", TORCH_BOX(&cached_attention));
  m.impl("cached_attention_backward", TORCH_BOX(&cached_attention_backward));
}

} // namespace fastmem
