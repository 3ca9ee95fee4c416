// What the ops on whole sequences share outside the time loop: arguments, the matrix products before and after it, and
// groups of samples. See fastmem/ops for the arguments.
#pragma once

#include "groups.h"
#include "interrupt.h"
#include "parallel.h"
#include "pool.h"
#include "sequence.h"
#include "tensor.h"
#include "workspace.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <vector>

namespace fastmem {

using Tensors = std::vector<Tensor>;

inline ControllerKind controller_kind(const std::string& name) {
  if (name == "lstm") return ControllerKind::lstm;
  if (name == "layernorm_lstm") return ControllerKind::layernorm_lstm;
  STD_TORCH_CHECK(name == "feedforward", "options: unknown controller");
  return ControllerKind::feedforward;
}

inline std::vector<std::string> take(const std::vector<Text>& texts) {
  std::vector<std::string> taken;
  for (const Text text : texts) taken.push_back(take(text));
  return taken;
}

inline bool contains(const std::vector<std::string>& names, const char* name) {
  for (const std::string& entry : names)
    if (entry == name) return true;
  return false;
}

struct SequenceParameters {
  int64_t input_size, output_size;
  ControllerLayout controller;
  Tensor weight_ih;                // [products, X+RW]
  std::optional<Tensor> weight_hh; // [products, H] of a recurrent one
  std::optional<Tensor> bias_ih, bias_hh, norm_weight, norm_bias;
  Tensor interface_weight, interface_bias, output_weight, output_bias;
};

// In the order of the op's list, checked.
inline SequenceParameters parameters_of(const Tensors& list, const SequenceLayout& l, int64_t input_size,
                                        int64_t output_size) {
  const bool recurrent = l.controller.recurrent(), normalised = l.controller.normalised();
  const size_t own = recurrent ? 4 : 2;
  STD_TORCH_CHECK(list.size() == own + 4, "parameters: expected ", own + 4, " tensors, got ", list.size());
  SequenceParameters p{.input_size = input_size,
                       .output_size = output_size,
                       .controller = l.controller,
                       .weight_ih = dense(list[0]),
                       .weight_hh = std::nullopt,
                       .bias_ih = std::nullopt,
                       .bias_hh = std::nullopt,
                       .norm_weight = std::nullopt,
                       .norm_bias = std::nullopt,
                       .interface_weight = dense(list[own]),
                       .interface_bias = dense(list[own + 1]),
                       .output_weight = dense(list[own + 2]),
                       .output_bias = dense(list[own + 3])};
  const int64_t products = l.controller.products(), hidden = l.controller.hidden;
  const Tensor& like = p.weight_ih;
  if (recurrent) p.weight_hh = dense(list[1]);
  if (normalised) {
    p.norm_weight = dense(list[2]);
    p.norm_bias = dense(list[3]);
  } else {
    p.bias_ih = dense(list[recurrent ? 2 : 1]);
    if (recurrent) p.bias_hh = dense(list[3]);
  }
  require(p.weight_ih, like, {products, input_size + l.reads}, "weight_ih");
  require(p.weight_hh, like, {products, hidden}, "weight_hh");
  require(p.bias_ih, like, {products}, "bias_ih");
  require(p.bias_hh, like, {products}, "bias_hh");
  require(p.norm_weight, like, {kNorms, hidden}, "norm_weight");
  require(p.norm_bias, like, {kNorms, hidden}, "norm_bias");
  require(p.interface_weight, like, {l.interface, hidden}, "interface_weight");
  require(p.interface_bias, like, {l.interface}, "interface_bias");
  require(p.output_weight, like, {output_size, l.top()}, "output_weight");
  require(p.output_bias, like, {output_size}, "output_bias");
  return p;
}

inline void require_step_mask(const std::optional<Tensor>& mask, const SequenceLayout& l) {
  if (!mask) return;
  require(*mask, *mask, {l.steps, l.batch}, "step_mask");
  STD_TORCH_CHECK(mask->scalar_type() == ScalarType::Byte, "step_mask: wrong dtype for the C++ kernel");
}

// A [T,B,.] tensor as [TB,.].
inline Tensor flat(const Tensor& tensor) {
  return torch::stable::view(tensor, {tensor.size(0) * tensor.size(1), tensor.size(2)});
}

inline Tensor part(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

inline Tensor transposed(const Tensor& tensor) { return torch::stable::transpose(tensor, 0, 1); }

inline Tensor product_into(const Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// A product into memory that is kept for the next call.
inline Tensor product_of(const Tensor& a, const Tensor& b) {
  return product_into(empty_large(a, {a.size(0), b.size(1)}), a, b);
}

// Some columns of a weight matrix.
struct Columns {
  const Tensor& weights; // [outputs, .]
  int64_t first, count;
};

// Columns side by side, packed to take inputs to outputs, or the other way round for the gradient.
template <class T> Tensor packed(std::initializer_list<Columns> all, bool backward) {
  const Tensor& like = all.begin()->weights;
  const int64_t rows = like.size(0);
  int64_t columns = 0;
  for (const Columns& part : all) columns += part.count;
  const Tensor made = empty_large(like, {backward ? packed_size(rows, columns) : packed_size(columns, rows)});
  // In runs of rows, of which no two write to the same place: forward a run is a panel or some of them.
  const int64_t runs = (rows + kWidestPanel - 1) / kWidestPanel;
  for_each_sample(runs, kWidestPanel * columns * int64_t(sizeof(T)), [&](int64_t run) {
    const int64_t row = run * kWidestPanel, count = std::min(kWidestPanel, rows - row);
    int64_t column = 0;
    for (const Columns& part : all) {
      const int64_t stride = part.weights.size(1);
      const T* const weights = data<T>(part.weights) + row * stride + part.first;
      const Packing<T> packing{.inputs = backward ? count : part.count,
                               .outputs = backward ? part.count : count,
                               .input_stride = backward ? stride : 1,
                               .output_stride = backward ? 1 : stride,
                               .weights = weights,
                               .all_inputs = backward ? rows : columns,
                               .first_input = backward ? row : column,
                               .first_output = backward ? column : row,
                               .packed = mutable_data<T>(made)};
      FASTMEM_ON_ISA(pack(packing));
      column += part.count;
    }
  });
  return made;
}

// From what a controller sees of itself and its memory to its products; a feed-forward one sees its memory alone.
template <class T> Tensor packed_recurrent(const SequenceParameters& p, const SequenceLayout& l, bool backward) {
  const Columns reads{p.weight_ih, p.input_size, l.reads};
  if (!p.weight_hh) return packed<T>({reads}, backward);
  return packed<T>({{*p.weight_hh, 0, l.controller.hidden}, reads}, backward);
}

template <class T> Tensor packed_interface(const SequenceParameters& p, const SequenceLayout& l, bool backward) {
  return packed<T>({{p.interface_weight, 0, l.controller.hidden}}, backward);
}

template <class T> Workspace<T> summed_bias(const SequenceParameters& p) {
  const int64_t count = p.controller.products();
  Workspace<T> made(count);
  for (int64_t i = 0; i < count; ++i)
    made.data()[i] = (p.bias_ih ? data<T>(*p.bias_ih)[i] : T(0)) + (p.bias_hh ? data<T>(*p.bias_hh)[i] : T(0));
  return made;
}

// The first top of every sample: what it is given of the controller, and the reads.
template <class T> void first_tops(T* tops, const SequenceLayout& l, const Tensor& hidden, const Tensor& reads) {
  const int64_t given = hidden.size(1);
  for (int64_t b = 0; b < l.batch; ++b, tops += l.top()) {
    std::fill_n(tops, l.controller.hidden, T(0));
    std::copy_n(data<T>(hidden) + b * given, given, tops);
    std::copy_n(data<T>(reads) + b * l.reads, l.reads, tops + l.controller.hidden);
  }
}

// f(b, y) for all outputs [T,B,Y]: of sample b at time t, with y's of steps in which it did nothing left out.
template <class T, class F>
void for_each_output(const SequenceLayout& l, const uint8_t* step_mask, T* outputs, int64_t size, const F& f) {
  for (int64_t i = 0; i < l.steps * l.batch; ++i) {
    T* const row = outputs + i * size;
    if (step_mask && !(step_mask[i] & kControls)) std::fill_n(row, size, T(0));
    else
      for (int64_t k = 0; k < size; ++k) f(i * size + k, k, row[k]);
  }
}

// y = W (controller, reads) + b within +-clip, 0 where the controller rests.
template <class T>
Tensor outputs_of(const SequenceParameters& p, const SequenceLayout& l, const Tensor& tops, const uint8_t* step_mask,
                  double clip) {
  const Tensor product = product_of(flat(part(tops, 0, 1, l.steps)), transposed(p.output_weight));
  const T bound = T(clip);
  const T* const bias = data<T>(p.output_bias);
  for_each_output(l, step_mask, mutable_data<T>(product), p.output_size, [&](int64_t, int64_t k, T& y) {
    y += bias[k];
    y = y > bound ? bound : y < -bound ? -bound : y;
  });
  return torch::stable::view(product, {l.steps, l.batch, p.output_size});
}

// The gradient before the clip [TB,Y].
template <class T>
Tensor grad_before_clip(const SequenceParameters& p, const SequenceLayout& l, const Tensor& tops,
                        const uint8_t* step_mask, double clip, const Tensor& grad_outputs) {
  const Tensor made = torch::stable::clone(flat(grad_outputs));
  const T bound = T(clip);
  const bool clips = !std::isinf(bound);
  const Tensor product =
      clips ? product_of(flat(part(tops, 0, 1, l.steps)), transposed(p.output_weight)) : nothing(made);
  const T *const before = data<T>(product), *const bias = data<T>(p.output_bias);
  for_each_output(l, step_mask, mutable_data<T>(made), p.output_size, [&](int64_t i, int64_t k, T& grad) {
    const T y = clips ? before[i] + bias[k] : T(0);
    // Subnormal numbers count as zero; the threads of a matrix product would see them.
    if (y > bound || y < -bound || std::abs(grad) < std::numeric_limits<T>::min()) grad = 0;
  });
  return made;
}

// Inputs with 0 where the controller rests: what is there may be NaN, which a product with a gradient of 0 would
// spread.
template <class T> Tensor seen_inputs(const SequenceLayout& l, const uint8_t* step_mask, const Tensor& inputs) {
  if (!step_mask) return inputs;
  Tensor made = empty_large(inputs);
  torch::stable::copy_(made, inputs);
  for_each_output(l, step_mask, mutable_data<T>(made), inputs.size(2), [](int64_t, int64_t, T&) {});
  return made;
}

// Gradients of inputs and parameters by products over all steps, in the order of the op's arguments; unwanted: size 0.
template <class T>
void parameter_gradients(const SequenceParameters& p, const SequenceLayout& l, const uint8_t* step_mask,
                         const Tensor& inputs, const Tensor& tops, const Tensor& grad_outputs,
                         const Tensor& grad_products, const Tensor& grad_interface, const Tensor& grad_norms,
                         const std::vector<bool>& wants, Tensors& made) {
  const int64_t hidden = l.controller.hidden, products = l.controller.products();
  const auto wanted = [&] { return bool(wants[made.size()]); };
  const auto give = [&](const auto& gradient) { made.push_back(wanted() ? gradient() : nothing(inputs)); };
  const auto total = [](const Tensor& tensor) {
    const int64_t dim[] = {0};
    return torch::stable::sum(tensor, torch::headeronly::IntHeaderOnlyArrayRef(dim, 1));
  };
  const Tensor along = transposed(grad_products), before = flat(part(tops, 0, 0, l.steps)),
               after = flat(part(tops, 0, 1, l.steps));
  give([&] {
    return torch::stable::view(product_of(grad_products, part(p.weight_ih, 1, 0, p.input_size)),
                               {l.steps, l.batch, p.input_size});
  });
  give([&] {
    const Tensor weight = empty_large(inputs, {products, p.input_size + l.reads});
    product_into(part(weight, 1, 0, p.input_size), along, flat(seen_inputs<T>(l, step_mask, inputs)));
    product_into(part(weight, 1, p.input_size, l.reads), along, part(before, 1, hidden, l.reads));
    return weight;
  });
  if (p.weight_hh) give([&] { return product_of(along, part(before, 1, 0, hidden)); });
  if (p.bias_ih) give([&] { return total(grad_products); });
  if (p.bias_hh) { // the gradient is the same
    const bool summed = wants[made.size() - 1];
    give([&] { return summed ? torch::stable::clone(made.back()) : total(grad_products); });
  }
  if (p.norm_weight) {
    for (int64_t which = 0; which < 2; ++which)
      give([&] { return torch::stable::view(total(torch::stable::select(grad_norms, 1, which)), {kNorms, hidden}); });
  }
  give([&] { return product_of(transposed(grad_interface), part(after, 1, 0, hidden)); });
  give([&] { return total(grad_interface); });
  give([&] { return product_of(transposed(grad_outputs), after); });
  give([&] { return total(grad_outputs); });
}

struct Grouping {
  int64_t workers, size; // threads; most samples of a group
};

// body(first, count, worker): groups of samples, each worker with a run of them in its own thread. Raises what a signal
// raised meanwhile.
template <class Body> void for_each_group(const SequenceLayout& l, const Grouping& g, const Body& body) {
  Interruption interruption;
  std::atomic<int64_t> unfinished{g.workers};
  torch::stable::parallel_for(0, g.workers, 1, [&](int64_t first_worker, int64_t last_worker) {
    const FlushSubnormals flush;
    for (int64_t worker = first_worker; worker < last_worker; ++worker) {
      const int64_t begin = l.batch * worker / g.workers, samples = l.batch * (worker + 1) / g.workers - begin;
      const int64_t groups = (samples + g.size - 1) / g.size;
      for (int64_t k = 0; k < groups; ++k) {
        const int64_t first = begin + samples * k / groups;
        body(first, begin + samples * (k + 1) / groups - first, worker, interruption);
      }
    }
    interruption.finished(last_worker - first_worker, unfinished);
  });
  STD_TORCH_CHECK(!interruption.seen(), "interrupted");
}

// `state_bytes` of a sample and `weight_bytes` are what a step goes through.
inline Grouping grouping(const SequenceLayout& l, int64_t weight_bytes, int64_t state_bytes) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), l.batch);
  const int64_t samples = (l.batch + workers - 1) / workers, forced = forced_group_size();
  return {workers,
          forced > 0 ? std::min(forced, samples) : group_size(samples, weight_bytes, state_bytes, cache_bytes())};
}

