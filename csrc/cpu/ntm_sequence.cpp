#include "ntm_sequence_kernel.h"

#include "sequence_op.h"

#include <limits>

namespace fastmem {
namespace {

// memory, weights; then reads, hidden, cell
constexpr size_t kStates = 5, kMemory = 0, kWeights = 1;
constexpr size_t kSizes = 6; // of the network, in the shape

struct Call {
  NtmSequenceLayout layout; // points into the options, which must outlive it
  SequenceCall all;
  bool reversed_shift, in_powers;
  double sharpen_eps, clip, eps;
  std::string norm;

  template <class T> NtmVariant<T> variant() const {
    return {reversed_shift, {in_powers, T(sharpen_eps)}, T(clip), similarity<T>(norm, eps)};
  }
};

void require_state(const SequenceCall& call, const NtmLayout& l, const Tensor& like) {
  STD_TORCH_CHECK(call.state.size() == kStates, "state: expected ", kStates, " tensors, got ", call.state.size());
  require(call.state[kMemory], like, {call.layout.batch, l.slots, l.word}, "memory");
  require(call.state[kWeights], like, {call.layout.batch, l.heads, l.slots}, "weights");
  require_top(call, like, l.heads - l.write_heads(), l.word);
}

Call call_of(const SequenceTables& tables, const Tensor& inputs, const Tensors& parameters, const Tensors& state,
             const std::optional<Tensor>& step_mask, const std::vector<int64_t>& shape,
             const std::vector<std::string>& options, const std::vector<double>& constants) {
  STD_TORCH_CHECK(options.size() >= 5 && constants.size() == 4, "wrong number of options");
  const std::string &form = options[2], &heads = options[3];
  STD_TORCH_CHECK(form == "softmax" || form == "power", "options: unknown form");
  STD_TORCH_CHECK(!heads.empty(), "options: no heads");
  for (const char kind : heads) STD_TORCH_CHECK(kind == 'r' || kind == 'w', "options: heads are letters r and w");
  NtmSequenceLayout l{.sequence = {.steps = inputs.size(0),
                                   .batch = inputs.size(1),
                                   .accesses = int64_t(tables.access_steps.size()),
                                   .spacing = tables.spacing,
                                   .controller = {controller_kind(options[0]), shape[1]},
                                   .programs = {},
                                   .reads = 0,
                                   .interface = 0,
                                   .memory_fields = 0},
                      .step = {.slots = shape[2],
                               .word = shape[3],
                               .reach = shape[4],
                               .heads = int64_t(heads.size()),
                               .kinds = heads.data(),
                               .joint_writes = contains(options, "joint_writes")}};
  l.sequence.reads = (l.step.heads - l.step.write_heads()) * l.step.word;
  l.sequence.interface = l.step.interface();
  l.sequence.programs = tables.program_layout(shape[1], l.sequence.interface, options);
  l.sequence.memory_fields = l.fields();
  const double no_clip = std::numeric_limits<double>::infinity();
  const Call call{.layout = l,
                  .all = sequence_call(l.sequence, tables, shape[0], shape[5], no_clip, inputs, parameters, state,
                                       step_mask, options, 4, constants),
                  .reversed_shift = contains(options, "reversed_shift"),
                  .in_powers = form == "power",
                  .sharpen_eps = constants[0],
                  .clip = constants[1],
                  .eps = constants[2],
                  .norm = options[1]};
  require_state(call.all, l.step, inputs);
  return call;
}

Tensors ntm_sequence(Tensor inputs, Tensors parameters, Tensors given_state, std::optional<Tensor> step_mask,
                     std::vector<int64_t> shape, std::vector<Text> option_texts, std::vector<double> constants,
                     bool save_tape) {
  const std::vector<std::string> options = take(option_texts);
  inputs = dense(inputs);
  step_mask = contiguous(step_mask);
  const SequenceTables tables(inputs, step_mask, shape, kSizes);
  const Call call = call_of(tables, inputs, parameters, given_state, step_mask, shape, options, constants);
  const NtmSequenceLayout& l = call.layout;
  const SequenceLayout& all = l.sequence;
  const SequenceRows written(inputs, call.all, save_tape);
  const int64_t kept = save_tape ? room_for_kept(call.all) : 0;
  const Tensor memories = empty_large(inputs, {kept, all.batch, l.step.slots, l.step.word});
  SequenceRows::clear_rest(memories, all.kept());
  Tensors made = state_like(call.all), results;
  dispatch(inputs, [&]<class T>() {
    const FlushSubnormals flush;
    const auto variant = call.variant<T>();
    const auto room = [&](int64_t count) { return MemoryRoom{ntm_sequence_scratch(l), count}; };
    const auto run = [&](const SequenceForward<T>& forward, T* scratch, const T** pointers) {
      const NtmSequence<T> group{.layout = l,
                                 .variant = variant,
                                 .forward = forward,
                                 .memory = data<T>(call.all.state[kMemory]),
                                 .weights = data<T>(call.all.state[kWeights]),
                                 .new_memory = mutable_data<T>(made[kMemory]),
                                 .memories = save_tape ? mutable_data<T>(memories) : nullptr,
                                 .scratch = scratch,
                                 .pointers = pointers};
      FASTMEM_ON_ISA(ntm_sequence(group));
    };
    results.push_back(run_groups<T>(call.all, inputs, written, l.memory() + 2 * all.row(), room, run));
    give_state<T>(call.all, written, {kWeights}, made);
  });
  results.insert(results.end(), made.begin(), made.end());
  if (save_tape) results.insert(results.end(), {written.tops, written.controls, written.rows, memories});
  return results;
}

Tensors ntm_sequence_backward(std::optional<Tensor> grad_outputs, std::vector<std::optional<Tensor>> grad_state,
                              Tensors tape, Tensor inputs, Tensors parameters, Tensors given_state,
                              std::optional<Tensor> step_mask, std::vector<int64_t> shape,
                              std::vector<Text> option_texts, std::vector<double> constants,
                              std::vector<bool> output_mask) {
  const std::vector<std::string> options = take(option_texts);
  inputs = dense(inputs);
  step_mask = contiguous(step_mask);
  const SequenceTables tables(inputs, step_mask, shape, kSizes);
  const Call call = call_of(tables, inputs, parameters, given_state, step_mask, shape, options, constants);
  const NtmSequenceLayout& l = call.layout;
  const SequenceLayout& all = l.sequence;
  require_upstream(call.all, inputs, tape, 4, grad_outputs, grad_state, parameters.size(), output_mask);
  const Tensor& memories = tape[3];
  require(memories, inputs, {room_for_kept(call.all), all.batch, l.step.slots, l.step.word}, "tape");
  Tensors made = state_like(call.all), results;
  for (size_t i = 0; i < kStates; ++i) start_gradient(made[i], grad_state[i]);
  dispatch(inputs, [&]<class T>() {
    const FlushSubnormals flush;
    const auto variant = call.variant<T>();
    const auto room = [&](int64_t count) {
      return MemoryRoom{ntm_sequence_backward_scratch(l, count), ntm_sequence_backward_pointers(l, count)};
    };
    const auto run = [&](const SequenceBackward<T>& backward, T* scratch, const T** pointers) {
      const NtmSequenceBackward<T> group{.layout = l,
                                         .variant = variant,
                                         .backward = backward,
                                         .memory = data<T>(call.all.state[kMemory]),
                                         .weights = data<T>(call.all.state[kWeights]),
                                         .memories = data<T>(memories),
                                         .grad_memory = mutable_data<T>(made[kMemory]),
                                         .grad_weights = mutable_data<T>(made[kWeights]),
                                         .scratch = scratch,
                                         .pointers = pointers};
      FASTMEM_ON_ISA(ntm_sequence_backward(group));
    };
    results = run_groups_back<T>(call.all, inputs, tape, grad_outputs, made, output_mask,
                                 2 * l.memory() + kSegment * l.written() + 2 * all.row(), room, run);
  });
  for (size_t i = 0; i < kStates; ++i)
    results.push_back(output_mask[1 + parameters.size() + i] ? made[i] : nothing(inputs));
  return results;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def(FASTMEM_SEQUENCE_SCHEMA("ntm_sequence"));
  m.def(FASTMEM_SEQUENCE_BACKWARD_SCHEMA("ntm_sequence"));
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("ntm_sequence", TORCH_BOX(&ntm_sequence));
  m.impl("ntm_sequence_backward", TORCH_BOX(&ntm_sequence_backward));
}

} // namespace fastmem
