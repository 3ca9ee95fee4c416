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

// The steps of a mask in which any sample writes or reads; without one, all.
inline std::vector<int64_t> access_steps_of(const Tensor& inputs, const std::optional<Tensor>& step_mask) {
  const int64_t steps = inputs.size(0), batch = inputs.size(1);
  if (step_mask) {
    require(*step_mask, *step_mask, {steps, batch}, "step_mask");
    STD_TORCH_CHECK(step_mask->scalar_type() == ScalarType::Byte, "step_mask: wrong dtype for the C++ kernel");
  }
  const uint8_t* const bits = step_mask ? data<uint8_t>(*step_mask) : nullptr;
  const auto acts = [](uint8_t b) { return b & (kWrites | kReads); };
  std::vector<int64_t> found;
  for (int64_t t = 0; t < steps; ++t)
    if (!step_mask || std::any_of(bits + t * batch, bits + (t + 1) * batch, acts)) found.push_back(t);
  return found;
}

// What a layout points to.
struct SequenceTables {
  std::vector<int64_t> access_steps;
  int64_t spacing, room;         // room: of the tape, in accesses
  int64_t programs = 0, key = 0; // P, K
  std::vector<int64_t> widths;   // of each head's part of the interface vector
  std::vector<ProgramRun> runs;  // of the interface vector

  // `shape` has, after `sizes` numbers of the network, spacing, accesses (-1: as many as there are steps), and of
  // programs P, K and (head, width) of each run of the interface vector.
  SequenceTables(const Tensor& inputs, const std::optional<Tensor>& step_mask, const std::vector<int64_t>& shape,
                 size_t sizes) {
    STD_TORCH_CHECK(shape.size() == sizes + 2 || (shape.size() >= sizes + 6 && shape.size() % 2 == sizes % 2),
                    "shape: wrong number of sizes");
    STD_TORCH_CHECK(inputs.dim() == 3, "inputs: wrong number of dimensions");
    for (size_t i = 0; i < shape.size(); ++i)
      STD_TORCH_CHECK(shape[i] >= (i == sizes + 1 ? -1 : 0) && (i == sizes || shape[i] <= kLargest),
                      "shape: a size out of range");
    access_steps = access_steps_of(inputs, step_mask);
    const int64_t accesses = shape[sizes + 1];
    room = accesses < 0 ? inputs.size(0) : accesses;
    STD_TORCH_CHECK(int64_t(access_steps.size()) <= room, "accesses: more steps of step_mask write or read");
    STD_TORCH_CHECK(shape[sizes] > 0, "shape: no spacing");
    spacing = std::min(shape[sizes], std::max<int64_t>(1, room)); // further apart, nothing is kept all the same
    if (shape.size() == sizes + 2) return;
    programs = shape[sizes + 2];
    key = shape[sizes + 3];
    STD_TORCH_CHECK(programs > 0 && key > 0, "shape: programs without a number or keys");
    lay_out_runs(shape.data() + sizes + 4, (shape.size() - sizes - 4) / 2);
  }

  // Of a network without programs: none.
  ProgramLayout program_layout(int64_t hidden, int64_t interface, const std::vector<std::string>& options) const {
    const ProgramLayout l{.count = programs,
                          .key = key,
                          .heads = int64_t(widths.size()),
                          .hidden = hidden,
                          .size = interface,
                          .widths = widths.data(),
                          .runs = runs.data(),
                          .run_count = int64_t(runs.size()),
                          .direct_attention = contains(options, "direct_attention"),
                          .tanh_keys = contains(options, "tanh_keys")};
    int64_t size = 0;
    for (const int64_t width : widths) size += width;
    STD_TORCH_CHECK(!programs || size == interface, "shape: runs of another interface vector");
    STD_TORCH_CHECK(!l.direct_attention || key == programs, "shape: direct attention with another number of keys");
    return l;
  }

private:
  static constexpr int64_t kLargest = int64_t{1} << 30; // products of two sizes stay numbers

