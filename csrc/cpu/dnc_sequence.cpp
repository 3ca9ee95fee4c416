#include "dnc_sequence_kernel.h"

#include "sequence_op.h"

#include <array>

namespace fastmem {
namespace {

// memory, usage, precedence, link, write weights, read weights, reads, hidden, cell
using State = std::array<Tensor, 9>;
constexpr size_t kMemory = 0, kLink = 3;

struct Call {
  DncSequenceLayout layout;
  bool oneplus, detach_usage_write;
  double mask_floor, clip, eps;
  std::string norm;
  SequenceParameters parameters;
  State state;
  const uint8_t* step_mask;

  template <class T> DncVariant<T> variant() const {
    return {layout.step.masked,
            layout.deallocates,
            layout.step.sharpened,
            oneplus,
            detach_usage_write,
            T(mask_floor),
            T(clip),
            similarity<T>(norm, eps)};
  }

  int64_t weight_numbers() const {
    const SequenceLayout& l = layout.sequence;
    return l.controller.products() * l.top() + l.controller.hidden * l.interface;
  }
};

State state_of(const Tensors& list, const DncSequenceLayout& l, const Tensor& like) {
  STD_TORCH_CHECK(list.size() == 9, "state: expected 9 tensors");
  State state{list[0], list[1], list[2], list[3], list[4], list[5], list[6], list[7], list[8]};
  for (Tensor& tensor : state) tensor = dense(tensor);
  const int64_t batch = l.sequence.batch, n = l.step.slots, q = l.step.write_heads, r = l.step.read_heads;
  require(state[0], like, {batch, n, l.step.word}, "memory");
  require(state[1], like, {batch, n}, "usage");
  require(state[2], like, {batch, q, n}, "precedence");
  require(state[3], like, {batch, q, n, n}, "link");
  require(state[4], like, {batch, q, n}, "write_weights");
  require(state[5], like, {batch, r, n}, "read_weights");
  require(state[6], like, {batch, r, l.step.word}, "reads");
  require(state[7], like, {batch, l.sequence.controller.cell()}, "hidden");
  require(state[8], like, {batch, l.sequence.controller.cell()}, "cell");
  return state;
}

// Uninitialised, with the sizes of a state.
State state_like(const DncSequenceLayout& l, const Tensor& like) {
  const int64_t batch = l.sequence.batch, n = l.step.slots, q = l.step.write_heads, r = l.step.read_heads;
  const int64_t cell = l.sequence.controller.cell();
  return {empty_large(like, {batch, n, l.step.word}), empty(like, {batch, n}),    empty(like, {batch, q, n}),
          empty_large(like, {batch, q, n, n}),        empty(like, {batch, q, n}), empty(like, {batch, r, n}),
          empty(like, {batch, r, l.step.word}),       empty(like, {batch, cell}), empty(like, {batch, cell})};
}

Call call_of(const Tensor& inputs, const Tensors& parameters, const Tensors& state,
             const std::optional<Tensor>& step_mask, const std::vector<int64_t>& shape,
             const std::vector<std::string>& options, const std::vector<double>& constants) {
  STD_TORCH_CHECK(shape.size() == 8 && options.size() >= 2 && constants.size() == 3, "wrong number of options");
  STD_TORCH_CHECK(inputs.dim() == 3, "inputs: wrong number of dimensions");
  for (const int64_t size : shape) STD_TORCH_CHECK(size >= 0, "shape: negative");
  STD_TORCH_CHECK(shape[7] > 0, "shape: no spacing");
  const bool sharpened = contains(options, "sharpened"), deallocates = contains(options, "deallocates");
  DncSequenceLayout l{.sequence = {.steps = inputs.size(0),
                                   .batch = inputs.size(1),
                                   .spacing = shape[7],
                                   .controller = {controller_kind(options[0]), shape[1]},
                                   .reads = shape[4] * shape[3],
                                   .interface = 0,
                                   .memory_fields = 0},
                      .step = {.slots = shape[2],
                               .word = shape[3],
                               .read_heads = shape[4],
                               .write_heads = shape[5],
                               .masked = contains(options, "masked"),
                               .sharpened = sharpened},
                      .deallocates = deallocates};
  l.sequence.interface = l.step.interface();
  l.sequence.memory_fields = l.fields();
  SequenceParameters own = parameters_of(parameters, l.sequence, shape[0], shape[6]);
  require(inputs, own.weight_ih, {l.sequence.steps, l.sequence.batch, shape[0]}, "inputs");
  require_step_mask(step_mask, l.sequence);
  return {.layout = l,
          .oneplus = contains(options, "oneplus"),
          .detach_usage_write = contains(options, "detach_usage_write"),
          .mask_floor = constants[0],
          .clip = constants[1],
          .eps = constants[2],
          .norm = options[1],
          .parameters = own,
          .state = state_of(state, l, inputs),
          .step_mask = step_mask ? data<uint8_t>(*step_mask) : nullptr};
}

template <class T> DncState<const T> pointers_of(const State& state) {
  return {data<T>(state[0]), data<T>(state[1]), data<T>(state[2]),
          data<T>(state[3]), data<T>(state[4]), data<T>(state[5])};
}

// The parts of the final state that lie in the last row and the last top.
template <class T> void give_state(const DncSequenceLayout& l, const T* rows, const T* tops, const State& made) {
  const int64_t n = l.step.slots, writes = l.step.write_heads * n, reads = l.step.read_heads * n;
  const int64_t cell = l.sequence.controller.cell(), hidden = l.sequence.controller.hidden;
  for (int64_t b = 0; b < l.sequence.batch; ++b, rows += l.sequence.row(), tops += l.sequence.top()) {
    const T* next = rows + l.sequence.memory_at();
    const auto give = [&](size_t field, const T* from, int64_t count) {
      std::copy_n(from, count, mutable_data<T>(made[field]) + b * count);
    };
    const auto give_next = [&](size_t field, int64_t count) {
      give(field, next, count);
      next += count;
    };
    give_next(1, n);
    give_next(2, writes);
    give_next(4, writes);
    give_next(5, reads);
    give(6, tops + hidden, l.sequence.reads);
    give(7, tops, cell);
    give(8, rows + l.sequence.cell_at(), cell);
  }
}

Tensors dnc_sequence(Tensor inputs, Tensors parameters, Tensors given_state, std::optional<Tensor> step_mask,
                     std::vector<int64_t> shape, std::vector<Text> option_texts, std::vector<double> constants,
                     bool save_tape) {
  const std::vector<std::string> options = take(option_texts);
  inputs = dense(inputs);
  step_mask = contiguous(step_mask);
  const Call call = call_of(inputs, parameters, given_state, step_mask, shape, options, constants);
  const DncSequenceLayout& l = call.layout;
  const SequenceLayout& all = l.sequence;
  const int64_t batch = all.batch, n = l.step.slots, q = l.step.write_heads;
  const Tensor tops = empty_large(inputs, {all.steps + 1, batch, all.top()});
  const int64_t row_steps = save_tape ? all.steps : std::min<int64_t>(all.steps, 2);
  const Tensor rows = empty_large(inputs, {row_steps, batch, all.row()});
  const Tensor memories = empty_large(inputs, {save_tape ? all.kept() : 0, batch, n, l.step.word});
  const Tensor links = empty_large(inputs, {save_tape ? all.kept() : 0, batch, q, n, n});
  const State& state = call.state;
  State made = state_like(l, inputs);
  if (all.steps == 0)
    for (size_t i = 0; i < 9; ++i) torch::stable::copy_(made[i], state[i]);
  Tensor outputs = empty(inputs, {all.steps, batch, shape[6]});
  dispatch(inputs, [&]<class T>() {
    first_tops<T>(mutable_data<T>(tops), all, state[7], state[6]);
    if (all.steps == 0 || batch == 0) return;
    const FlushSubnormals flush;
    const SequenceParameters& p = call.parameters;
    const Tensor driven = product_of(flat(inputs), transposed(part(p.weight_ih, 1, 0, p.input_size)));
    const Tensor recurrent = packed<T>(recurrent_weights(p, all), false);
    const Tensor interface = packed<T>(p.interface_weight, false);
    const Workspace<T> bias = summed_bias<T>(p);
    const int64_t element = int64_t(sizeof(T));
    const Grouping groups =
        grouping(all, call.weight_numbers() * element, (l.memory() + l.link() + 2 * all.row()) * element);
    const int64_t own = sequence_scratch(all, groups.size), size = own + dnc_sequence_scratch(l);
    const Workspace<T> scratch(groups.workers * size);
    std::vector<const T*> pointers(size_t(groups.workers * 2 * groups.size));
    Interruption interruption;
    for_each_group(all, groups.workers, groups.size, [&](int64_t first, int64_t count, int64_t worker) {
      T* const space = scratch.data() + worker * size;
      const DncSequence<T> group{.layout = l,
                                 .variant = call.variant<T>(),
                                 .forward = {.group = {.layout = all,
                                                       .first = first,
                                                       .count = count,
                                                       .step_mask = call.step_mask,
                                                       .rows = mutable_data<T>(rows),
                                                       .row_steps = row_steps,
                                                       .tops = mutable_data<T>(tops),
                                                       .cell = data<T>(state[8]),
                                                       .norm_weight = data<T>(p.norm_weight),
                                                       .norm_bias = data<T>(p.norm_bias),
                                                       .interrupt = {&Interruption::requested, &interruption}},
                                             .driven = data<T>(driven),
                                             .recurrent = data<T>(recurrent),
                                             .interface_weights = data<T>(interface),
                                             .bias = bias.data(),
                                             .interface_bias = data<T>(p.interface_bias),
                                             .scratch = space},
                                 .state = pointers_of<T>(state),
                                 .new_memory = mutable_data<T>(made[0]),
                                 .new_link = mutable_data<T>(made[3]),
                                 .memories = save_tape ? mutable_data<T>(memories) : nullptr,
                                 .links = save_tape ? mutable_data<T>(links) : nullptr,
                                 .scratch = space + own,
                                 .pointers = pointers.data() + worker * 2 * groups.size};
      FASTMEM_ON_ISA(dnc_sequence(group));
    });
    throw_if_interrupted(interruption);
    const int64_t last = (all.steps - 1) % row_steps;
    give_state<T>(l, data<T>(rows) + last * batch * all.row(), data<T>(tops) + all.steps * batch * all.top(), made);
    outputs = outputs_of<T>(p, all, tops, call.step_mask, call.clip);
  });
  Tensors results{outputs};
  results.insert(results.end(), made.begin(), made.end());
  if (save_tape) results.insert(results.end(), {tops, rows, memories, links});
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
  const Call call = call_of(inputs, parameters, given_state, step_mask, shape, options, constants);
  const DncSequenceLayout& l = call.layout;
  const SequenceLayout& all = l.sequence;
  const SequenceParameters& p = call.parameters;
  const State& state = call.state;
  const int64_t batch = all.batch, n = l.step.slots, q = l.step.write_heads;
  STD_TORCH_CHECK(tape.size() == 4, "tape: expected 4 tensors");
  STD_TORCH_CHECK(grad_state.size() == 9, "grad_state: expected 9 entries");
  STD_TORCH_CHECK(output_mask.size() == 1 + parameters.size() + 9, "output_mask: wrong number of entries");
  for (Tensor& tensor : tape) tensor = dense(tensor);
  const Tensor &tops = tape[0], &rows = tape[1], &memories = tape[2], &links = tape[3];
  require(tops, inputs, {all.steps + 1, batch, all.top()}, "tape");
  require(rows, inputs, {all.steps, batch, all.row()}, "tape");
  require(memories, inputs, {all.kept(), batch, n, l.step.word}, "tape");
  require(links, inputs, {all.kept(), batch, q, n, n}, "tape");
  require(grad_outputs, inputs, {all.steps, batch, p.output_size}, "grad_outputs");
  grad_outputs = contiguous(grad_outputs);
  for (size_t i = 0; i < 9; ++i)
    if (grad_state[i]) {
      STD_TORCH_CHECK(grad_state[i]->numel() == state[i].numel() && grad_state[i]->dim() == state[i].dim() &&
                          grad_state[i]->scalar_type() == inputs.scalar_type(),
                      "grad_state: wrong shape or dtype for the C++ kernel");
      grad_state[i] = contiguous(grad_state[i]);
    }
  const auto wants_state = [&](size_t i) { return bool(output_mask[1 + parameters.size() + i]); };
  const bool idle = all.steps == 0 || batch == 0;
  State made = state_like(l, inputs);
  for (size_t i = 0; i < 9; ++i) // the steps fill those of memory and link
    if (idle || (i != kMemory && i != kLink)) {
      if (grad_state[i]) torch::stable::copy_(made[i], *grad_state[i]);
      else torch::stable::zero_(made[i]);
    }
  Tensors results;
  dispatch(inputs, [&]<class T>() {
    const FlushSubnormals flush;
    const Tensor grad_products = empty_large(inputs, {idle ? 0 : all.steps * batch, all.controller.products()});
    const Tensor grad_interface = empty_large(inputs, {idle ? 0 : all.steps * batch, all.interface});
    const Tensor upstream = grad_outputs ? grad_before_clip<T>(p, all, tops, call.step_mask, call.clip, *grad_outputs)
                                         : zeros(inputs, {all.steps * batch, p.output_size});
    const Tensor grad_tops = product_of(upstream, p.output_weight);
    const int64_t norms = all.controller.normalised() ? 2 * kNorms * all.controller.hidden : 0;
    Tensor grad_norms = zeros(inputs, {2, kNorms, norms > 0 ? all.controller.hidden : 0});
    if (!idle) {
      const Tensor recurrent = packed<T>(recurrent_weights(p, all), true);
      const Tensor interface = packed<T>(p.interface_weight, true);
      const Tensor carried = empty(inputs, {batch, all.top()});
      first_tops<T>(mutable_data<T>(carried), all, made[7], made[6]);
      const int64_t element = int64_t(sizeof(T));
      const Grouping groups = grouping(all, call.weight_numbers() * element,
                                       (2 * l.link() + (kSegment + 3) * l.memory() + 2 * all.row()) * element);
      const int64_t own = sequence_scratch(all, groups.size), spread = in_lines(norms);
      const int64_t size = own + spread + dnc_sequence_backward_scratch(l, groups.size);
      const int64_t pointer_count = dnc_sequence_backward_pointers(l, groups.size);
      const Tensor scratch = empty_large(inputs, {groups.workers * size});
      std::vector<const T*> pointers(size_t(groups.workers * pointer_count));
      for (int64_t worker = 0; worker < groups.workers; ++worker)
        std::fill_n(mutable_data<T>(scratch) + worker * size + own, norms, T(0));
      Interruption interruption;
      for_each_group(all, groups.workers, groups.size, [&](int64_t first, int64_t count, int64_t worker) {
        T* const space = mutable_data<T>(scratch) + worker * size;
        const auto upstream_of = [&](size_t i) { return data<T>(grad_state[i]); };
        const auto gradient_of = [&](size_t i) { return mutable_data<T>(made[i]); };
        const DncSequenceBackward<T> group{
            .layout = l,
            .variant = call.variant<T>(),
            .backward = {.group = {.layout = all,
                                   .first = first,
                                   .count = count,
                                   .step_mask = call.step_mask,
                                   .rows = mutable_data<T>(rows),
                                   .row_steps = all.steps,
                                   .tops = mutable_data<T>(tops),
                                   .cell = data<T>(state[8]),
                                   .norm_weight = data<T>(p.norm_weight),
                                   .norm_bias = data<T>(p.norm_bias),
                                   .interrupt = {&Interruption::requested, &interruption}},
                         .grad_tops = data<T>(grad_tops),
                         .recurrent = data<T>(recurrent),
                         .interface_weights = data<T>(interface),
                         .carried = mutable_data<T>(carried),
                         .grad_cell = gradient_of(8),
                         .grad_products = mutable_data<T>(grad_products),
                         .grad_interface = mutable_data<T>(grad_interface),
                         .grad_norm_weight = space + own,
                         .grad_norm_bias = space + own + norms / 2,
                         .scratch = space},
            .state = pointers_of<T>(state),
            .memories = data<T>(memories),
            .links = data<T>(links),
            .grad_new_state = {upstream_of(0), upstream_of(1), upstream_of(2), upstream_of(3), upstream_of(4),
                               upstream_of(5)},
            .grad_state = {wants_state(0) ? gradient_of(0) : nullptr, gradient_of(1), gradient_of(2),
                           wants_state(3) ? gradient_of(3) : nullptr, gradient_of(4), gradient_of(5)},
            .scratch = space + own + spread,
            .pointers = pointers.data() + worker * pointer_count};
        FASTMEM_ON_ISA(dnc_sequence_backward(group));
      });
      throw_if_interrupted(interruption);
      for (int64_t worker = 0; worker < groups.workers; ++worker)
        for (int64_t i = 0; i < norms; ++i)
          mutable_data<T>(grad_norms)[i] += mutable_data<T>(scratch)[worker * size + own + i];
      for (int64_t b = 0; b < batch; ++b) {
        const T* const top = data<T>(carried) + b * all.top();
        std::copy_n(top, all.controller.cell(), mutable_data<T>(made[7]) + b * all.controller.cell());
        std::copy_n(top + all.controller.hidden, all.reads, mutable_data<T>(made[6]) + b * all.reads);
      }
    }
    parameter_gradients(p, all, inputs, tops, upstream, grad_products, grad_interface, grad_norms, output_mask,
                        results);
  });
  for (size_t i = 0; i < 9; ++i) results.push_back(wants_state(i) ? made[i] : nothing(inputs));
  return results;
}

} // namespace

#define FASTMEM_SEQUENCE \
  "Tensor inputs, Tensor[] parameters, Tensor[] state, Tensor? step_mask, int[] shape, str[] options, float[] " \
  "constants"

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("dnc_sequence(" FASTMEM_SEQUENCE ", bool save_tape) -> Tensor[]");
  m.def("dnc_sequence_backward(Tensor? grad_outputs, Tensor?[] grad_state, Tensor[] tape, " FASTMEM_SEQUENCE
        ", bool[] output_mask) -> Tensor[]");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("dnc_sequence", TORCH_BOX(&dnc_sequence));
  m.impl("dnc_sequence_backward", TORCH_BOX(&dnc_sequence_backward));
}

} // namespace fastmem
