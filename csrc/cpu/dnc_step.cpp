#include "dnc_step_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

#include <array>
#include <tuple>

namespace fastmem {
namespace {

// memory, usage, precedence, link, write weights, read weights
using State = std::array<Tensor, 6>;
using Gradients = std::array<std::optional<Tensor>, 6>;
constexpr const char* kStateNames[] = {"memory", "usage", "precedence", "link", "write_weights", "read_weights"};

struct Options {
  bool masked, deallocates, sharpened, oneplus, detach_usage_write;
  double mask_floor, clip;
  std::string norm;
  double eps, allocation_eps;

  template <class T> DncVariant<T> variant() const {
    return {masked,
            deallocates,
            sharpened,
            oneplus,
            detach_usage_write,
            T(mask_floor),
            T(clip),
            similarity<T>(norm, eps),
            allocation_eps};
  }
};

DncLayout check(const Tensor& interface, const State& state, const Options& options) {
  const auto& [memory, usage, precedence, link, write_weights, read_weights] = state;
  STD_TORCH_CHECK(memory.dim() == 3 && write_weights.dim() == 3 && read_weights.dim() == 3,
                  "wrong number of dimensions");
  const DncLayout l{.slots = memory.size(1),
                    .word = memory.size(2),
                    .read_heads = read_weights.size(1),
                    .write_heads = write_weights.size(1),
                    .masked = options.masked,
                    .sharpened = options.sharpened};
  const int64_t batch = memory.size(0);
  require(interface, memory, {batch, l.interface()}, "interface");
  require(memory, memory, {batch, l.slots, l.word}, "memory");
  require(usage, memory, {batch, l.slots}, "usage");
  require(precedence, memory, {batch, l.write_heads, l.slots}, "precedence");
  require(link, memory, {batch, l.write_heads, l.slots, l.slots}, "link");
  require(write_weights, memory, {batch, l.write_heads, l.slots}, "write_weights");
  require(read_weights, memory, {batch, l.read_heads, l.slots}, "read_weights");
  return l;
}

State dense(const State& state) {
  State made = state;
  for (Tensor& tensor : made) tensor = fastmem::dense(tensor);
  return made;
}

// Uninitialised, with the sizes of a state.
State state_like(const Tensor& memory, const DncLayout& l) {
  const int64_t batch = memory.size(0), n = l.slots;
  return {empty_large(memory, {batch, n, l.word}),  empty(memory, {batch, n}),
          empty(memory, {batch, l.write_heads, n}), empty_large(memory, {batch, l.write_heads, n, n}),
          empty(memory, {batch, l.write_heads, n}), empty(memory, {batch, l.read_heads, n})};
}

template <class T> DncState<const T> sample_of(const State& state, int64_t b) {
  const auto part = [&](int i) { return data<T>(state[size_t(i)]) + b * state[size_t(i)].stride(0); };
  return {part(0), part(1), part(2), part(3), part(4), part(5)};
}

template <class T> DncState<T> mutable_sample_of(const State& state, int64_t b) {
  const auto part = [&](int i) { return mutable_data<T>(state[size_t(i)]) + b * state[size_t(i)].stride(0); };
  return {part(0), part(1), part(2), part(3), part(4), part(5)};
}

template <class T> DncState<const T> sample_of(const Gradients& gradients, int64_t b) {
  const auto part = [&](int i) -> const T* {
    const auto& gradient = gradients[size_t(i)];
    return gradient ? data<T>(*gradient) + b * gradient->stride(0) : nullptr;
  };
  return {part(0), part(1), part(2), part(3), part(4), part(5)};
}

// Bytes of a sample that a step reads and writes: what decides how many threads are worth waking.
int64_t step_bytes(const DncLayout& l, int64_t element) {
  return 2 * l.slots * (l.write_heads * l.slots + l.word) * element;
}

// `state` and `new_state` may be the same tensors.
void step(const DncLayout& l, const Options& options, const Tensor& interface, const State& state,
          const State& new_state, const Tensor& reads, const std::optional<Tensor>& tape) {
  dispatch(interface, [&]<class T>() {
    const DncVariant<T> variant = options.variant<T>();
    const int64_t batch = interface.size(0), workers = shares(batch, step_bytes(l, int64_t(sizeof(T))));
    const int64_t size = dnc_step_scratch(l) + (tape ? 0 : l.tape());
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(batch, workers, [&](int64_t b, int64_t worker) {
      T* const space = scratch.data() + worker * size;
      const DncStep<T> sample{
          .layout = l,
          .variant = variant,
          .interface = data<T>(interface) + b * l.interface(),
          .state = sample_of<T>(state, b),
          .new_state = mutable_sample_of<T>(new_state, b),
          .reads = mutable_data<T>(reads) + b * l.read_heads * l.word,
          .tape = tape_of(tape ? mutable_data<T>(*tape) + b * l.tape() : space + dnc_step_scratch(l), l),
          .scratch = space};
      FASTMEM_ON_ISA(dnc_step(sample));
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
dnc_step(Tensor interface, Tensor memory, Tensor usage, Tensor precedence, Tensor link, Tensor write_weights,
         Tensor read_weights, bool masked, bool deallocates, bool sharpened, bool oneplus, bool detach_usage_write,
         double mask_floor, double clip, Text norm, double eps, double allocation_eps) {
  const Options options{masked,     deallocates, sharpened,  oneplus, detach_usage_write,
                        mask_floor, clip,        take(norm), eps,     allocation_eps};
  const State state{memory, usage, precedence, link, write_weights, read_weights};
  const DncLayout l = check(interface, state, options);
  const int64_t batch = memory.size(0);
  const State made = state_like(memory, l);
  const Tensor reads = empty(memory, {batch, l.read_heads, l.word}), tape = empty(memory, {batch, l.tape()});
  step(l, options, fastmem::dense(interface), dense(state), made, reads, tape);
  return {made[0], made[1], made[2], made[3], made[4], made[5], reads, tape};
}

void dnc_step_(Tensor interface, Tensor memory, Tensor usage, Tensor precedence, Tensor link, Tensor write_weights,
               Tensor read_weights, Tensor reads, bool masked, bool deallocates, bool sharpened, bool oneplus,
               bool detach_usage_write, double mask_floor, double clip, Text norm, double eps, double allocation_eps) {
  const Options options{masked,     deallocates, sharpened,  oneplus, detach_usage_write,
                        mask_floor, clip,        take(norm), eps,     allocation_eps};
  const State state{memory, usage, precedence, link, write_weights, read_weights};
  const DncLayout l = check(interface, state, options);
  require(reads, memory, {memory.size(0), l.read_heads, l.word}, "reads");
  const std::array<Tensor, 7> written{memory, usage, precedence, link, write_weights, read_weights, reads};
  for (size_t i = 0; i < written.size(); ++i) {
    const char* const name = i < 6 ? kStateNames[i] : "reads";
    STD_TORCH_CHECK(written[i].is_contiguous(), name, ": writing in place needs a contiguous tensor");
    require_apart(written[i], interface, "interface");
    for (size_t j = 0; j < i; ++j) require_apart(written[i], written[j], name);
  }
  step(l, options, fastmem::dense(interface), state, state, reads, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
dnc_step_backward(std::optional<Tensor> grad_memory, std::optional<Tensor> grad_usage,
                  std::optional<Tensor> grad_precedence, std::optional<Tensor> grad_link,
                  std::optional<Tensor> grad_write_weights, std::optional<Tensor> grad_read_weights,
                  std::optional<Tensor> grad_reads, Tensor new_memory, Tensor new_usage, Tensor new_write_weights,
                  Tensor new_read_weights, Tensor tape, Tensor interface, Tensor memory, Tensor usage,
                  Tensor precedence, Tensor link, Tensor write_weights, Tensor read_weights, bool masked,
                  bool deallocates, bool sharpened, bool oneplus, bool detach_usage_write, double mask_floor,
                  double clip, Text norm, double eps, double allocation_eps, std::vector<bool> output_mask) {
  const Options options{masked,     deallocates, sharpened,  oneplus, detach_usage_write,
                        mask_floor, clip,        take(norm), eps,     allocation_eps};
  State state{memory, usage, precedence, link, write_weights, read_weights};
  const DncLayout l = check(interface, state, options);
  STD_TORCH_CHECK(output_mask.size() == 7, "output_mask: expected 7 entries");
  const int64_t batch = memory.size(0);
  require(tape, memory, {batch, l.tape()}, "tape");
  require(grad_reads, memory, {batch, l.read_heads, l.word}, "grad_reads");
  State new_state{new_memory, new_usage, precedence, link, new_write_weights, new_read_weights};
  check(interface, new_state, options);
  Gradients upstream{grad_memory, grad_usage, grad_precedence, grad_link, grad_write_weights, grad_read_weights};
  State gradients = state;
  for (size_t i = 0; i < 6; ++i)
    if (upstream[i]) gradients[i] = *upstream[i];
  check(interface, gradients, options);
  state = dense(state);
  new_state = dense(new_state);
  for (auto& gradient : upstream) gradient = contiguous(gradient);
  interface = fastmem::dense(interface);
  tape = fastmem::dense(tape);
  grad_reads = contiguous(grad_reads);

  const Tensor none = nothing(memory), out_interface = empty(memory, {batch, l.interface()});
  const State out{output_mask[1] ? empty_large(memory, {batch, l.slots, l.word}) : none,
                  empty(memory, {batch, l.slots}),
                  empty(memory, {batch, l.write_heads, l.slots}),
                  output_mask[4] ? empty_large(memory, {batch, l.write_heads, l.slots, l.slots}) : none,
                  empty(memory, {batch, l.write_heads, l.slots}),
                  empty(memory, {batch, l.read_heads, l.slots})};
  dispatch(memory, [&]<class T>() {
    const DncVariant<T> variant = options.variant<T>();
    const int64_t workers = shares(batch, 2 * step_bytes(l, int64_t(sizeof(T)))), size = dnc_step_backward_scratch(l);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(batch, workers, [&](int64_t b, int64_t worker) {
      const auto row = [&](size_t i) { return mutable_data<T>(out[i]) + b * out[i].stride(0); };
      const DncStepBackward<T> sample{.layout = l,
                                      .variant = variant,
                                      .interface = data<T>(interface) + b * l.interface(),
                                      .state = sample_of<T>(state, b),
                                      .new_state = sample_of<T>(new_state, b),
                                      .tape = tape_of(data<T>(tape) + b * l.tape(), l),
                                      .grad_new_state = sample_of<T>(upstream, b),
                                      .grad_reads = at<T>(grad_reads, b * l.read_heads * l.word),
                                      .grad_interface = mutable_data<T>(out_interface) + b * l.interface(),
                                      .grad_state = {output_mask[1] ? row(0) : nullptr, row(1), row(2),
                                                     output_mask[4] ? row(3) : nullptr, row(4), row(5)},
                                      .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(dnc_step_backward(sample));
    });
  });
  const auto kept = [&](size_t i, const Tensor& tensor) { return output_mask[i] ? tensor : none; };
  return {kept(0, out_interface), kept(1, out[0]), kept(2, out[1]), kept(3, out[2]),
          kept(4, out[3]),        kept(5, out[4]), kept(6, out[5])};
}

} // namespace

#define FASTMEM_DNC_STATE \
  "Tensor memory, Tensor usage, Tensor precedence, Tensor link, Tensor write_weights, Tensor read_weights, "
#define FASTMEM_DNC_OPTIONS \
  "bool masked, bool deallocates, bool sharpened, bool oneplus, bool detach_usage_write, float mask_floor, " \
  "float clip, str norm, float eps, float allocation_eps"

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("dnc_step(Tensor interface, " FASTMEM_DNC_STATE FASTMEM_DNC_OPTIONS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("dnc_step_(Tensor interface, Tensor(a!) memory, Tensor(b!) usage, Tensor(c!) precedence, Tensor(d!) link, "
        "Tensor(e!) write_weights, Tensor(f!) read_weights, Tensor(g!) reads, " FASTMEM_DNC_OPTIONS ") -> ()");
  m.def("dnc_step_backward(Tensor? grad_memory, Tensor? grad_usage, Tensor? grad_precedence, Tensor? grad_link, "
        "Tensor? grad_write_weights, Tensor? grad_read_weights, Tensor? grad_reads, Tensor new_memory, "
        "Tensor new_usage, Tensor new_write_weights, Tensor new_read_weights, Tensor tape, "
        "Tensor interface, " FASTMEM_DNC_STATE FASTMEM_DNC_OPTIONS
        ", bool[7] output_mask) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("dnc_step", TORCH_BOX(&dnc_step));
  m.impl("dnc_step_", TORCH_BOX(&dnc_step_));
  m.impl("dnc_step_backward", TORCH_BOX(&dnc_step_backward));
}

} // namespace fastmem