  void lay_out_runs(const int64_t* numbers, size_t count) {
    for (size_t i = 0; i < count; ++i) {
      const size_t head = size_t(numbers[2 * i]);
      STD_TORCH_CHECK(head < count, "shape: a run of a head too high");
      if (head >= widths.size()) widths.resize(head + 1);
      widths[head] += numbers[2 * i + 1];
    }
    std::vector<int64_t> next{0};
    for (const int64_t width : widths) next.push_back(next.back() + width);
    for (size_t i = 0; i < count; ++i) {
      int64_t& column = next[size_t(numbers[2 * i])];
      runs.push_back({column, numbers[2 * i + 1]});
      column += numbers[2 * i + 1];
    }
  }
};

struct SequenceParameters {
  int64_t input_size, output_size;
  ControllerLayout controller;
  Tensor weight_ih;                // [products, X+RW]
  std::optional<Tensor> weight_hh; // [products, H] of a recurrent one
  std::optional<Tensor> bias_ih, bias_hh, norm_weight, norm_bias;
  std::optional<Tensor> meta_weight, meta_bias, program_keys; // [M,H] [M] [n,P,K] of programs
  Tensor interface_weight, interface_bias;                    // [S,H] [S]; of programs [P,H,S] [P,S]
  std::optional<Tensor> output_weight, output_bias;           // [Y,H+RW] [Y]; none where the tops are the outputs
};

// In the order of the op's list, checked.
inline SequenceParameters parameters_of(const Tensors& list, const SequenceLayout& l, int64_t input_size,
                                        int64_t output_size, bool projected) {
  const bool recurrent = l.controller.recurrent(), normalised = l.controller.normalised();
  const size_t own = recurrent ? 4 : 2, of_interface = l.programs.count ? 5 : 2;
  const size_t count = own + of_interface + (projected ? 2 : 0);
  STD_TORCH_CHECK(list.size() == count, "parameters: expected ", count, " tensors, got ", list.size());
  size_t next = 0;
  const auto taken = [&] { return dense(list[next++]); };
  const auto taken_if = [&](bool there) { return there ? std::optional<Tensor>(taken()) : std::nullopt; };
  SequenceParameters p{.input_size = input_size,
                       .output_size = projected ? output_size : l.top(),
                       .controller = l.controller,
                       .weight_ih = taken(),
                       .weight_hh = taken_if(recurrent),
                       .bias_ih = taken_if(!normalised),
                       .bias_hh = taken_if(recurrent && !normalised),
                       .norm_weight = taken_if(normalised),
                       .norm_bias = taken_if(normalised),
                       .meta_weight = taken_if(l.programs.count > 0),
                       .meta_bias = taken_if(l.programs.count > 0),
                       .program_keys = taken_if(l.programs.count > 0),
                       .interface_weight = taken(),
                       .interface_bias = taken(),
                       .output_weight = taken_if(projected),
                       .output_bias = taken_if(projected)};
  const int64_t products = l.controller.products(), hidden = l.controller.hidden;
  const ProgramLayout& programs = l.programs;
  const Tensor& like = p.weight_ih;
  require(p.weight_ih, like, {products, input_size + l.reads}, "weight_ih");
  require(p.weight_hh, like, {products, hidden}, "weight_hh");
  require(p.bias_ih, like, {products}, "bias_ih");
  require(p.bias_hh, like, {products}, "bias_hh");
  require(p.norm_weight, like, {kNorms, hidden}, "norm_weight");
  require(p.norm_bias, like, {kNorms, hidden}, "norm_bias");
  if (programs.count) {
    const int64_t keys = programs.direct_attention ? 0 : programs.count;
    require(p.meta_weight, like, {programs.meta(), hidden}, "meta_weight");
    require(p.meta_bias, like, {programs.meta()}, "meta_bias");
    require(p.program_keys, like, {programs.heads, keys, programs.key}, "program_keys");
    require(p.interface_weight, like, {programs.count, hidden, l.interface}, "program_weights");
    require(p.interface_bias, like, {programs.count, l.interface}, "program_biases");
  } else {
    require(p.interface_weight, like, {l.interface, hidden}, "interface_weight");
    require(p.interface_bias, like, {l.interface}, "interface_bias");
  }
  require(p.output_weight, like, {output_size, l.top()}, "output_weight");
  require(p.output_bias, like, {output_size}, "output_bias");
  return p;
}

