#include "program_mix.h"

#include <tuple>

namespace fastmem {
namespace {

Tensor program_mix(Tensor inputs, Tensor program_weights, Tensor weights, std::optional<Tensor> biases) {
  const Mix m = mix_of(inputs, program_weights, weights, biases);
  Tensor outputs;
  dispatch(inputs, [&]<class T>() { outputs = mix<T>(m); });
  return outputs;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> program_mix_backward(Tensor grad_outputs, Tensor inputs,
                                                                Tensor program_weights, Tensor weights,
                                                                std::optional<Tensor> biases,
                                                                std::vector<bool> output_mask) {
  const Mix m = mix_of(inputs, program_weights, weights, biases);
  require(grad_outputs, inputs, {m.batch, m.outputs}, "grad_outputs");
  STD_TORCH_CHECK(output_mask.size() == 4, "output_mask: expected 4 entries");
  const MixWanted wants{
      .inputs = output_mask[0], .program_weights = output_mask[1], .weights = output_mask[2], .biases = output_mask[3]};
  const Tensor grad_program_weights = wanted(wants.program_weights, inputs, {m.batch, m.programs});
  MixGradients gradients;
  dispatch(inputs, [&]<class T>() {
    const ProgramWeightParts<T> into = mix_backward<T>(m, grad_outputs, wants, gradients);
    if (!wants.program_weights) return;
    const int64_t bytes = (into.parts + 1) * m.programs * int64_t(sizeof(T));
    for_each_sample_block(m, bytes, [&](int64_t first, int64_t samples) {
      const int64_t at = first * m.programs;
      into.add_up(at, samples * m.programs, mutable_data<T>(grad_program_weights) + at);
    });
  });
  return {gradients.inputs, grad_program_weights, gradients.weights, gradients.biases};
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("program_mix(Tensor inputs, Tensor program_weights, Tensor weights, Tensor? biases) -> Tensor");
  m.def("program_mix_backward(Tensor grad_outputs, Tensor inputs, Tensor program_weights, Tensor weights, "
        "Tensor? biases, bool[4] output_mask) -> (Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("program_mix", TORCH_BOX(&program_mix));
  m.impl("program_mix_backward", TORCH_BOX(&program_mix_backward));
}

} // namespace fastmem
