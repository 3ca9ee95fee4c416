// A mix of stored programs and its gradients, shared out among threads: what program_mix and program_lookup have in
// common outside the kernels.
#pragma once

#include "program_mix_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

namespace fastmem {

inline int64_t blocks(int64_t count, int64_t size) { return (count + size - 1) / size; }

// What the sharing of work counts in bytes to copy, for a product: it multiplies about eight times in the time of one.
inline int64_t bytes_worth(int64_t multiplications) { return multiplications / 8; }

// The sizes and the arguments of a mix, in the layout that the kernels walk.
struct Mix {
  int64_t batch, inputs, outputs, programs;
  Tensor x, program_weights, weights;
  std::optional<Tensor> biases;

  template <class T> Programs<T> stored() const {
    return {.programs = programs,
            .inputs = inputs,
            .outputs = outputs,
            .weights = data<T>(weights),
            .weights_program = weights.stride(0),
            .weights_row = weights.stride(1),
            .biases = data<T>(biases)};
  }

  template <class T> Expansion<T> expansion(int64_t first, int64_t samples) const {
    return {.samples = samples,
            .programs = programs,
            .inputs = inputs,
            .x = data<T>(x) + first * x.stride(0),
            .program_weights = data<T>(program_weights) + first * programs,
            .x_row = x.stride(0)};
  }

  // The programs as one matrix [P I,O]; a copy only where their strides forbid it.
  Tensor matrix() const { return torch::stable::reshape(weights, {programs * inputs, outputs}); }