// A [T,B,.] tensor as [TB,.].
inline Tensor flat(const Tensor& tensor) {
  return torch::stable::view(tensor, {tensor.size(0) * tensor.size(1), tensor.size(2)});
}

inline Tensor part(Tensor tensor, int64_t dim, int64_t start, int64_t length) {
  return torch::stable::narrow(tensor, dim, start, length);
}

inline Tensor selected(Tensor tensor, int64_t index) { return torch::stable::select(tensor, 0, index); }

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

// From the controller to its interface, or through a matrix on the way back.
template <class T> Tensor packed_linear(const Tensor& weight, bool backward) {
  return packed<T>({{weight, 0, weight.size(1)}}, backward);
}

// From the controller to what every program makes of it; on the way back head by head, from its part to what each
// program passes on.
template <class T> Tensor packed_programs(const SequenceParameters& p, const ProgramLayout& l, bool backward) {
  const Tensor made =
      empty_large(p.weight_ih, {backward ? packed_programs_size(l) : packed_size(l.hidden, l.count * l.size)});
  T* to = mutable_data<T>(made);
  const T* const weights = data<T>(p.interface_weight);
  if (!backward) {
    for (int64_t program = 0; program < l.count; ++program) {
      const Packing<T> packing{.inputs = l.hidden,
                               .outputs = l.size,
                               .input_stride = l.size,
                               .output_stride = 1,
                               .weights = weights + program * l.hidden * l.size,
                               .all_inputs = l.hidden,
                               .first_input = 0,
                               .first_output = program * l.size,
                               .packed = to};
      FASTMEM_ON_ISA(pack(packing));
    }
    return made;
  }
  int64_t column = 0;
  for (int64_t head = 0; head < l.heads; column += l.widths[head++]) {
    const Packing<T> packing{.inputs = l.widths[head],
                             .outputs = l.count * l.hidden,
                             .input_stride = 1,
                             .output_stride = l.size,
                             .weights = weights + column,
                             .all_inputs = l.widths[head],
                             .first_input = 0,
                             .first_output = 0,
                             .packed = to};
    FASTMEM_ON_ISA(pack(packing));
    to += packed_size(l.widths[head], l.count * l.hidden);
  }
  return made;
}

template <class T> Tensor packed_interface(const SequenceParameters& p, const SequenceLayout& l, bool backward) {
  return l.programs.count ? packed_programs<T>(p, l.programs, backward)
                          : packed_linear<T>(p.interface_weight, backward);
}

