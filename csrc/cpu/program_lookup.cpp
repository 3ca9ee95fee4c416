#include "program_lookup_kernel.h"

#include "content_addressing_kernel.h"
#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

#include <string>
#include <tuple>

namespace fastmem {
namespace {

struct Sizes {
  int64_t batch, inputs, outputs, programs, key;
};

// The arguments in the layout that the kernels walk.
struct Arguments {
  Tensor inputs, query, strength, keys, weights;
  std::optional<Tensor> biases;

  template <class T> Programs<T> stored(const Sizes& z) const {
    return {.programs = z.programs,
            .inputs = z.inputs,
            .outputs = z.outputs,
            .weights = data<T>(weights),
            .weights_program = weights.stride(0),
            .weights_row = weights.stride(1),
            .biases = data<T>(biases)};
  }

  template <class T>
  Expansion<T> expansion(const Sizes& z, const Tensor& program_weights, int64_t first, int64_t samples) const {
    return {.samples = samples,
            .programs = z.programs,
            .inputs = z.inputs,
            .x = data<T>(inputs) + first * inputs.stride(0),
            .program_weights = data<T>(program_weights) + first * z.programs,
            .x_row = inputs.stride(0)};
  }

  // The programs as one matrix [P I,O]; a copy only where their strides forbid it.
  Tensor matrix(const Sizes& z) const { return torch::stable::reshape(weights, {z.programs * z.inputs, z.outputs}); }