// The arguments that every network has, checked but for the state's shapes. `sharable`: parts of the state that are
// left as they are where each of them is one sample for all.
struct SequenceCall {
  SequenceLayout layout;
  SequenceParameters parameters;
  Tensors state;            // that of the memory, then reads, hidden and cell
  bool shares_state;        // its sharable parts are one for all samples
  const uint8_t* step_mask; // null: everything on
  double output_clip;

  bool idle() const { return layout.steps == 0 || layout.batch == 0; }
  size_t reads() const { return state.size() - 3; } // where the last three are in a state
  size_t hidden() const { return state.size() - 2; }
  size_t cell() const { return state.size() - 1; }
  int64_t weight_numbers() const {
    return layout.controller.products() * layout.top() + layout.controller.hidden * layout.interface;
  }
};

inline SequenceCall sequence_call(const SequenceLayout& l, int64_t input_size, int64_t output_size, double output_clip,
                                  const Tensor& inputs, const Tensors& parameters, const Tensors& state,
                                  const std::optional<Tensor>& step_mask, std::initializer_list<size_t> sharable = {}) {
  SequenceCall call{.layout = l,
                    .parameters = parameters_of(parameters, l, input_size, output_size),
                    .state = state,
                    .shares_state = false,
                    .step_mask = step_mask ? data<uint8_t>(*step_mask) : nullptr,
                    .output_clip = output_clip};
  require(inputs, call.parameters.weight_ih, {l.steps, l.batch, input_size}, "inputs");
  require_step_mask(step_mask, l);
  call.shares_state = sharable.size() > 0 &&
                      std::all_of(sharable.begin(), sharable.end(), [&](size_t i) { return is_one_for_all(state[i]); });
  for (size_t i = 0; i < state.size(); ++i)
    if (!call.shares_state || std::find(sharable.begin(), sharable.end(), i) == sharable.end())
      call.state[i] = dense(state[i]);
  return call;
}