// As they are compared.
template <class T> Tensor squashed_keys(const SequenceParameters& p, const ProgramLayout& l) {
  if (!l.count || !l.tanh_keys) return p.program_keys ? *p.program_keys : nothing(p.weight_ih);
  const Tensor made = torch::stable::clone(*p.program_keys);
  T* const keys = mutable_data<T>(made);
  for (int64_t i = 0; i < made.numel(); ++i) keys[i] = std::tanh(keys[i]);
  return made;
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

// Zeros in the rows [T,B,size] of samples whose controller rests.
template <class T> void clear_resting(const SequenceLayout& l, const uint8_t* step_mask, T* rows, int64_t size) {
  for (int64_t i = 0; step_mask && i < l.steps * l.batch; ++i)
    if (!(step_mask[i] & kControls)) std::fill_n(rows + i * size, size, T(0));
}

// y = W (controller, reads) + b within +-clip, or controller and reads themselves; 0 where the controller rests.
template <class T>
Tensor outputs_of(const SequenceParameters& p, const SequenceLayout& l, const Tensor& tops, const uint8_t* step_mask,
                  double clip) {
  if (!p.output_weight) {
    Tensor copied = empty_large(tops, {l.steps, l.batch, l.top()});
    torch::stable::copy_(copied, part(tops, 0, 1, l.steps));
    clear_resting(l, step_mask, mutable_data<T>(copied), l.top());
    return copied;
  }
  const Tensor product = product_of(flat(part(tops, 0, 1, l.steps)), transposed(*p.output_weight));
  const T bound = T(clip);
  const T* const bias = data<T>(p.output_bias);
  T* const outputs = mutable_data<T>(product);
  for (int64_t i = 0; i < l.steps * l.batch; ++i)
    for (int64_t k = 0; k < p.output_size; ++k) {
      T& y = outputs[i * p.output_size + k];
      y += bias[k];
      y = y > bound ? bound : y < -bound ? -bound : y;
    }
  clear_resting(l, step_mask, outputs, p.output_size);
  return torch::stable::view(product, {l.steps, l.batch, p.output_size});
}

// The gradient before the clip [TB,Y].
template <class T>
Tensor grad_before_clip(const SequenceParameters& p, const SequenceLayout& l, const Tensor& tops,
                        const uint8_t* step_mask, double clip, const Tensor& grad_outputs) {
  const Tensor made = torch::stable::clone(flat(grad_outputs));
  const T bound = T(clip);
  const bool clips = p.output_weight && !std::isinf(bound);
  const Tensor product =
      clips ? product_of(flat(part(tops, 0, 1, l.steps)), transposed(*p.output_weight)) : nothing(made);
  const T *const before = data<T>(product), *const bias = data<T>(p.output_bias);
  T* const grads = mutable_data<T>(made);
  for (int64_t i = 0; i < l.steps * l.batch; ++i)
    for (int64_t k = 0; k < p.output_size; ++k) {
      const int64_t at = i * p.output_size + k;
      const T y = clips ? before[at] + bias[k] : T(0);
      // Subnormal numbers count as zero; the threads of a matrix product would see them.
      if (y > bound || y < -bound || std::abs(grads[at]) < std::numeric_limits<T>::min()) grads[at] = 0;
    }
  clear_resting(l, step_mask, grads, p.output_size);
  return made;
}

// Inputs with 0 where the controller rests: what is there may be NaN, which a product with a gradient of 0 would
// spread.
template <class T> Tensor seen_inputs(const SequenceLayout& l, const uint8_t* step_mask, const Tensor& inputs) {
  if (!step_mask) return inputs;
  Tensor made = empty_large(inputs);
  torch::stable::copy_(made, inputs);
  clear_resting(l, step_mask, mutable_data<T>(made), inputs.size(2));
  return made;
}

// Rows [B,width] of a [T,B,.] tensor, from `column` on, one after the other: those of the steps `at`.
template <class T>
Tensor gathered(const Tensor& tensor, const std::vector<int64_t>& at, int64_t column, int64_t width) {
  const int64_t batch = tensor.size(1), row = tensor.size(2);
  const Tensor made = empty_large(tensor, {int64_t(at.size()) * batch, width});
  T* to = mutable_data<T>(made);
  for (const int64_t t : at)
    for (int64_t b = 0; b < batch; ++b, to += width)
      std::copy_n(data<T>(tensor) + (t * batch + b) * row + column, width, to);
  return made;
}

// Gradients of what the controllers and interfaces of all steps were given, in the order of the group's fields.
struct SequenceGradients {
  Tensor products;      // [TB,.]
  Tensor runs;          // [runs,B,.]; the products, where a run is a step
  Tensor interface;     // [accesses B,.]
  Tensor meta;          // [accesses B,.]
  Tensor norms;         // [B,2,.]
  Tensor keys;          // [B,.], of the squashed keys
  Tensor outputs, tops; // [TB,.]: before the clip; through the output layer
};

// Gradients of programs [P,H,S] and of their biases [P,S].
template <class T>
std::array<Tensor, 2> program_gradients(const ProgramLayout& l, const Tensor& rows, int64_t attention_at,
                                        const Tensor& controllers, const Tensor& grad_interface) {
  const int64_t count = grad_interface.size(0), row = rows.size(2);
  const Tensor weights = empty_large(rows, {l.count, l.hidden, l.size}), biases = zeros(rows, {l.count, l.size});
  const Tensor columns = empty_large(rows, {count, l.size}), scaled = empty_large(rows, {count, l.size});
  const T *from = data<T>(grad_interface), *const kept = data<T>(rows) + attention_at;
  for (int64_t k = 0; k < count; ++k)
    for (int64_t i = 0; i < l.run_count; from += l.runs[i++].width)
      std::copy_n(from, l.runs[i].width, mutable_data<T>(columns) + k * l.size + l.runs[i].column);
  for (int64_t p = 0; p < l.count; ++p) {
    T* const bias = mutable_data<T>(biases) + p * l.size;
    for (int64_t k = 0; k < count; ++k) {
      const T* const grad = data<T>(columns) + k * l.size;
      T* const to = mutable_data<T>(scaled) + k * l.size;
      int64_t column = 0;
      for (int64_t head = 0; head < l.heads; ++head) {
        const T share = kept[k * row + head * l.count + p];
        for (const int64_t end = column + l.widths[head]; column < end; ++column) {
          to[column] = share * grad[column];
          bias[column] += to[column];
        }
      }
    }
    product_into(selected(weights, p), transposed(controllers), scaled);
  }
  return {weights, biases};
}

// Gradients of inputs and parameters by products over all steps, in the order of the op's arguments; unwanted: size 0.
template <class T>
void parameter_gradients(const SequenceParameters& p, const SequenceLayout& l, const SequenceTables& tables,
                         const uint8_t* step_mask, const Tensor& inputs, const Tensor& tops, const Tensor& rows,
                         const Tensor& squashed, const SequenceGradients& grads, const std::vector<bool>& wants,
                         Tensors& made) {
  const int64_t hidden = l.controller.hidden, products = l.controller.products();
  const bool all_access = l.accesses == l.steps;
  const auto wanted = [&] { return bool(wants[made.size()]); };
  const auto give = [&](const auto& gradient) { made.push_back(wanted() ? gradient() : nothing(inputs)); };
  const auto total = [](const Tensor& tensor) {
    const int64_t dim[] = {0};
    return torch::stable::sum(tensor, torch::headeronly::IntHeaderOnlyArrayRef(dim, 1));
  };
  const Tensor along = transposed(grads.products), before = flat(part(tops, 0, 0, l.steps)),
               after = flat(part(tops, 0, 1, l.steps));
  // What runs of steps saw of the memory, and what the controller said at the accesses.
  const auto seen_reads = [&] {
    if (grads.runs.size(0) == l.steps) return part(before, 1, hidden, l.reads);
    std::vector<int64_t> begins{0};
    for (const int64_t t : tables.access_steps) begins.push_back(t + 1);
    begins.resize(size_t(grads.runs.size(0)));
    return gathered<T>(tops, begins, hidden, l.reads);
  };
  const auto told = [&] {
    if (all_access) return part(after, 1, 0, hidden);
    std::vector<int64_t> ends;
    for (const int64_t t : tables.access_steps) ends.push_back(t + 1);
    return gathered<T>(tops, ends, 0, hidden);
  };
  give([&] {
    return torch::stable::view(product_of(grads.products, part(p.weight_ih, 1, 0, p.input_size)),
                               {l.steps, l.batch, p.input_size});
  });
  give([&] {
    const Tensor weight = empty_large(inputs, {products, p.input_size + l.reads});
    product_into(part(weight, 1, 0, p.input_size), along, flat(seen_inputs<T>(l, step_mask, inputs)));
    product_into(part(weight, 1, p.input_size, l.reads), transposed(flat(grads.runs)), seen_reads());
    return weight;
  });
  if (p.weight_hh) give([&] { return product_of(along, part(before, 1, 0, hidden)); });
  if (p.bias_ih) give([&] { return total(grads.products); });
  if (p.bias_hh) { // the gradient is the same
    const bool summed = wants[made.size() - 1];
    give([&] { return summed ? torch::stable::clone(made.back()) : total(grads.products); });
  }
  if (p.norm_weight) {
    for (int64_t which = 0; which < 2; ++which)
      give([&] { return torch::stable::view(total(torch::stable::select(grads.norms, 1, which)), {kNorms, hidden}); });
  }
  const ProgramLayout& programs = l.programs;
  if (!programs.count) {
    give([&] { return product_of(transposed(grads.interface), told()); });
    give([&] { return total(grads.interface); });
  } else {
    give([&] { return product_of(transposed(grads.meta), told()); });
    give([&] { return total(grads.meta); });
    give([&] {
      const Tensor keys =
          torch::stable::view(total(grads.keys), {programs.heads, programs.keys() ? programs.count : 0, programs.key});
      if (programs.tanh_keys)
        for (int64_t i = 0; i < keys.numel(); ++i) {
          const T key = data<T>(squashed)[i];
          mutable_data<T>(keys)[i] *= 1 - key * key;
        }
      return keys;
    });
    std::array<Tensor, 2> stored{nothing(inputs), nothing(inputs)};
    if (wants[made.size()] || wants[made.size() + 1])
      stored = program_gradients<T>(programs, rows, l.programs_at() + programs.meta(), told(), grads.interface);
    for (const Tensor& gradient : stored) give([&] { return gradient; });
  }
  if (!p.output_weight) return;
  give([&] { return product_of(transposed(grads.outputs), after); });
  give([&] { return total(grads.outputs); });
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
  const SequenceTables* tables;
  std::string program_norm;
  double program_eps;
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
    const int64_t programs = std::max<int64_t>(1, layout.programs.count);
    return layout.controller.products() * layout.top() + layout.controller.hidden * layout.interface * programs;
  }
  template <class T> Similarity<T> program_similarity() const {
    return layout.programs.count ? similarity<T>(program_norm, program_eps) : Similarity<T>{};
  }
};