  // Samples share the keys, so their queries are the heads of one search.
  template <class T>
  Search<T> search(const Sizes& z, int64_t first, int64_t samples, const Similarity<T>& similarity) const {
    return {.slots = z.programs,
            .heads = samples,
            .word = z.key,
            .memory = data<T>(keys),
            .memory_row = keys.stride(0),
            .keys = data<T>(query) + first * z.key,
            .strengths = data<T>(strength) + first,
            .key_mask = nullptr,
            .slot_mask = nullptr,
            .similarity = similarity};
  }
};

Sizes check(const Tensor& inputs, const Tensor& query, const Tensor& strength, const Tensor& keys,
            const Tensor& weights, const std::optional<Tensor>& biases) {
  STD_TORCH_CHECK(inputs.dim() == 2 && keys.dim() == 2 && weights.dim() == 3,
                  "inputs, keys and weights: expected 2, 2 and 3 dimensions");
  const Sizes z{inputs.size(0), inputs.size(1), weights.size(2), weights.size(0), keys.size(1)};
  require(inputs, inputs, {z.batch, z.inputs}, "inputs");
  require(query, inputs, {z.batch, z.key}, "query");
  require(strength, inputs, {z.batch}, "strength");
  require(keys, inputs, {z.programs, z.key}, "keys");
  require(weights, inputs, {z.programs, z.inputs, z.outputs}, "weights");
  require(biases, inputs, {z.programs, z.outputs}, "biases");
  return z;
}

Arguments arrange(const Tensor& inputs, const Tensor& query, const Tensor& strength, const Tensor& keys,
                  const Tensor& weights, const std::optional<Tensor>& biases) {
  return {with_dense_rows(inputs),  dense(query),      dense(strength), with_dense_rows(keys),
          with_dense_rows(weights), contiguous(biases)};
}

int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// What the sharing of work counts in bytes to copy, for a product: it multiplies about eight times in the time of one.
int64_t bytes_worth(int64_t multiplications) { return multiplications / 8; }

// Whether torch's matrix product, which packs its operands, is faster than ours, which reads them as they lie: for many
// samples with programs beyond the second-level cache, or where our vectors are the narrowest. bench/NOTES.md has the
// measurements.
bool by_torch(const Sizes& z, const Tensor& like) {
  const int64_t element = like.scalar_type() == ScalarType::Double ? 8 : 4;
  if (isa() == Isa::baseline) return z.batch * z.programs * z.inputs * z.outputs > 1 << 23;
  return z.batch >= 256 && z.programs > 0 && z.inputs * z.outputs * element > 1 << 20;
}

inline constexpr int64_t kSearchBlock = 16; // samples whose queries are one search

// body(first, samples, block) for blocks of samples that look up their programs together.
template <class Body> void for_each_search(const Sizes& z, const Body& body) {
  for_each_sample(blocks(z.batch, kSearchBlock), 16384, [&](int64_t block) {
    const int64_t first = block * kSearchBlock;
    body(first, std::min(kSearchBlock, z.batch - first), block);
  });
}

template <class T>
void address(const Sizes& z, const Arguments& a, const Similarity<T>& measure, const Tensor& program_weights) {
  const int64_t size = addressing_scratch(std::min(kSearchBlock, z.batch), z.key);
  const Workspace<T> scratch(blocks(z.batch, kSearchBlock) * size);
  for_each_search(z, [&](int64_t first, int64_t samples, int64_t block) {
    const Addressing<T> addressing{.search = a.search<T>(z, first, samples, measure),
                                   .weights = mutable_data<T>(program_weights) + first * z.programs,
                                   .weights_row = z.programs,
                                   .scratch = scratch.data() + block * size};
    FASTMEM_ON_ISA(content_addressing(addressing));
  });
}

// body(first, samples) for blocks of samples, `bytes` each sample.
template <class Body> void for_each_sample_block(const Sizes& z, int64_t bytes, const Body& body) {
  for_each_sample(blocks(z.batch, kSampleBlock), kSampleBlock * bytes, [&](int64_t block) {
    const int64_t first = block * kSampleBlock;
    body(first, std::min(kSampleBlock, z.batch - first));
  });
}

// z[b,(p,i)] = program_weights[b,p] inputs[b,i]
template <class T> Tensor expand(const Sizes& z, const Arguments& a, const Tensor& program_weights) {
  const int64_t row = z.programs * z.inputs;
  const Tensor expanded = empty(program_weights, {z.batch, row});
  for_each_sample_block(z, row * int64_t(sizeof(T)), [&](int64_t first, int64_t samples) {
    const Expansion<T> expansion = a.expansion<T>(z, program_weights, first, samples);
    FASTMEM_ON_ISA(program_expand(expansion, mutable_data<T>(expanded) + first * row));
  });
  return expanded;
}

template <class T> Tensor mix_by_torch(const Sizes& z, const Arguments& a, const Tensor& program_weights) {
  const Tensor outputs = torch::stable::matmul(expand<T>(z, a, program_weights), a.matrix(z));
  if (a.biases)
    for_each_sample_block(z, z.outputs * int64_t(sizeof(T)), [&](int64_t first, int64_t samples) {
      const Product<T> add{.rows = samples,
                           .columns = z.outputs,
                           .steps = z.programs,
                           .a = data<T>(program_weights) + first * z.programs,
                           .a_row = z.programs,
                           .a_step = 1,
                           .b = data<T>(*a.biases),
                           .b_row = z.outputs,
                           .c = mutable_data<T>(outputs) + first * z.outputs,
                           .c_row = z.outputs,
                           .block = 128,
                           .add = true};
      FASTMEM_ON_ISA(product(add));
    });
  return outputs;
}

template <class T>
void mix_to_inputs_by_torch(const Sizes& z, const Arguments& a, const Tensor& program_weights,
                            const Tensor& grad_outputs, T* grad_inputs, T* grad_program_weights) {
  const int64_t row = z.programs * z.inputs;
  const Tensor grad_z = torch::stable::matmul(grad_outputs, torch::stable::transpose(a.matrix(z), 0, 1));
  for_each_sample_block(z, row * int64_t(sizeof(T)), [&](int64_t first, int64_t samples) {
    const Expansion<T> expansion = a.expansion<T>(z, program_weights, first, samples);
    FASTMEM_ON_ISA(program_expand_backward(expansion, data<T>(grad_z) + first * row,
                                           grad_inputs ? grad_inputs + first * z.inputs : nullptr,
                                           grad_program_weights + first * z.programs));
  });
}

// Threads share the columns, or the samples where that is more even. Either cut leaves every sum as it is.
template <class T> void mix(const Sizes& z, const Arguments& a, const Tensor& program_weights, const Tensor& outputs) {
  constexpr int64_t unit = 64 / int64_t(sizeof(T));
  const int64_t units = blocks(z.outputs, unit);
  const int64_t bytes = bytes_worth(z.batch * z.programs * z.inputs * z.outputs);
  const int64_t shared = std::clamp<int64_t>(bytes / 32768, 1, torch::stable::get_num_threads());
  const bool by_columns = z.batch < 16 * shared || units % shared == 0 || units >= 16 * shared;
  const int64_t parts = std::min(shared, by_columns ? units : z.batch);
  for_each_sample(parts, 32768, [&](int64_t part) {
    int64_t first = 0, end = z.batch, column = 0, column_end = z.outputs;
    if (by_columns) {
      column = units * part / parts * unit;
      column_end = std::min(z.outputs, units * (part + 1) / parts * unit);
    } else {
      first = z.batch * part / parts;
      end = z.batch * (part + 1) / parts;
    }
    const Mixing<T> mixing{.programs = a.stored<T>(z),
                           .samples = end - first,
                           .first = column,
                           .columns = column_end - column,
                           .inputs = data<T>(a.inputs) + first * a.inputs.stride(0),
                           .program_weights = data<T>(program_weights) + first * z.programs,
                           .inputs_row = a.inputs.stride(0),
                           .outputs = mutable_data<T>(outputs) + first * z.outputs};
    FASTMEM_ON_ISA(program_mix(mixing));
  });
}

std::tuple<Tensor, Tensor> program_lookup(Tensor inputs, Tensor query, Tensor strength, Tensor keys, Tensor weights,
                                          std::optional<Tensor> biases, Text norm_text, double eps) {
  const std::string norm = take(norm_text);
  const Sizes z = check(inputs, query, strength, keys, weights, biases);
  const Arguments a = arrange(inputs, query, strength, keys, weights, biases);
  const Tensor program_weights = empty(inputs, {z.batch, z.programs});
  Tensor outputs;
  dispatch(inputs, [&]<class T>() {
    address<T>(z, a, similarity<T>(norm, eps), program_weights);
    if (by_torch(z, inputs)) {
      outputs = mix_by_torch<T>(z, a, program_weights);
      return;
    }
    outputs = empty(inputs, {z.batch, z.outputs});
    if (z.batch && z.outputs) mix<T>(z, a, program_weights, outputs);
  });
  return {outputs, program_weights};
}

// The gradient of the inputs, unless null, and of the program weights, in parts [I blocks,B,P].
template <class T>
void mix_to_inputs(const Sizes& z, const Arguments& a, const Tensor& program_weights, const Tensor& grad_outputs,
                   T* grad_inputs, T* grad_program_weights) {
  const int64_t sample_blocks = blocks(z.batch, kSampleBlock), input_blocks = blocks(z.inputs, kInputBlock);
  const bool few = z.batch <= kFewSamples;
  const int64_t pitch = blocks(std::min(kSampleBlock, z.batch), 16) * 16;
  const Workspace<T> columns(few ? 0 : sample_blocks * z.outputs * pitch);
  const T* const grad = data<T>(grad_outputs);
  if (!few)
    for_each_sample(sample_blocks, kSampleBlock * z.outputs * 2, [&](int64_t block) {
      const int64_t first = block * kSampleBlock;
      FASTMEM_ON_ISA(transpose(grad + first * z.outputs, z.outputs, std::min(kSampleBlock, z.batch - first), z.outputs,
                               columns.data() + first * z.outputs, pitch, pitch));
    });
  const int64_t workers = shares(input_blocks, bytes_worth(kInputBlock * z.batch * z.programs * z.outputs));
  const int64_t size = 3 * kInputBlock * pitch;
  const Workspace<T> scratch(workers * size);
  for_each_sample_in_shares(input_blocks, workers, [&](int64_t block, int64_t worker) {
    const int64_t input = block * kInputBlock;
    for (int64_t first = 0; first < z.batch; first += kSampleBlock) {
      const MixingToInputs<T> pull{.programs = a.stored<T>(z),
                                   .samples = std::min(kSampleBlock, z.batch - first),
                                   .first = input,
                                   .count = std::min(kInputBlock, z.inputs - input),
                                   .inputs = data<T>(a.inputs) + first * a.inputs.stride(0),
                                   .program_weights = data<T>(program_weights) + first * z.programs,
                                   .grad_outputs = grad + first * z.outputs,
                                   .inputs_row = a.inputs.stride(0),
                                   .grad_outputs_columns = columns.data() + (few ? 0 : first * z.outputs),
                                   .pitch = pitch,
                                   .grad_inputs = grad_inputs ? grad_inputs + first * z.inputs : nullptr,
                                   .grad_program_weights =
                                       grad_program_weights + (block * z.batch + first) * z.programs,
                                   .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(program_mix_to_inputs(pull));
    }
  });
}

template <class T>
void mix_to_weights(const Sizes& z, const Arguments& a, const Tensor& program_weights, const Tensor& grad_outputs,
                    const Tensor& grad_weights) {
  const int64_t input_blocks = blocks(z.inputs, kInputBlock);
  for_each_sample(z.programs * input_blocks, bytes_worth(kInputBlock * z.batch * z.outputs), [&](int64_t k) {
    const int64_t input = k % input_blocks * kInputBlock;
    const MixingToWeights<T> push{.programs = a.stored<T>(z),
                                  .samples = z.batch,
                                  .program = k / input_blocks,
                                  .first = input,
                                  .count = std::min(kInputBlock, z.inputs - input),
                                  .inputs = data<T>(a.inputs),
                                  .program_weights = data<T>(program_weights),
                                  .grad_outputs = data<T>(grad_outputs),
                                  .inputs_row = a.inputs.stride(0),
                                  .grad_weights = mutable_data<T>(grad_weights)};
    FASTMEM_ON_ISA(program_mix_to_weights(push));
  });
}

// out = sum of `parts` arrays of `size` that lie `distance` apart, in order.
template <class T> void fold(const T* in, int64_t parts, int64_t distance, int64_t size, T* out) {
  for (int64_t k = 0; k < size; ++k) out[k] = parts ? in[k] : T(0);
  for (int64_t part = 1; part < parts; ++part)
    for (int64_t k = 0; k < size; ++k) out[k] += in[part * distance + k];
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
program_lookup_backward(std::optional<Tensor> grad_outputs, std::optional<Tensor> grad_program_weights,
                        Tensor program_weights, Tensor inputs, Tensor query, Tensor strength, Tensor keys,
                        Tensor weights, std::optional<Tensor> biases, Text norm_text, double eps,
                        std::vector<bool> output_mask) {
  const std::string norm = take(norm_text);
  const Sizes z = check(inputs, query, strength, keys, weights, biases);
  require(grad_outputs, inputs, {z.batch, z.outputs}, "grad_outputs");
  require(grad_program_weights, inputs, {z.batch, z.programs}, "grad_program_weights");
  require(program_weights, inputs, {z.batch, z.programs}, "program_weights");
  STD_TORCH_CHECK(output_mask.size() == 6, "output_mask: expected 6 entries");
  const Arguments a = arrange(inputs, query, strength, keys, weights, biases);
  program_weights = dense(program_weights);
  if (z.batch == 0 || z.outputs == 0) grad_outputs.reset();
  grad_outputs = contiguous(grad_outputs);
  grad_program_weights = contiguous(grad_program_weights);

  const bool torch_product = grad_outputs && by_torch(z, inputs);
  const auto gradient = [&](int k, std::initializer_list<int64_t> sizes) {
    if (!output_mask[size_t(k)]) return nothing(inputs);
    return grad_outputs || (k != 0 && k < 4) ? empty_large(inputs, sizes) : zeros(inputs, sizes);
  };
  const bool wants_biases = output_mask[5] && biases;
  const bool wants_address = output_mask[1] || output_mask[2] || output_mask[3];
  const Tensor grad_inputs = gradient(0, {z.batch, z.inputs}), grad_query = gradient(1, {z.batch, z.key});
  const Tensor grad_strength = gradient(2, {z.batch}), grad_keys = gradient(3, {z.programs, z.key});
  Tensor grad_weights = torch_product ? nothing(inputs) : gradient(4, {z.programs, z.inputs, z.outputs});
  const Tensor grad_biases = wants_biases ? gradient(5, {z.programs, z.outputs}) : nothing(inputs);

  const int64_t searches = blocks(z.batch, kSearchBlock);
  const int64_t size = addressing_scratch(std::min(kSearchBlock, z.batch), z.key);
  dispatch(inputs, [&]<class T>() {
    const int64_t pairs = z.batch * z.programs, input_parts = torch_product ? 1 : blocks(z.inputs, kInputBlock);
    const int64_t parts = grad_outputs ? input_parts + (biases ? 1 : 0) : 0;
    const Workspace<T> part((parts + 1) * pairs), key_part(searches * z.programs * z.key);
    const Workspace<T> scratch(searches * size);
    T* const into = part.data();
    if (grad_outputs && (output_mask[0] || wants_address)) {
      T* const to_inputs = output_mask[0] ? mutable_data<T>(grad_inputs) : nullptr;
      if (torch_product) mix_to_inputs_by_torch<T>(z, a, program_weights, *grad_outputs, to_inputs, into);
      else mix_to_inputs<T>(z, a, program_weights, *grad_outputs, to_inputs, into);
      const T* const grad = data<T>(*grad_outputs);
      const FlushSubnormals flush;
      if (biases) FASTMEM_ON_ISA(program_mix_to_biases(a.stored<T>(z), z.batch, grad, into + input_parts * pairs));
    }
    if (grad_outputs && output_mask[4]) {
      if (torch_product) {
        const Tensor columns = torch::stable::transpose(expand<T>(z, a, program_weights), 0, 1);
        const Tensor rows = torch::stable::matmul(columns, *grad_outputs);
        grad_weights = torch::stable::view(rows, {z.programs, z.inputs, z.outputs});
      } else {
        mix_to_weights<T>(z, a, program_weights, *grad_outputs, grad_weights);
      }
    }
    if (grad_outputs && wants_biases) {
      const Product<T> product{.rows = z.programs,
                               .columns = z.outputs,
                               .steps = z.batch,
                               .a = data<T>(program_weights),
                               .a_row = 1,
                               .a_step = z.programs,
                               .b = data<T>(*grad_outputs),
                               .b_row = z.outputs,
                               .c = mutable_data<T>(grad_biases),
                               .c_row = z.outputs,
                               .block = 128};
      const FlushSubnormals flush;
      FASTMEM_ON_ISA(product(product));
    }
    if (!wants_address) return;
    const Similarity<T> measure = similarity<T>(norm, eps);
    T* const total = into + parts * pairs;
    for_each_search(z, [&](int64_t first, int64_t samples, int64_t block) {
      const int64_t at = first * z.programs, count = samples * z.programs;
      fold(into + at, parts, pairs, count, total + at);
      if (grad_program_weights)
        for (int64_t k = at; k < at + count; ++k) total[k] += data<T>(*grad_program_weights)[k];
      const AddressingBackward<T> addressing{
          .search = a.search<T>(z, first, samples, measure),
          .weights = data<T>(program_weights) + at,
          .grad_weights = total + at,
          .weights_row = z.programs,
          .grad_memory = output_mask[3] ? key_part.data() + block * z.programs * z.key : nullptr,
          .grad_memory_row = z.key,
          .accumulate = false,
          .grad_keys = output_mask[1] ? mutable_data<T>(grad_query) + first * z.key : nullptr,
          .grad_strengths = output_mask[2] ? mutable_data<T>(grad_strength) + first : nullptr,
          .grad_key_mask = nullptr,
          .scratch = scratch.data() + block * size};
      FASTMEM_ON_ISA(content_addressing_backward(addressing));
    });
    if (output_mask[3]) {
      const int64_t elements = z.programs * z.key;
      fold<T>(key_part.data(), searches, elements, elements, mutable_data<T>(grad_keys));
    }
  });
  return {grad_inputs, grad_query, grad_strength, grad_keys, grad_weights, grad_biases};
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
