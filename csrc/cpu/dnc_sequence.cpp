#include "dnc_sequence_kernel.h"

#include "sequence_op.h"

namespace fastmem {
namespace {

// memory, usage, precedence, link, write weights, read weights; then reads, hidden, cell
constexpr size_t kStates = 9, kMemory = 0, kLink = 3;
constexpr size_t kSizes = 7; // of the network, in the shape

struct Call {
  DncSequenceLayout layout;
  SequenceCall all;
  bool oneplus, detach_usage_write;
  double mask_floor, clip, eps, allocation_eps;
  std::string norm;

  template <class T> DncVariant<T> variant() const {
    return {layout.step.masked,
            layout.deallocates,
            layout.step.sharpened,
            oneplus,
            detach_usage_write,
            T(mask_floor),
            T(clip),
            similarity<T>(norm, eps),
            allocation_eps};
  }
};

void require_state(const SequenceCall& call, const DncLayout& l, const Tensor& like) {
  const Tensors& state = call.state;
  const int64_t batch = call.layout.batch, n = l.slots, q = l.write_heads, r = l.read_heads;
  require(state[0], like, {batch, n, l.word}, "memory");
  require(state[1], like, {batch, n}, "usage");
  require(state[2], like, {batch, q, n}, "precedence");
  require(state[3], like, {batch, q, n, n}, "link");
  require(state[4], like, {batch, q, n}, "write_weights");
  require(state[5], like, {batch, r, n}, "read_weights");
  require_top(call, like, r, l.word);
}

Call call_of(const SequenceTables& tables, const Tensor& inputs, const Tensors& parameters, const Tensors& state,
             const std::optional<Tensor>& step_mask, const std::vector<int64_t>& shape,
             const std::vector<std::string>& options, const std::vector<double>& constants) {
  STD_TORCH_CHECK(options.size() >= 3 && constants.size() == 5, "wrong number of options");
  const bool sharpened = contains(options, "sharpened"), deallocates = contains(options, "deallocates");
  DncSequenceLayout l{.sequence = {.steps = inputs.size(0),
                                   .batch = inputs.size(1),
                                   .accesses = int64_t(tables.access_steps.size()),
                                   .spacing = tables.spacing,
                                   .controller = {controller_kind(options[0]), shape[1]},
                                   .programs = {},
                                   .reads = shape[4] * shape[3],
                                   .interface = 0,
                                   .memory_fields = 0},
                      .step = {.slots = shape[2],
                               .word = shape[3],
                               .read_heads = shape[4],
                               .write_heads = shape[5],
                               .masked = contains(options, "masked"),
                               .sharpened = sharpened},
                      .deallocates = deallocates,
                      .begins_alike = false};
  l.sequence.interface = l.step.interface();
  l.sequence.programs = tables.program_layout(shape[1], l.sequence.interface, options);
  l.sequence.memory_fields = l.fields();
  STD_TORCH_CHECK(state.size() == kStates, "state: expected ", kStates, " tensors, got ", state.size());
  const SequenceCall all = sequence_call(l.sequence, tables, shape[0], shape[6], constants[1], inputs, parameters,
                                         state, step_mask, options, 2, constants, {kMemory, kLink});
  l.begins_alike = all.shares_state;
  const Call call{.layout = l,
                  .all = all,
                  .oneplus = contains(options, "oneplus"),
                  .detach_usage_write = contains(options, "detach_usage_write"),
                  .mask_floor = constants[0],
                  .clip = constants[1],
                  .eps = constants[2],
                  .allocation_eps = constants[3],
                  .norm = options[1]};
  require_state(call.all, l.step, inputs);
  return call;
}

template <class T> DncState<const T> pointers_of(const Tensors& state) {
  return {data<T>(state[0]), data<T>(state[1]), data<T>(state[2]),
          data<T>(state[3]), data<T>(state[4]), data<T>(state[5])};
}

Tensors dnc_sequence(Tensor inputs, Tensors parameters, Tensors given_state, std::optional<Tensor> step_mask,
                     std::vector<int64_t> shape, std::vector<Text> option_texts, std::vector<double> constants,
                     bool save_tape) {
  const std::vector<std::string> options = take(option_texts);
  inputs = dense(inputs);
  step_mask = contiguous(step_mask);
  const SequenceTables tables(inputs, step_mask, shape, kSizes);
  const Call call = call_of(tables, inputs, parameters, given_state, step_mask, shape, options, constants);
  const DncSequenceLayout& l = call.layout;
  const SequenceLayout& all = l.sequence;
  const int64_t batch = all.batch, n = l.step.slots, q = l.step.write_heads;
  const int64_t kept = save_tape ? room_for_kept(call.all) : 0;
  const SequenceRows written(inputs, call.all, save_tape);
  const Tensor memories = empty_large(inputs, {kept, batch, n, l.step.word});
  const Tensor links = empty_large(inputs, {kept, batch, q, n, n});
  for (const Tensor& states : {memories, links}) SequenceRows::clear_rest(states, all.kept());
  Tensors made = state_like(call.all), results;
  dispatch(inputs, [&]<class T>() {
    const FlushSubnormals flush;
    const auto variant = call.variant<T>();
    const auto room = [&](int64_t count) { return MemoryRoom{dnc_sequence_scratch(l), 2 * count}; };
    const auto run = [&](const SequenceForward<T>& forward, T* scratch, const T** pointers) {
      const DncSequence<T> group{.layout = l,
                                 .variant = variant,
                                 .forward = forward,
                                 .state = pointers_of<T>(call.all.state),
                                 .new_memory = mutable_data<T>(made[kMemory]),
                                 .new_link = mutable_data<T>(made[kLink]),
                                 .memories = save_tape ? mutable_data<T>(memories) : nullptr,
                                 .links = save_tape ? mutable_data<T>(links) : nullptr,
                                 .scratch = scratch,
                                 .pointers = pointers};
      FASTMEM_ON_ISA(dnc_sequence(group));
    };
    results.push_back(run_groups<T>(call.all, inputs, written, l.memory() + l.link() + 2 * all.row(), room, run));
    give_state<T>(call.all, written, {1, 2, 4, 5}, made);
  });
  results.insert(results.end(), made.begin(), made.end());
  if (save_tape) results.insert(results.end(), {written.tops, written.controls, written.rows, memories, links});
  return results;
}

Tensors dnc_sequence_backward(std::optional<Tensor> grad_outputs, std::vector<std::optional<Tensor>> grad_state,
                              Tensors tape, Tensor inputs, Tensors parameters, Tensors given_state,
                              std::optional<Tensor> step_mask, std::vector<int64_t> shape,
                              std::vector<Text> option_texts, std::vector<double> constants,
                              std::vector<bool> output_mask) {
  const std::vector<std::string> options = take(option_texts);
  inputs = dense(inputs);
  step_mask = contiguous(step_mask);
  const SequenceTables tables(inputs, step_mask, shape, kSizes);
  const Call call = call_of(tables, inputs, parameters, given_state, step_mask, shape, options, constants);
  const DncSequenceLayout& l = call.layout;
  const SequenceLayout& all = l.sequence;
  const int64_t batch = all.batch, n = l.step.slots, q = l.step.write_heads;
  require_upstream(call.all, inputs, tape, 5, grad_outputs, grad_state, parameters.size(), output_mask);
  const Tensor &memories = tape[3], &links = tape[4];
  require(memories, inputs, {room_for_kept(call.all), batch, n, l.step.word}, "tape");
  require(links, inputs, {room_for_kept(call.all), batch, q, n, n}, "tape");
  const auto wants_state = [&](size_t i) { return bool(output_mask[1 + parameters.size() + i]); };
  Tensors made = state_like(call.all), results;
  for (size_t i = call.all.idle() ? 0 : call.all.reads(); i < kStates; ++i) // the steps fill those of the memory
    start_gradient(made[i], grad_state[i]);
  dispatch(inputs, [&]<class T>() {
    const FlushSubnormals flush;
    const auto variant = call.variant<T>();
    const auto room = [&](int64_t count) {
      return MemoryRoom{dnc_sequence_backward_scratch(l, count), dnc_sequence_backward_pointers(l, count)};
    };
    const auto run = [&](const SequenceBackward<T>& backward, T* scratch, const T** pointers) {
      const auto upstream_of = [&](size_t i) { return data<T>(grad_state[i]); };
      const auto gradient_of = [&](size_t i) { return mutable_data<T>(made[i]); };
      const DncSequenceBackward<T> group{.layout = l,
                                         .variant = variant,
                                         .backward = backward,
                                         .state = pointers_of<T>(call.all.state),
                                         .memories = data<T>(memories),
                                         .links = data<T>(links),
                                         .grad_new_state = {upstream_of(0), upstream_of(1), upstream_of(2),
                                                            upstream_of(3), upstream_of(4), upstream_of(5)},
                                         .grad_state = {wants_state(0) ? gradient_of(0) : nullptr, gradient_of(1),
                                                        gradient_of(2), wants_state(3) ? gradient_of(3) : nullptr,
                                                        gradient_of(4), gradient_of(5)},
                                         .scratch = scratch,
                                         .pointers = pointers};
      FASTMEM_ON_ISA(dnc_sequence_backward(group));
    };
    results = run_groups_back<T>(call.all, inputs, tape, grad_outputs, made, output_mask,
                                 2 * l.link() + (kSegment + 3) * l.memory() + 2 * all.row(), room, run);
  });
  for (size_t i = 0; i < kStates; ++i) results.push_back(wants_state(i) ? made[i] : nothing(inputs));
  return results;
}

} // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def(FASTMEM_SEQUENCE_SCHEMA("dnc_sequence"));
  m.def(FASTMEM_SEQUENCE_BACKWARD_SCHEMA("dnc_sequence"));
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("dnc_sequence", TORCH_BOX(&dnc_sequence));
  m.impl("dnc_sequence_backward", TORCH_BOX(&dnc_sequence_backward));
}

} // namespace fastmem