// `options` begin with `words` words, then the norm of the programs; `constants` end with its eps.
inline SequenceCall sequence_call(const SequenceLayout& l, const SequenceTables& tables, int64_t input_size,
                                  int64_t output_size, double output_clip, const Tensor& inputs,
                                  const Tensors& parameters, const Tensors& state,
                                  const std::optional<Tensor>& step_mask, const std::vector<std::string>& options,
                                  size_t words, const std::vector<double>& constants,
                                  std::initializer_list<size_t> sharable = {}) {
  SequenceCall call{.layout = l,
                    .tables = &tables,
                    .program_norm = options[words],
                    .program_eps = constants.back(),
                    .parameters = parameters_of(parameters, l, input_size, output_size, contains(options, "projected")),
                    .state = state,
                    .shares_state = false,
                    .step_mask = step_mask ? data<uint8_t>(*step_mask) : nullptr,
                    .output_clip = output_clip};
  require(inputs, call.parameters.weight_ih, {l.steps, l.batch, input_size}, "inputs");
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

// What is written on the way forward, kept where there is a tape, else of the last two steps.
struct SequenceRows {
  Tensor tops, controls, rows;

  SequenceRows(const Tensor& like, const SequenceCall& call, bool save_tape)
      : tops(empty_large(like, {call.layout.steps + 1, call.layout.batch, call.layout.top()})),
        controls(empty_large(like, {save_tape ? call.layout.steps : std::min<int64_t>(call.layout.steps, 2),
                                    call.layout.batch, call.layout.control_row()})),
        rows(empty_large(like, {save_tape ? call.tables->room : std::min<int64_t>(call.layout.accesses, 2),
                                call.layout.batch, call.layout.row()})) {
    clear_rest(rows, call.layout.accesses);
  }

  // What there is room for beyond `used`.
  static void clear_rest(const Tensor& tensor, int64_t used) {
    if (tensor.size(0) <= used) return;
    Tensor rest = part(tensor, 0, used, tensor.size(0) - used);
    torch::stable::zero_(rest);
  }
};

// The parts of the final state that lie in the last rows, those of the memory in the order of `in_row`, and in the last
// top. Without an access the memory's part of the state is what it was.
template <class T>
void give_state(const SequenceCall& call, const SequenceRows& written, std::initializer_list<size_t> in_row,
                Tensors& made) {
  const SequenceLayout& l = call.layout;
  for (size_t i = 0; i < (l.steps == 0 ? made.size() : call.reads()); ++i)
    if (l.accesses == 0) torch::stable::copy_(made[i], call.state[i]);
  if (l.steps == 0) return;
  for (int64_t b = 0; b < l.batch; ++b) {
    const auto give = [&](size_t field, const T* from) {
      const int64_t count = made[field].numel() / l.batch;
      std::copy_n(from, count, mutable_data<T>(made[field]) + b * count);
      return from + count;
    };
    const auto last = [&](const Tensor& all, int64_t count) { // of a ring of rows
      return data<T>(all) + ((count - 1) % all.size(0) * l.batch + b) * all.size(2);
    };
    if (l.accesses > 0) {
      const T* next = last(written.rows, l.accesses) + l.memory_at();
      for (const size_t field : in_row) next = give(field, next);
    }
    const T* const top = last(written.tops, l.steps + 1);
    give(call.reads(), top + l.controller.hidden);
    give(call.hidden(), top);
    give(call.cell(), last(written.controls, l.steps) + l.cell_at());
  }
}

// Memories or links on the tape: how many there is room for.
inline int64_t room_for_kept(const SequenceCall& call) {
  const int64_t room = call.tables->room;
  return room > 0 ? (room - 1) / call.layout.spacing : 0;
}

// What the memory of a network needs for a group of samples.
struct MemoryRoom {
  int64_t scratch, pointers;
};

template <class T>
SequenceGroup<T> group_of(const SequenceCall& call, const Tensor& tops, const Tensor& controls, const Tensor& rows,
                          const Tensor& keys, const Similarity<T>& similarity, int64_t first, int64_t count,
                          Interruption& interruption) {
  return {.layout = call.layout,
          .first = first,
          .count = count,
          .step_mask = call.step_mask,
          .access_steps = call.tables->access_steps.data(),
          .controls = mutable_data<T>(controls),
          .control_steps = controls.size(0),
          .rows = mutable_data<T>(rows),
          .row_accesses = rows.size(0),
          .tops = mutable_data<T>(tops),
          .cell = data<T>(call.state[call.cell()]),
          .norm_weight = data<T>(call.parameters.norm_weight),
          .norm_bias = data<T>(call.parameters.norm_bias),
          .program_similarity = similarity,
          .program_keys = data<T>(keys),
          .interface_bias = data<T>(call.parameters.interface_bias),
          .interrupt = {&Interruption::requested, &interruption}};
}

// All steps; the outputs. `state_numbers`: how much of a sample's state a step goes through; room(count): for so many
// samples; run(forward, scratch, pointers): a group through all steps.
template <class T, class Room, class Run>
Tensor run_groups(const SequenceCall& call, const Tensor& inputs, const SequenceRows& made, int64_t state_numbers,
                  const Room& room, const Run& run) {
  const SequenceLayout& l = call.layout;
  const SequenceParameters& p = call.parameters;
  first_tops<T>(mutable_data<T>(made.tops), l, call.state[call.hidden()], call.state[call.reads()]);
  if (call.idle()) return empty(inputs, {l.steps, l.batch, p.output_size});
  const Tensor driven = product_of(flat(inputs), transposed(part(p.weight_ih, 1, 0, p.input_size)));
  const Tensor recurrent = packed_recurrent<T>(p, l, false), interface = packed_interface<T>(p, l, false);
  const Tensor meta = p.meta_weight ? packed_linear<T>(*p.meta_weight, false) : nothing(inputs);
  const Tensor keys = squashed_keys<T>(p, l.programs);
  const Similarity<T> similarity = call.program_similarity<T>();
  const Workspace<T> bias = summed_bias<T>(p);
  const int64_t element = int64_t(sizeof(T));
  const Grouping groups = grouping(l, call.weight_numbers() * element, state_numbers * element);
  const MemoryRoom needed = room(groups.size);
  const int64_t own = sequence_scratch(l, groups.size), size = own + needed.scratch;
  const Workspace<T> scratch(groups.workers * size);
  std::vector<const T*> pointers(size_t(groups.workers * needed.pointers));
  for_each_group(l, groups, [&](int64_t first, int64_t count, int64_t worker, Interruption& interruption) {
    T* const space = scratch.data() + worker * size;
    const SequenceForward<T> forward{
        .group = group_of<T>(call, made.tops, made.controls, made.rows, keys, similarity, first, count, interruption),
        .driven = data<T>(driven),
        .recurrent = data<T>(recurrent),
        .interface_weights = data<T>(interface),
        .meta = data<T>(meta),
        .bias = bias.data(),
        .meta_bias = data<T>(p.meta_bias),
        .scratch = space};
    run(forward, space + own, pointers.data() + worker * needed.pointers);
  });
  return outputs_of<T>(p, l, made.tops, call.step_mask, call.output_clip);
}

// Checks what only a backward is given, and makes `tape`, whose first three are tops, controls and rows, and
// `grad_state` dense.
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
  require(tape[1], inputs, {l.steps, l.batch, l.control_row()}, "tape");
  require(tape[2], inputs, {call.tables->room, l.batch, l.row()}, "tape");
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
  const Tensor &tops = tape[0], &controls = tape[1], &rows = tape[2];
  const int64_t steps = call.idle() ? 0 : l.steps, accesses = call.idle() ? 0 : l.accesses;
  const int64_t runs = call.idle() ? 0 : l.runs(call.tables->access_steps.data());
  const int64_t products = l.controller.products();
  const Tensor keys = squashed_keys<T>(p, l.programs);
  const Tensor upstream = grad_outputs
                              ? grad_before_clip<T>(p, l, tops, call.step_mask, call.output_clip, *grad_outputs)
                              : zeros(inputs, {l.steps * l.batch, p.output_size});
  const Tensor grad_products = empty_large(inputs, {steps * l.batch, products});
  const SequenceGradients grads{
      .products = grad_products,
      .runs = runs < steps ? empty_large(inputs, {runs, l.batch, products})
                           : torch::stable::view(grad_products, {steps, steps ? l.batch : 0, products}),
      .interface = empty_large(inputs, {accesses * l.batch, l.interface}),
      .meta = empty_large(inputs, {accesses * l.batch, l.programs.meta()}),
      .norms = zeros(inputs, {l.batch, 2, l.controller.norms()}),
      .keys = zeros(inputs, {l.batch, l.programs.keys()}),
      .outputs = upstream,
      .tops = p.output_weight ? product_of(upstream, *p.output_weight) : upstream};
  if (!call.idle()) {
    const Tensor recurrent = packed_recurrent<T>(p, l, true), interface = packed_interface<T>(p, l, true);
    const Tensor meta = p.meta_weight ? packed_linear<T>(*p.meta_weight, true) : nothing(inputs);
    const Similarity<T> similarity = call.program_similarity<T>();
    const Tensor carried = empty(inputs, {l.batch, l.top()});
    first_tops<T>(mutable_data<T>(carried), l, made[call.hidden()], made[call.reads()]);
    const int64_t element = int64_t(sizeof(T));
    const Grouping groups = grouping(l, call.weight_numbers() * element, state_numbers * element);
    const MemoryRoom needed = room(groups.size);
    const int64_t own = sequence_backward_scratch(l, groups.size), size = own + needed.scratch;
    const Tensor scratch = empty_large(inputs, {groups.workers * size});
    std::vector<const T*> pointers(size_t(groups.workers * needed.pointers));
    for_each_group(l, groups, [&](int64_t first, int64_t count, int64_t worker, Interruption& interruption) {
      T* const space = mutable_data<T>(scratch) + worker * size;
      const SequenceBackward<T> backward{
          .group = group_of<T>(call, tops, controls, rows, keys, similarity, first, count, interruption),
          .grad_tops = data<T>(grads.tops),
          .recurrent = data<T>(recurrent),
          .interface_weights = data<T>(interface),
          .meta = data<T>(meta),
          .carried = mutable_data<T>(carried),
          .grad_cell = mutable_data<T>(made[call.cell()]),
          .grad_products = mutable_data<T>(grads.products),
          .grad_runs = runs < steps ? mutable_data<T>(grads.runs) : nullptr,
          .grad_interface = mutable_data<T>(grads.interface),
          .grad_meta = mutable_data<T>(grads.meta),
          .grad_norms = mutable_data<T>(grads.norms),
          .grad_keys = mutable_data<T>(grads.keys),
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
  parameter_gradients<T>(p, l, *call.tables, call.step_mask, inputs, tops, rows, keys, grads, output_mask, results);
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
