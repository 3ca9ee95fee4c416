"""NTM step: all heads of an NTM's memory in one kernel. Schema, checks, gradient and the public functions."""

from math import inf
from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _content, _forms
from fastmem.reference.ntm_step import interface_size, tape_size, taps_of

STEM = "ntm_step"


def ntm_step(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool = False,
    reversed_shift: bool = False,
    form: str = "softmax",
    sharpen_eps: float | None = None,
    clip: float | None = 20.0,
    norm: str = "inner",
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One step of an NTM's memory, from the controller's raw numbers for all heads to the reads, in one kernel.

    .. math::
        w^c &= C(M, k, \beta) & w &= \mathrm{location}(w^c, w, g, s, \gamma) \\
        \text{a read head: } \mathrm{reads} &= w M & \text{a write head: } M &= M (1 - w \otimes e) + w \otimes v

    with :func:`content_addressing` C, :func:`location_addressing`, :func:`weighted_read` and :func:`memory_write`
    (Graves et al. 2014, "Neural Turing Machines"). The heads act in the order of `heads`, as in public code of the NTM:
    each is complete before the next, so that a later head sees an earlier write. With `joint_writes` all heads see the
    memory before the step, and then all writes erase and all add.

    Args:
        interface (Tensor): unbounded numbers, head after head: key `[W]`, strength, gate, shift `[2K + 1]`, sharpness,
            and of a write head erase `[W]` and values `[W]`. Strengths pass softplus, sharpness 1 + softplus, gates and
            erase sigmoid, shifts softmax. K comes from the size. Shape `[B, S]`, S = A (W + 2K + 4) + 2 Q W.
        memory (Tensor): Shape `[B, N, W]`.
        weights (Tensor): of each head in the step before, in [0, 1]. Shape `[B, A, N]`.
        heads (str): a letter for each head, r for one that reads and w for one that writes, such as "rw".
        joint_writes (bool): the writes come together, after all heads. Default: False.
        reversed_shift (bool), form (str), sharpen_eps (float, optional): the shift and the sharpening, as in
            :func:`location_addressing`, where `sharpen_eps` is called `eps`.
        clip (float, optional): the interface is clamped to +-clip first. Default: 20; None: not at all.
        norm (str), eps (float, optional): the cosine, as in :func:`content_addressing`.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The new memory, the new weights of all heads, and what the read heads read, in their order, `[B, R, W]`.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. All results are differentiable with respect to the three tensors; second
    derivatives raise NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: a lookup of the memory for each run of heads that sees the same, one read of it for each read head, one read
    and write of it for each write; B N W (2 A + 2 R + 5 Q) flops, the backward three times that. Saves the arguments,
    the new weights, B A N numbers, and the memory between each write and a head that comes later.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, a size of the interface that does not fit the heads,
            heads other than r and w, an unknown form or norm, an eps or clip that is not above 0.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    arguments = _arguments(
        interface, memory, weights, heads, joint_writes, reversed_shift, form, sharpen_eps, clip, norm, eps
    )
    return _library.call(STEM, *arguments, backend=backend)[:3]


def taped_ntm_step(*arguments: Any) -> tuple[Tensor, ...]:
    """`ntm_step` with all options in order, and after its results the tape, for `reference.ntm_step.replayed`."""
    return _library.call(STEM, *_arguments(*arguments), backend=None)


def ntm_step_(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    reads: Tensor,
    heads: str,
    joint_writes: bool = False,
    reversed_shift: bool = False,
    form: str = "softmax",
    sharpen_eps: float | None = None,
    clip: float | None = 20.0,
    norm: str = "inner",
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> None:
    """`ntm_step` for inference: writes the new state over the old and what was read into `reads` `[B, R, W]`.

    Arguments as for `ntm_step`; `memory`, `weights` and `reads` must be contiguous and share no memory with each other
    or with the interface. The C++ kernel allocates no tensor. It has no gradient: call it under `torch.no_grad()` or
    with tensors that do not require one (RuntimeError otherwise).
    """
    arguments = _arguments(
        interface, memory, weights, reads, heads, joint_writes, reversed_shift, form, sharpen_eps, clip, norm, eps
    )
    _library.call("ntm_step_", *arguments, backend=backend)


def _arguments(*arguments: Any) -> tuple[Any, ...]:
    """The op's own arguments, their options checked."""
    return (*arguments[:-8], *_options(*arguments[-8:]))


@_check.once
def _options(
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    form: str,
    sharpen_eps: float | None,
    clip: float | None,
    norm: str,
    eps: float | None,
) -> tuple[Any, ...]:
    """The options as the op takes them, checked."""
    _check.heads(heads)
    _check.clip(clip)
    _check.flags(joint_writes=joint_writes, reversed_shift=reversed_shift)
    sharpening = _forms.resolve(form, sharpen_eps, "sharpen_eps")
    bound = inf if clip is None else float(clip)
    return (heads, joint_writes, reversed_shift, *sharpening, bound, norm, _content.resolve_eps(norm, eps))


def _check_ntm_step(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
) -> None:
    _check.heads(heads)
    _check.clip(clip)
    _forms.check(sharpen_eps, "sharpen_eps")
    _content.check_norm(norm, eps)
    _check.dtypes("interface", interface, _check.STATE_DTYPES)
    _check.same_kind(("interface", interface), ("memory", memory), ("weights", weights))
    sizes = _check.layouts(("interface", interface, "B S"), ("memory", memory, "B N W"), ("weights", weights, "B A N"))
    if sizes["A"] != len(heads):
        raise ValueError(f"weights: expected shape [B, A={len(heads)}, N] for heads {heads!r}, got A={sizes['A']}")
    size, word = sizes["S"], sizes["W"]
    taps = taps_of(size, heads, word)
    if taps < 1 or taps % 2 == 0 or size != interface_size(heads, word, taps):
        fitting = ", ".join(str(interface_size(heads, word, odd)) for odd in (1, 3, 5))
        raise ValueError(
            f"interface: expected {fitting} or more numbers for each sample, for shifts of 1, 3, 5 or more taps, heads"
            f" {heads!r} and words of {word}, got {size}"
        )


def _check_in_place(interface: Tensor, memory: Tensor, weights: Tensor, reads: Tensor, heads: str, *rest: Any) -> None:
    _check_ntm_step(interface, memory, weights, heads, *rest)
    _check.same_kind(("interface", interface), ("reads", reads))
    _check_reads(memory, heads, "reads", reads)
    written = (("memory", memory), ("weights", weights), ("reads", reads))
    _check.in_place("ntm_step_", written, ("interface", interface))


def _check_reads(memory: Tensor, heads: str, name: str, reads: Tensor | None) -> None:
    sizes = _check.layouts(("memory", memory, "B N W"), (name, reads, "B R W"))
    if reads is not None and sizes["R"] != heads.count("r"):
        raise ValueError(f"{name}: expected shape [B, R={heads.count('r')}, W] for heads {heads!r}, got R={sizes['R']}")


def _check_backward(
    grad_memory: Tensor | None,
    grad_weights: Tensor | None,
    grad_reads: Tensor | None,
    new_weights: Tensor,
    tape: Tensor,
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    *rest: Any,
) -> None:
    *options, _output_mask = rest
    _check_ntm_step(interface, memory, weights, heads, *options)
    grads = (("grad_memory", grad_memory), ("grad_weights", grad_weights), ("grad_reads", grad_reads))
    _check.same_kind(("interface", interface), ("new_weights", new_weights), ("tape", tape), *grads)
    _check.layouts(
        ("memory", memory, "B N W"),
        ("weights", weights, "B A N"),
        ("new_weights", new_weights, "B A N"),
        ("tape", tape, "B K"),
        ("grad_memory", grad_memory, "B N W"),
        ("grad_weights", grad_weights, "B A N"),
    )
    _check_reads(memory, heads, "grad_reads", grad_reads)


def _select_ntm_step(interface: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(interface), "triton": _select.triton_refusal(interface)}
    return _select.choose(STEM, interface, refusals, backend)


def _fake(
    interface: Tensor, memory: Tensor, weights: Tensor, heads: str, joint_writes: bool, *options: Any
) -> tuple[Tensor, ...]:
    batch, slots, word = memory.shape
    return (
        memory.new_empty(memory.shape),
        memory.new_empty(weights.shape),
        memory.new_empty(batch, heads.count("r"), word),
        memory.new_empty(batch, tape_size(heads, joint_writes, slots, word)),
    )


def _fake_in_place(*arguments: Any) -> None:
    return None


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, output_mask = arguments
    return tuple(
        tensor.new_empty(tensor.shape if wants else 0) for tensor, wants in zip(rest[5:8], output_mask, strict=True)
    )


_OPTIONS = (
    "str heads, bool joint_writes, bool reversed_shift, bool in_powers, float sharpen_eps, float clip, str norm,"
    " float eps"
)
_library.register(
    STEM,
    "ntm_step",
    f"(Tensor interface, Tensor memory, Tensor weights, {_OPTIONS}, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    select=_select_ntm_step,
    check=_check_ntm_step,
    fake=_fake,
    translate=_arguments,
)
_library.register(
    STEM,
    "ntm_step_",
    f"(Tensor interface, Tensor(a!) memory, Tensor(b!) weights, Tensor(c!) reads, {_OPTIONS}, *, str? backend=None)"
    " -> ()",
    select=_select_ntm_step,
    check=_check_in_place,
    fake=_fake_in_place,
    translate=_arguments,
)
_library.register(
    STEM,
    "ntm_step_backward",
    "(Tensor? grad_memory, Tensor? grad_weights, Tensor? grad_reads, Tensor new_weights, Tensor tape,"
    f" Tensor interface, Tensor memory, Tensor weights, {_OPTIONS}, bool[3] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_ntm_step(arguments[5], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[3:]
    _, weights, _, tape = output
    ctx.save_for_backward(weights, tape, *inputs[:3])
    ctx.mark_non_differentiable(tape)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = tuple(ctx.needs_input_grad[:3])
    gradients = _library.call(
        f"{STEM}_backward", *grads[:3], *ctx.saved_tensors, *ctx.options, output_mask, backend=ctx.backend
    )
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))
    return (*wanted, *(None for _ in ctx.options))


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1, 2))
