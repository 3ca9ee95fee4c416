#include "ntm_step_kernel.h"

#include "parallel.h"
#include "pool.h"
#include "tensor.h"
#include "workspace.h"

#include <tuple>

namespace fastmem {
namespace {

struct Options {
  std::string kinds;
  bool joint_writes, reversed_shift, in_powers;
  double sharpen_eps, clip;
  std::string norm;
  double eps;

  template <class T> NtmVariant<T> variant() const {
    return {reversed_shift, {in_powers, T(sharpen_eps)}, T(clip), similarity<T>(norm, eps)};
  }
};

// `l` points into `options`, which must outlive it.
NtmLayout check(const Tensor& interface, const Tensor& memory, const Tensor& weights, const Options& options) {
  STD_TORCH_CHECK(interface.dim() == 2 && memory.dim() == 3 && weights.dim() == 3, "wrong number of dimensions");
  NtmLayout l{.slots = memory.size(1),
              .word = memory.size(2),
              .reach = 0,
              .heads = int64_t(options.kinds.size()),
              .kinds = options.kinds.data(),
              .joint_writes = options.joint_writes};
  for (const char kind : options.kinds) STD_TORCH_CHECK(kind == 'r' || kind == 'w', "heads: expected letters r and w");
  // The number of taps is what the heads leave over.
  const int64_t over = interface.size(1) - l.interface();
  STD_TORCH_CHECK(l.heads > 0 && over >= 0 && over % (2 * l.heads) == 0, "interface: wrong size for the heads");
  l.reach = over / (2 * l.heads);
  const int64_t batch = memory.size(0);
  require(interface, memory, {batch, l.interface()}, "interface");
  require(memory, memory, {batch, l.slots, l.word}, "memory");
  require(weights, memory, {batch, l.heads, l.slots}, "weights");
  return l;
}

int64_t step_bytes(const NtmLayout& l, int64_t element) { return 4 * l.slots * (l.word + l.heads) * element; }

// `memory` and `new_memory` may be the same tensor, and so `weights` and `new_weights`.
void step(const NtmLayout& l, const Options& options, const Tensor& interface, const Tensor& memory,
          const Tensor& weights, const Tensor& new_memory, const Tensor& new_weights, const Tensor& reads,
          const std::optional<Tensor>& tape) {
  dispatch(interface, [&]<class T>() {
    const NtmVariant<T> variant = options.variant<T>();
    const int64_t batch = interface.size(0), workers = shares(batch, step_bytes(l, int64_t(sizeof(T))));
    const int64_t size = ntm_step_scratch(l) + (tape ? 0 : in_lines(l.content()));
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(batch, workers, [&](int64_t b, int64_t worker) {
      T* const space = scratch.data() + worker * size;
      T* const kept = tape ? mutable_data<T>(*tape) + b * l.tape() : nullptr;
      const NtmStep<T> sample{.layout = l,
                              .variant = variant,
                              .interface = data<T>(interface) + b * l.interface(),
                              .memory = data<T>(memory) + b * l.slots * l.word,
                              .weights = data<T>(weights) + b * l.heads * l.slots,
                              .new_memory = mutable_data<T>(new_memory) + b * l.slots * l.word,
                              .new_weights = mutable_data<T>(new_weights) + b * l.heads * l.slots,
                              .reads = mutable_data<T>(reads) + b * (l.heads - l.write_heads()) * l.word,
                              .content = kept ? kept : space + ntm_step_scratch(l),
                              .kept = kept ? kept + l.content() : nullptr,
                              .scratch = space};
      FASTMEM_ON_ISA(ntm_step(sample));
    });
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> ntm_step(Tensor interface, Tensor memory, Tensor weights, Text heads,
                                                    bool joint_writes, bool reversed_shift, bool in_powers,
                                                    double sharpen_eps, double clip, Text norm, double eps) {
  const Options options{take(heads), joint_writes, reversed_shift, in_powers, sharpen_eps, clip, take(norm), eps};
  const NtmLayout l = check(interface, memory, weights, options);
  const int64_t batch = memory.size(0);
  const Tensor new_memory = empty_large(memory, {batch, l.slots, l.word});
  const Tensor new_weights = empty(memory, {batch, l.heads, l.slots});
  const Tensor reads = empty(memory, {batch, l.heads - l.write_heads(), l.word});
  const Tensor tape = empty(memory, {batch, l.tape()});
  step(l, options, dense(interface), dense(memory), dense(weights), new_memory, new_weights, reads, tape);
  return {new_memory, new_weights, reads, tape};
}

void ntm_step_(Tensor interface, Tensor memory, Tensor weights, Tensor reads, Text heads, bool joint_writes,
               bool reversed_shift, bool in_powers, double sharpen_eps, double clip, Text norm, double eps) {
  const Options options{take(heads), joint_writes, reversed_shift, in_powers, sharpen_eps, clip, take(norm), eps};
  const NtmLayout l = check(interface, memory, weights, options);
  require(reads, memory, {memory.size(0), l.heads - l.write_heads(), l.word}, "reads");
  const std::pair<const char*, Tensor> written[] = {{"memory", memory}, {"weights", weights}, {"reads", reads}};
  for (const auto& [name, tensor] : written) {
    STD_TORCH_CHECK(tensor.is_contiguous(), name, ": writing in place needs a contiguous tensor");
    require_apart(tensor, interface, "interface");
  }
  require_apart(memory, weights, "weights");
  require_apart(memory, reads, "reads");
  require_apart(weights, reads, "reads");
  step(l, options, dense(interface), memory, weights, memory, weights, reads, std::nullopt);
}

std::tuple<Tensor, Tensor, Tensor>
ntm_step_backward(std::optional<Tensor> grad_memory, std::optional<Tensor> grad_weights,
                  std::optional<Tensor> grad_reads, Tensor new_weights, Tensor tape, Tensor interface, Tensor memory,
                  Tensor weights, Text heads, bool joint_writes, bool reversed_shift, bool in_powers,
                  double sharpen_eps, double clip, Text norm, double eps, std::vector<bool> output_mask) {
  const Options options{take(heads), joint_writes, reversed_shift, in_powers, sharpen_eps, clip, take(norm), eps};
  const NtmLayout l = check(interface, memory, weights, options);
  const int64_t batch = memory.size(0), readers = l.heads - l.write_heads();
  require(grad_memory, memory, {batch, l.slots, l.word}, "grad_memory");
  require(grad_weights, memory, {batch, l.heads, l.slots}, "grad_weights");
  require(grad_reads, memory, {batch, readers, l.word}, "grad_reads");
  require(new_weights, memory, {batch, l.heads, l.slots}, "new_weights");
  require(tape, memory, {batch, l.tape()}, "tape");
  STD_TORCH_CHECK(output_mask.size() == 3, "output_mask: expected 3 entries");
  grad_memory = contiguous(grad_memory);
  grad_weights = contiguous(grad_weights);
  grad_reads = contiguous(grad_reads);
  new_weights = dense(new_weights);
  tape = dense(tape);
  interface = dense(interface);
  memory = dense(memory);
  weights = dense(weights);
  const Tensor out_interface = empty(memory, {batch, l.interface()});
  const Tensor out_memory = empty_large(memory, {batch, l.slots, l.word});
  const Tensor out_weights = empty(memory, {batch, l.heads, l.slots});
  dispatch(memory, [&]<class T>() {
    const NtmVariant<T> variant = options.variant<T>();
    const int64_t workers = shares(batch, 2 * step_bytes(l, int64_t(sizeof(T)))), size = ntm_step_backward_scratch(l);
    const Workspace<T> scratch(workers * size);
    for_each_sample_in_shares(batch, workers, [&](int64_t b, int64_t worker) {
      const int64_t rows = b * l.slots * l.word, heads_row = b * l.heads * l.slots;
      const T* const content = data<T>(tape) + b * l.tape();
      const NtmStepBackward<T> sample{.layout = l,
                                      .variant = variant,
                                      .interface = data<T>(interface) + b * l.interface(),
                                      .memory = data<T>(memory) + rows,
                                      .weights = data<T>(weights) + heads_row,
                                      .new_weights = data<T>(new_weights) + heads_row,
                                      .content = content,
                                      .kept = content + l.content(),
                                      .grad_new_memory = at<T>(grad_memory, rows),
                                      .grad_new_weights = at<T>(grad_weights, heads_row),
                                      .grad_reads = at<T>(grad_reads, b * readers * l.word),
                                      .grad_interface = mutable_data<T>(out_interface) + b * l.interface(),
                                      .grad_memory = mutable_data<T>(out_memory) + rows,
                                      .grad_weights = mutable_data<T>(out_weights) + heads_row,
                                      .scratch = scratch.data() + worker * size};
      FASTMEM_ON_ISA(ntm_step_backward(sample));
    });
  });
  const Tensor none = nothing(memory);
  return {output_mask[0] ? out_interface : none, output_mask[1] ? out_memory : none,
          output_mask[2] ? out_weights : none};
}

} // namespace

#define FASTMEM_NTM_OPTIONS \
  "str heads, bool joint_writes, bool reversed_shift, bool in_powers, float sharpen_eps, float clip, str norm, " \
  "float eps"

STABLE_TORCH_LIBRARY_FRAGMENT(fastmem_cpu, m) {
  m.def("ntm_step(Tensor interface, Tensor memory, Tensor weights, " FASTMEM_NTM_OPTIONS
        ") -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("ntm_step_(Tensor interface, Tensor(a!) memory, Tensor(b!) weights, Tensor(c!) reads, " FASTMEM_NTM_OPTIONS
        ") -> ()");
  m.def("ntm_step_backward(Tensor? grad_memory, Tensor? grad_weights, Tensor? grad_reads, Tensor new_weights, "
        "Tensor tape, Tensor interface, Tensor memory, Tensor weights, " FASTMEM_NTM_OPTIONS
        ", bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(fastmem_cpu, CPU, m) {
  m.impl("ntm_step", TORCH_BOX(&ntm_step));
  m.impl("ntm_step_", TORCH_BOX(&ntm_step_));
  m.impl("ntm_step_backward", TORCH_BOX(&ntm_step_backward));
}

} // namespace fastmem