// The last three of a state.
inline void require_top(const SequenceCall& call, const Tensor& like, int64_t read_heads, int64_t word) {
  const int64_t batch = call.layout.batch, size = call.layout.controller.cell();
  require(call.state[call.reads()], like, {batch, read_heads, word}, "reads");
  require(call.state[call.hidden()], like, {batch, size}, "hidden");
  require(call.state[call.cell()], like, {batch, size}, "cell");
}

// Uninitialised, with the sizes of the state.
inline Tensors state_like(const SequenceCall& call) {
  Tensors made;
  for (const Tensor& tensor : call.state) made.push_back(empty_large(tensor));
  return made;
}

// The parts of the final state that lie in the last row, those of the memory in the order of `in_row`, and in the last
// top. Of no steps: the whole state.
template <class T>
void give_state(const SequenceCall& call, const Tensor& rows, const Tensor& tops, std::initializer_list<size_t> in_row,
                Tensors& made) {
  const SequenceLayout& l = call.layout;
  if (l.steps == 0) {
    for (size_t i = 0; i < made.size(); ++i) torch::stable::copy_(made[i], call.state[i]);
    return;
  }
  const T* row = data<T>(rows) + (l.steps - 1) % rows.size(0) * l.batch * l.row();
  const T* top = data<T>(tops) + l.steps * l.batch * l.top();
  for (int64_t b = 0; b < l.batch; ++b, row += l.row(), top += l.top()) {
    const auto give = [&](size_t field, const T* from) {
      const int64_t count = made[field].numel() / l.batch;
      std::copy_n(from, count, mutable_data<T>(made[field]) + b * count);
      return from + count;
    };
    const T* next = row + l.memory_at();
    for (const size_t field : in_row) next = give(field, next);
    give(call.reads(), top + l.controller.hidden);
    give(call.hidden(), top);
    give(call.cell(), row + l.cell_at());
  }
}

