#include "program_lookup_kernel.h"

#include "program_mix.h"

#include <string>
#include <tuple>

namespace fastmem {
namespace {

// The mix with its program weights yet to be found, and what finds them, in the layout that the kernels walk.
struct Lookup {
  Mix mix;
  Tensor query, strength, keys;

  int64_t key() const { return keys.size(1); }
  int64_t searches() const { return blocks(mix.batch, kSearchBlock); }
  int64_t scratch_size() const { return addressing_scratch(std::min(kSearchBlock, mix.batch), key()); }

  template <class T>
  ProgramSearch<T> search(int64_t first, int64_t samples, const Similarity<T>& similarity, T* scratch) const {
    return {.samples = samples,
            .programs = mix.programs,
            .key = key(),
            .query = data<T>(query) + first * key(),
            .strength = data<T>(strength) + first,
            .keys = data<T>(keys),
            .keys_row = keys.stride(0),
            .similarity = similarity,
            .scratch = scratch};
  }

  // body(search, first sample, block) for blocks of samples that look up their programs together.
  template <class T, class Body> void for_each_search(const Similarity<T>& similarity, const Body& body) const {
    const int64_t size = scratch_size();
    const Workspace<T> scratch(searches() * size);
    for_each_sample(searches(), 16384, [&](int64_t block) {
      const int64_t first = block * kSearchBlock, samples = std::min(kSearchBlock, mix.batch - first);
      body(search<T>(first, samples, similarity, scratch.data() + block * size), first, block);
    });
  }
};

Lookup lookup_of(const Tensor& inputs, const Tensor& query, const Tensor& strength, const Tensor& keys,
                 const std::optional<Tensor>& program_weights, const Tensor& weights,
                 const std::optional<Tensor>& biases) {
  const Mix mix = mix_of(inputs, program_weights, weights, biases);
  STD_TORCH_CHECK(keys.dim() == 2, "keys: expected 2 dimensions");
  require(query, inputs, {mix.batch, keys.size(1)}, "query");
  require(strength, inputs, {mix.batch}, "strength");
  require(keys, inputs, {mix.programs, keys.size(1)}, "keys");
  return {mix, dense(query), dense(strength), with_dense_rows(keys)};
}

std::tuple<Tensor, Tensor> program_lookup(Tensor inputs, Tensor query, Tensor strength, Tensor keys, Tensor weights,
                                          std::optional<Tensor> biases, Text norm_text, double eps) {
  const std::string norm = take(norm_text);
  const Lookup lookup = lookup_of(inputs, query, strength, keys, std::nullopt, weights, biases);
  const Mix& m = lookup.mix;
  Tensor outputs;
  dispatch(inputs, [&]<class T>() {
    T* const found = mutable_data<T>(m.program_weights);
    lookup.for_each_search<T>(similarity<T>(norm, eps), [&](const ProgramSearch<T>& search, int64_t first, int64_t) {
      FASTMEM_ON_ISA(program_search(search, found + first * m.programs));
    });
    outputs = mix<T>(m);
  });
  return {outputs, m.program_weights};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
program_lookup_backward(std::optional<Tensor> grad_outputs, std::optional<Tensor> grad_program_weights,
                        Tensor program_weights, Tensor inputs, Tensor query, Tensor strength, Tensor keys,
                        Tensor weights, std::optional<Tensor> biases, Text norm_text, double eps,
                        std::vector<bool> output_mask) {
  const std::string norm = take(norm_text);
  const Lookup lookup = lookup_of(inputs, query, strength, keys, program_weights, weights, biases);
  const Mix& m = lookup.mix;
  require(grad_outputs, inputs, {m.batch, m.outputs}, "grad_outputs");
  require(grad_program_weights, inputs, {m.batch, m.programs}, "grad_program_weights");
  STD_TORCH_CHECK(output_mask.size() == 6, "output_mask: expected 6 entries");
  grad_program_weights = contiguous(grad_program_weights);

  const bool wants_query = output_mask[1], wants_strength = output_mask[2], wants_keys = output_mask[3];
  const bool addresses = wants_query || wants_strength || wants_keys;
  const Tensor grad_query = wanted(wants_query, inputs, {m.batch, lookup.key()});
  const Tensor grad_strength = wanted(wants_strength, inputs, {m.batch});
  const Tensor grad_keys = wanted(wants_keys, inputs, {m.programs, lookup.key()});
  MixGradients gradients;
  dispatch(inputs, [&]<class T>() {
    const ProgramWeightParts<T> into = mix_backward<T>(
        m, grad_outputs,
        {.inputs = output_mask[0], .program_weights = addresses, .weights = output_mask[4], .biases = output_mask[5]},
        gradients);
    if (!addresses) return;
    const int64_t elements = m.programs * lookup.key();
    const Workspace<T> totals(m.batch * m.programs), key_parts(lookup.searches() * elements);
    const auto backward = [&](const ProgramSearch<T>& search, int64_t first, int64_t block) {
      const int64_t start = first * m.programs, count = search.samples * m.programs;
      T* const total = totals.data() + start;
      into.add_up(start, count, total);
      if (grad_program_weights)
        for (int64_t k = 0; k < count; ++k) total[k] += data<T>(*grad_program_weights)[start + k];
      const ProgramSearchBackward<T> pull{.search = search,
                                          .program_weights = data<T>(m.program_weights) + start,
                                          .grad_program_weights = total,
                                          .grad_query = at<T>(wants_query, grad_query, first * lookup.key()),
                                          .grad_strength = at<T>(wants_strength, grad_strength, first),
                                          .grad_keys = wants_keys ? key_parts.data() + block * elements : nullptr};
      FASTMEM_ON_ISA(program_search_backward(pull));
    };
    lookup.for_each_search<T>(similarity<T>(norm, eps), backward);
    if (wants_keys) fold<T>(key_parts.data(), lookup.searches(), elements, elements, mutable_data<T>(grad_keys));
  });
  return {gradients.inputs, grad_query, grad_strength, grad_keys, gradients.weights, gradients.biases};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("program_lookup(Tensor inputs, Tensor query, Tensor strength, Tensor keys, Tensor weights, Tensor? biases, "
        "str norm, float eps) -> (Tensor, Tensor)");
  m.def("program_lookup_backward(Tensor? grad_outputs, Tensor? grad_program_weights, Tensor program_weights, "
        "Tensor inputs, Tensor query, Tensor strength, Tensor keys, Tensor weights, Tensor? biases, str norm, "
        "float eps, bool[6] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("program_lookup", TORCH_BOX(&program_lookup));
  m.impl("program_lookup_backward", TORCH_BOX(&program_lookup_backward));
}

} // namespace fastmem