  // Whether torch's matrix product, which packs its operands, is faster than ours, which reads them as they lie: for
  // many samples with programs beyond the second-level cache, or where our vectors are the narrowest. bench/NOTES.md
  // has the measurements.
  bool by_torch() const {
    const int64_t element = x.scalar_type() == ScalarType::Double ? 8 : 4;
    if (isa() == Isa::baseline) return batch * programs * inputs * outputs > 1 << 23;
    return batch >= 256 && programs > 0 && inputs * outputs * element > 1 << 20;
  }
};

// Checks the arguments. Without program weights there is memory for them, yet to be filled.
inline Mix mix_of(const Tensor& inputs, const std::optional<Tensor>& program_weights, const Tensor& weights,
                  const std::optional<Tensor>& biases) {
  STD_TORCH_CHECK(inputs.dim() == 2 && weights.dim() == 3, "inputs and weights: expected 2 and 3 dimensions");
  const int64_t batch = inputs.size(0), programs = weights.size(0);
  require(inputs, inputs, {batch, inputs.size(1)}, "inputs");
  require(program_weights, inputs, {batch, programs}, "program_weights");
  require(weights, inputs, {programs, inputs.size(1), weights.size(2)}, "weights");
  require(biases, inputs, {programs, weights.size(2)}, "biases");
  return {.batch = batch,
          .inputs = inputs.size(1),
          .outputs = weights.size(2),
          .programs = programs,
          .x = with_dense_rows(inputs),
          .program_weights = program_weights ? dense(*program_weights) : empty(inputs, {batch, programs}),
          .weights = with_dense_rows(weights),
          .biases = contiguous(biases)};
}

// body(first, samples) for blocks of samples, `bytes` each sample.
template <class Body> void for_each_sample_block(const Mix& m, int64_t bytes, const Body& body) {
  for_each_sample(blocks(m.batch, kSampleBlock), kSampleBlock * bytes, [&](int64_t block) {
    const int64_t first = block * kSampleBlock;
    body(first, std::min(kSampleBlock, m.batch - first));
  });
}

// z[b,(p,i)] = program_weights[b,p] x[b,i]
template <class T> Tensor expand(const Mix& m) {
  const int64_t row = m.programs * m.inputs;
  const Tensor expanded = empty(m.x, {m.batch, row});
  for_each_sample_block(m, row * int64_t(sizeof(T)), [&](int64_t first, int64_t samples) {
    FASTMEM_ON_ISA(program_expand(m.expansion<T>(first, samples), mutable_data<T>(expanded) + first * row));
  });
  return expanded;
}

template <class T> Tensor mix_by_torch(const Mix& m) {
  const Tensor outputs = torch::stable::matmul(expand<T>(m), m.matrix());
  if (m.biases)
    for_each_sample_block(m, m.outputs * int64_t(sizeof(T)), [&](int64_t first, int64_t samples) {
      const Product<T> add{.rows = samples,
                           .columns = m.outputs,
                           .steps = m.programs,
                           .a = data<T>(m.program_weights) + first * m.programs,
                           .a_row = m.programs,
                           .a_step = 1,
                           .b = data<T>(*m.biases),
                           .b_row = m.outputs,
                           .c = mutable_data<T>(outputs) + first * m.outputs,
                           .c_row = m.outputs,
                           .block = 128,
                           .add = true};
      FASTMEM_ON_ISA(product(add));
    });
  return outputs;
}

// Threads share the columns, or the samples where that is more even. Either cut leaves every sum as it is.
template <class T> Tensor mix_by_kernels(const Mix& m) {
  const Tensor outputs = empty(m.x, {m.batch, m.outputs});
  if (!m.batch || !m.outputs) return outputs;
  constexpr int64_t unit = 64 / int64_t(sizeof(T));
  const int64_t units = blocks(m.outputs, unit);
  const int64_t bytes = bytes_worth(m.batch * m.programs * m.inputs * m.outputs);
  const int64_t shared = std::clamp<int64_t>(bytes / 32768, 1, torch::stable::get_num_threads());
  const bool by_columns = m.batch < 16 * shared || units % shared == 0 || units >= 16 * shared;
  const int64_t parts = std::min(shared, by_columns ? units : m.batch);
  for_each_sample(parts, 32768, [&](int64_t part) {
    int64_t first = 0, end = m.batch, column = 0, column_end = m.outputs;
    if (by_columns) {
      column = units * part / parts * unit;
      column_end = std::min(m.outputs, units * (part + 1) / parts * unit);
    } else {
      first = m.batch * part / parts;
      end = m.batch * (part + 1) / parts;
    }
    const Mixing<T> mixing{.programs = m.stored<T>(),
                           .samples = end - first,
                           .first = column,
                           .columns = column_end - column,
                           .inputs = data<T>(m.x) + first * m.x.stride(0),
                           .program_weights = data<T>(m.program_weights) + first * m.programs,
                           .inputs_row = m.x.stride(0),
                           .outputs = mutable_data<T>(outputs) + first * m.outputs};
    FASTMEM_ON_ISA(program_mix(mixing));
  });
  return outputs;
}

template <class T> Tensor mix(const Mix& m) { return m.by_torch() ? mix_by_torch<T>(m) : mix_by_kernels<T>(m); }

struct MixWanted {
  bool inputs, program_weights, weights, biases;
};

struct MixGradients {
  Tensor inputs, weights, biases; // unwanted: of size 0
};

// The gradient of the program weights in parts [parts,B,P]. Their sum is left to whoever goes on with it.
template <class T> struct ProgramWeightParts {
  int64_t parts, size; // elements of a part
  Workspace<T> values;

  void add_up(int64_t first, int64_t count, T* out) const { fold(values.data() + first, parts, size, count, out); }
};

template <class T>
void mix_to_inputs_by_torch(const Mix& m, const Tensor& grad_outputs, T* grad_inputs, T* grad_program_weights) {
  const int64_t row = m.programs * m.inputs;
  const Tensor grad_z = torch::stable::matmul(grad_outputs, torch::stable::transpose(m.matrix(), 0, 1));
  for_each_sample_block(m, row * int64_t(sizeof(T)), [&](int64_t first, int64_t samples) {
    FASTMEM_ON_ISA(program_expand_backward(m.expansion<T>(first, samples), data<T>(grad_z) + first * row,
                                           grad_inputs ? grad_inputs + first * m.inputs : nullptr,
                                           grad_program_weights + first * m.programs));
  });
}

// The gradient of the inputs, unless null, and of the program weights, in parts [I blocks,B,P].
template <class T>
void mix_to_inputs(const Mix& m, const Tensor& grad_outputs, T* grad_inputs, T* grad_program_weights) {
  const int64_t sample_blocks = blocks(m.batch, kSampleBlock), input_blocks = blocks(m.inputs, kInputBlock);
  const bool few = m.batch <= kFewSamples;
  const int64_t pitch = blocks(std::min(kSampleBlock, m.batch), 16) * 16;
  const Workspace<T> columns(few ? 0 : sample_blocks * m.outputs * pitch);
  const T* const grad = data<T>(grad_outputs);
  if (!few)
    for_each_sample(sample_blocks, kSampleBlock * m.outputs * 2, [&](int64_t block) {
      const int64_t first = block * kSampleBlock;
      FASTMEM_ON_ISA(transpose(grad + first * m.outputs, m.outputs, std::min(kSampleBlock, m.batch - first), m.outputs,
                               columns.data() + first * m.outputs, pitch, pitch));
    });
  const int64_t workers = shares(input_blocks, bytes_worth(kInputBlock * m.batch * m.programs * m.outputs));
  const int64_t size = 3 * kInputBlock * pitch;
  const Workspace<T> scratch(workers * size);
  for_each_sample_in_shares(input_blocks, workers, [&](int64_t block, int64_t worker) {
    const int64_t input = block * kInputBlock;
    for (int64_t first = 0; first < m.batch; first += kSampleBlock) {
      const MixingToInputs<T> pull{.programs = m.stored<T>(),
                                   .samples = std::min(kSampleBlock, m.batch - first),
                                   .first = input,
                                   .count = std::min(kInputBlock, m.inputs - input),
                                   .inputs = data<T>(m.x) + first * m.x.stride(0),
                                   .program_weights = data<T>(m.program_weights) + first * m.programs,
                                   .grad_outputs = grad + first * m.outputs,
                                   .inputs_row = m.x.stride(0),
                                   .grad_outputs_columns = columns.data() + (few ? 0 : first * m.outputs),
                                   .pitch = pitch,
                                   .grad_inputs = grad_inputs ? grad_inputs + first * m.inputs : nullptr,
                                   .grad_program_weights =
                                       grad_program_weights + (block * m.batch + first) * m.programs,
                                   .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(program_mix_to_inputs(pull));
    }
  });
}

template <class T> Tensor mix_to_weights_by_torch(const Mix& m, const Tensor& grad_outputs) {
  const Tensor columns = torch::stable::transpose(expand<T>(m), 0, 1);
  return torch::stable::view(torch::stable::matmul(columns, grad_outputs), {m.programs, m.inputs, m.outputs});
}

template <class T> Tensor mix_to_weights(const Mix& m, const Tensor& grad_outputs) {
  const Tensor grad_weights = empty_large(m.x, {m.programs, m.inputs, m.outputs});
  const int64_t input_blocks = blocks(m.inputs, kInputBlock);
  for_each_sample(m.programs * input_blocks, bytes_worth(kInputBlock * m.batch * m.outputs), [&](int64_t k) {
    const int64_t input = k % input_blocks * kInputBlock;
    const MixingToWeights<T> push{.programs = m.stored<T>(),
                                  .samples = m.batch,
                                  .program = k / input_blocks,
                                  .first = input,
                                  .count = std::min(kInputBlock, m.inputs - input),
                                  .inputs = data<T>(m.x),
                                  .program_weights = data<T>(m.program_weights),
                                  .grad_outputs = data<T>(grad_outputs),
                                  .inputs_row = m.x.stride(0),
                                  .grad_weights = mutable_data<T>(grad_weights)};
    FASTMEM_ON_ISA(program_mix_to_weights(push));
  });
  return grad_weights;
}

template <class T> Tensor mix_to_biases(const Mix& m, const Tensor& grad_outputs) {
  const Tensor grad_biases = empty_large(m.x, {m.programs, m.outputs});
  const Product<T> sum{.rows = m.programs,
                       .columns = m.outputs,
                       .steps = m.batch,
                       .a = data<T>(m.program_weights),
                       .a_row = 1,
                       .a_step = m.programs,
                       .b = data<T>(grad_outputs),
                       .b_row = m.outputs,
                       .c = mutable_data<T>(grad_biases),
                       .c_row = m.outputs,
                       .block = 128};
  const FlushSubnormals flush;
  FASTMEM_ON_ISA(product(sum));
  return grad_biases;
}

// The gradients of a mix from that of its outputs; without it they are 0.
template <class T>
ProgramWeightParts<T> mix_backward(const Mix& m, const std::optional<Tensor>& grad_outputs, const MixWanted& wanted,
                                   MixGradients& gradients) {
  const bool wants_biases = wanted.biases && m.biases;
  const int64_t pairs = m.batch * m.programs;
  gradients = {nothing(m.x), nothing(m.x), nothing(m.x)};
  if (!grad_outputs || m.batch == 0 || m.outputs == 0) {
    if (wanted.inputs) gradients.inputs = zeros(m.x, {m.batch, m.inputs});
    if (wanted.weights) gradients.weights = zeros(m.x, {m.programs, m.inputs, m.outputs});
    if (wants_biases) gradients.biases = zeros(m.x, {m.programs, m.outputs});
    return {.parts = 0, .size = pairs, .values = Workspace<T>(0)};
  }
  const Tensor grad = dense(*grad_outputs);
  const bool by_torch = m.by_torch(), pulls = wanted.inputs || wanted.program_weights;
  const int64_t input_parts = by_torch ? 1 : blocks(m.inputs, kInputBlock), parts = input_parts + (m.biases ? 1 : 0);
  ProgramWeightParts<T> into{.parts = parts, .size = pairs, .values = Workspace<T>(pulls ? parts * pairs : 0)};
  if (wanted.inputs) gradients.inputs = empty_large(m.x, {m.batch, m.inputs});
  if (pulls) {
    T* const to_inputs = wanted.inputs ? mutable_data<T>(gradients.inputs) : nullptr;
    if (by_torch) mix_to_inputs_by_torch<T>(m, grad, to_inputs, into.values.data());
    else mix_to_inputs<T>(m, grad, to_inputs, into.values.data());
    const FlushSubnormals flush;
    if (m.biases)
      FASTMEM_ON_ISA(
          program_mix_to_biases(m.stored<T>(), m.batch, data<T>(grad), into.values.data() + input_parts * pairs));
  }
  if (wanted.weights) gradients.weights = by_torch ? mix_to_weights_by_torch<T>(m, grad) : mix_to_weights<T>(m, grad);
  if (wants_biases) gradients.biases = mix_to_biases<T>(m, grad);
  return into;
}

} // namespace fastmem