// What the memory of a network needs for a group of samples.
struct MemoryRoom {
  int64_t scratch, pointers;
};

template <class T>
SequenceGroup<T> group_of(const SequenceCall& call, const Tensor& rows, const Tensor& tops, int64_t first,
                          int64_t count, Interruption& interruption) {
  return {.layout = call.layout,
          .first = first,
          .count = count,
          .step_mask = call.step_mask,
          .rows = mutable_data<T>(rows),
          .row_steps = rows.size(0),
          .tops = mutable_data<T>(tops),
          .cell = data<T>(call.state[call.cell()]),
          .norm_weight = data<T>(call.parameters.norm_weight),
          .norm_bias = data<T>(call.parameters.norm_bias),
          .interrupt = {&Interruption::requested, &interruption}};
}

// All steps; the outputs. `state_numbers`: how much of a sample's state a step goes through; room(count): for so many
// samples; run(forward, scratch, pointers): a group through all steps.
template <class T, class Room, class Run>
Tensor run_groups(const SequenceCall& call, const Tensor& inputs, const Tensor& rows, const Tensor& tops,
                  int64_t state_numbers, const Room& room, const Run& run) {
  const SequenceLayout& l = call.layout;
  const SequenceParameters& p = call.parameters;
  first_tops<T>(mutable_data<T>(tops), l, call.state[call.hidden()], call.state[call.reads()]);
  if (call.idle()) return empty(inputs, {l.steps, l.batch, p.output_size});
  const Tensor driven = product_of(flat(inputs), transposed(part(p.weight_ih, 1, 0, p.input_size)));
  const Tensor recurrent = packed_recurrent<T>(p, l, false);
  const Tensor interface = packed_interface<T>(p, l, false);
  const Workspace<T> bias = summed_bias<T>(p);
  const int64_t element = int64_t(sizeof(T));
  const Grouping groups = grouping(l, call.weight_numbers() * element, state_numbers * element);
  const MemoryRoom needed = room(groups.size);
  const int64_t own = control_scratch(l.controller), size = own + needed.scratch;
  const Workspace<T> scratch(groups.workers * size);
  std::vector<const T*> pointers(size_t(groups.workers * needed.pointers));
  for_each_group(l, groups, [&](int64_t first, int64_t count, int64_t worker, Interruption& interruption) {
    T* const space = scratch.data() + worker * size;
    const SequenceForward<T> forward{.group = group_of<T>(call, rows, tops, first, count, interruption),
                                     .driven = data<T>(driven),
                                     .recurrent = data<T>(recurrent),
                                     .interface_weights = data<T>(interface),
                                     .bias = bias.data(),
                                     .interface_bias = data<T>(p.interface_bias),
                                     .scratch = space};
    run(forward, space + own, pointers.data() + worker * needed.pointers);
  });
  return outputs_of<T>(p, l, tops, call.step_mask, call.output_clip);
}

