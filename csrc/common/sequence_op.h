// What the ops on whole sequences share outside the time loop: parameters, the matrix products before and after it, and
// groups of samples. See fastmem/ops for the arguments.
#pragma once

#include "groups.h"
#include "interrupt.h"
#include "parallel.h"
#include "pool.h"
#include "sequence.h"
#include "tensor.h"
#include "workspace.h"

#include <array>
#include <cmath>
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
  STD_TORCH_CHECK(list.size() == own + 4, "parameters: expected ", own + 4, " tensors");
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

// From what a controller sees of its memory and itself to its products: [products, H+RW], feed-forward [products, RW].
inline Tensor recurrent_weights(const SequenceParameters& p, const SequenceLayout& l) {
  const int64_t hidden = p.weight_hh ? l.controller.hidden : 0;
  Tensor made = empty_large(p.weight_ih, {l.controller.products(), hidden + l.reads});
  Tensor reads = part(made, 1, hidden, l.reads);
  torch::stable::copy_(reads, part(p.weight_ih, 1, p.input_size, l.reads));
  if (p.weight_hh) {
    Tensor own = part(made, 1, 0, hidden);
    torch::stable::copy_(own, *p.weight_hh);
  }
  return made;
}

// A product into memory that is kept for the next call.
inline Tensor product_of(const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  const Tensor out = empty_large(a, {a.size(0), b.size(1)});
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Packed weights of [outputs, inputs], or the other way round for the gradient.
template <class T> Tensor packed(const Tensor& weights, bool backward) {
  const int64_t rows = weights.size(0), columns = weights.size(1);
  const int64_t inputs = backward ? rows : columns, outputs = backward ? columns : rows;
  const Tensor made = empty_large(weights, {packed_size(inputs, outputs)});
  const Packing<T> packing{.inputs = inputs,
                           .outputs = outputs,
                           .input_stride = backward ? columns : 1,
                           .output_stride = backward ? 1 : columns,
                           .weights = data<T>(weights),
                           .packed = mutable_data<T>(made)};
  FASTMEM_ON_ISA(pack(packing));
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
  if (std::isinf(bound)) {
    for_each_output(l, step_mask, mutable_data<T>(made), p.output_size, [](int64_t, int64_t, T&) {});
    return made;
  }
  const Tensor product = product_of(flat(part(tops, 0, 1, l.steps)), transposed(p.output_weight));
  const T *const before = data<T>(product), *const bias = data<T>(p.output_bias);
  for_each_output(l, step_mask, mutable_data<T>(made), p.output_size, [&](int64_t i, int64_t k, T& grad) {
    const T y = before[i] + bias[k];
    if (y > bound || y < -bound) grad = 0;
  });
  return made;
}

// Gradients of the parameters by products over all steps, in the order of the op's list; unwanted: size 0.
inline void parameter_gradients(const SequenceParameters& p, const SequenceLayout& l, const Tensor& inputs,
                                const Tensor& tops, const Tensor& grad_outputs, const Tensor& grad_products,
                                const Tensor& grad_interface, const Tensor& grad_norms, const std::vector<bool>& wants,
                                Tensors& made) {
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
    const Tensor weight = empty(inputs, {products, p.input_size + l.reads});
    Tensor by_input = part(weight, 1, 0, p.input_size), by_reads = part(weight, 1, p.input_size, l.reads);
    torch::stable::copy_(by_input, product_of(along, flat(inputs)));
    torch::stable::copy_(by_reads, product_of(along, part(before, 1, hidden, l.reads)));
    return weight;
  });
  if (p.weight_hh) give([&] { return product_of(along, part(before, 1, 0, hidden)); });
  if (p.bias_ih) give([&] { return total(grad_products); });
  if (p.bias_hh) give([&] { return total(grad_products); });
  if (p.norm_weight) {
    for (int64_t which = 0; which < 2; ++which)
      give([&] { return torch::stable::clone(torch::stable::select(grad_norms, 0, which)); });
  }
  give([&] { return product_of(transposed(grad_interface), part(after, 1, 0, hidden)); });
  give([&] { return total(grad_interface); });
  give([&] { return product_of(transposed(grad_outputs), after); });
  give([&] { return total(grad_outputs); });
}

// body(first, count, worker): groups of samples, each worker with a run of them in its own thread. `state_bytes` of a
// sample and `weight_bytes` are what a step goes through.
template <class Body> void for_each_group(const SequenceLayout& l, int64_t workers, int64_t group, const Body& body) {
  for_each_sample_in_shares(workers, workers, [&](int64_t worker, int64_t) {
    const int64_t begin = l.batch * worker / workers, end = l.batch * (worker + 1) / workers, samples = end - begin;
    const int64_t groups = (samples + group - 1) / group;
    for (int64_t k = 0; k < groups; ++k) {
      const int64_t first = begin + samples * k / groups;
      body(first, begin + samples * (k + 1) / groups - first, worker);
    }
  });
}

struct Grouping {
  int64_t workers, size; // threads; most samples of a group
};

inline Grouping grouping(const SequenceLayout& l, int64_t weight_bytes, int64_t state_bytes) {
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), l.batch);
  const int64_t samples = (l.batch + workers - 1) / workers, forced = forced_group_size();
  return {workers,
          forced > 0 ? std::min(forced, samples) : group_size(samples, weight_bytes, state_bytes, cache_bytes())};
}

inline void throw_if_interrupted(const Interruption& interruption) {
  STD_TORCH_CHECK(!interruption.seen(), "interrupted");
}

} // namespace fastmem