// Checks what only a backward is given, and makes `tape`, whose first two are tops and rows, and `grad_state` dense.
inline void require_upstream(const SequenceCall& call, const Tensor& inputs, Tensors& tape, size_t tape_size,
                             std::optional<Tensor>& grad_outputs, std::vector<std::optional<Tensor>>& grad_state,
                             size_t parameters, const std::vector<bool>& output_mask) {
  const SequenceLayout& l = call.layout;
  const size_t states = call.state.size();
  STD_TORCH_CHECK(tape.size() == tape_size, "tape: expected ", tape_size, " tensors, got ", tape.size());
  STD_TORCH_CHECK(grad_state.size() == states, "grad_state: expected ", states, " entries, got ", grad_state.size());
  STD_TORCH_CHECK(output_mask.size() == 1 + parameters + states, "output_mask: wrong number of entries");
  for (Tensor& tensor : tape) tensor = dense(tensor);
  require(tape[0], inputs, {l.steps + 1, l.batch, l.top()}, "tape");
  require(tape[1], inputs, {l.steps, l.batch, l.row()}, "tape");
  require(grad_outputs, inputs, {l.steps, l.batch, call.parameters.output_size}, "grad_outputs");
  grad_outputs = contiguous(grad_outputs);
  for (size_t i = 0; i < states; ++i)
    if (grad_state[i]) {
      STD_TORCH_CHECK(grad_state[i]->numel() == call.state[i].numel() && grad_state[i]->dim() == call.state[i].dim() &&
                          grad_state[i]->scalar_type() == inputs.scalar_type(),
                      "grad_state: wrong shape or dtype for the C++ kernel");
      grad_state[i] = contiguous(grad_state[i]);
    }
}

// The gradient of a part of the state before the steps go back through it: what comes from the final state.
inline void start_gradient(Tensor& made, const std::optional<Tensor>& upstream) {
  if (upstream) torch::stable::copy_(made, *upstream);
  else torch::stable::zero_(made);
}

// All steps back; the gradients of inputs and parameters, those unwanted of size 0. `made`: the gradients of the state,
// started where the steps do not fill them. The rest is as for the way forward.
template <class T, class Room, class Run>
Tensors run_groups_back(const SequenceCall& call, const Tensor& inputs, const Tensors& tape,
                        const std::optional<Tensor>& grad_outputs, const Tensors& made,
                        const std::vector<bool>& output_mask, int64_t state_numbers, const Room& room, const Run& run) {
  const SequenceLayout& l = call.layout;
  const SequenceParameters& p = call.parameters;
  const Tensor &tops = tape[0], &rows = tape[1];
  const int64_t numbers = call.idle() ? 0 : l.steps * l.batch;
  const Tensor grad_products = empty_large(inputs, {numbers, l.controller.products()});
  const Tensor grad_interface = empty_large(inputs, {numbers, l.interface});
  const Tensor upstream = grad_outputs
                              ? grad_before_clip<T>(p, l, tops, call.step_mask, call.output_clip, *grad_outputs)
                              : zeros(inputs, {l.steps * l.batch, p.output_size});
  const Tensor grad_tops = product_of(upstream, p.output_weight);
  const Tensor grad_norms = zeros(inputs, {l.batch, 2, l.controller.norms()});
  if (!call.idle()) {
    const Tensor recurrent = packed_recurrent<T>(p, l, true);
    const Tensor interface = packed_interface<T>(p, l, true);
    const Tensor carried = empty(inputs, {l.batch, l.top()});
    first_tops<T>(mutable_data<T>(carried), l, made[call.hidden()], made[call.reads()]);
    const int64_t element = int64_t(sizeof(T));
    const Grouping groups = grouping(l, call.weight_numbers() * element, state_numbers * element);
    const MemoryRoom needed = room(groups.size);
    const int64_t own = sequence_scratch(l, groups.size), size = own + needed.scratch;
    const Tensor scratch = empty_large(inputs, {groups.workers * size});
    std::vector<const T*> pointers(size_t(groups.workers * needed.pointers));
    for_each_group(l, groups, [&](int64_t first, int64_t count, int64_t worker, Interruption& interruption) {
      T* const space = mutable_data<T>(scratch) + worker * size;
      const SequenceBackward<T> backward{.group = group_of<T>(call, rows, tops, first, count, interruption),
                                         .grad_tops = data<T>(grad_tops),
                                         .recurrent = data<T>(recurrent),
                                         .interface_weights = data<T>(interface),
                                         .carried = mutable_data<T>(carried),
                                         .grad_cell = mutable_data<T>(made[call.cell()]),
                                         .grad_products = mutable_data<T>(grad_products),
                                         .grad_interface = mutable_data<T>(grad_interface),
                                         .grad_norms = mutable_data<T>(grad_norms),
                                         .scratch = space};
      run(backward, space + own, pointers.data() + worker * needed.pointers);
    });
    for (int64_t b = 0; b < l.batch; ++b) {
      const T* const top = data<T>(carried) + b * l.top();
      const int64_t cell = l.controller.cell();
      std::copy_n(top, cell, mutable_data<T>(made[call.hidden()]) + b * cell);
      std::copy_n(top + l.controller.hidden, l.reads, mutable_data<T>(made[call.reads()]) + b * l.reads);
    }
  }
  Tensors results;
  parameter_gradients<T>(p, l, call.step_mask, inputs, tops, upstream, grad_products, grad_interface, grad_norms,
                         output_mask, results);
  return results;
}

} // namespace fastmem

#define FASTMEM_SEQUENCE \
  "Tensor inputs, Tensor[] parameters, Tensor[] state, Tensor? step_mask, int[] shape, str[] options, float[] " \
  "constants"
#define FASTMEM_SEQUENCE_SCHEMA(stem) stem "(" FASTMEM_SEQUENCE ", bool save_tape) -> Tensor[]"
#define FASTMEM_SEQUENCE_BACKWARD_SCHEMA(stem) \
  stem "_backward(Tensor? grad_outputs, Tensor?[] grad_state, Tensor[] tape, " FASTMEM_SEQUENCE \
       ", bool[] output_mask) -> Tensor[]"
