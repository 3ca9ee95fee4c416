"""DNC step: one write and one read of a DNC's memory, fused. Schema, checks, gradient and the public functions."""

from math import inf
from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _content
from fastmem.ops.allocation import EPS
from fastmem.reference._interface import interface_shapes, interface_size
from fastmem.reference.dnc_step import tape_size

STEM = "dnc_step"
STATE = ("memory", "usage", "precedence", "link", "write_weights", "read_weights")
LAYOUTS = ("B N W", "B N", "B Q N", "B Q N N", "B Q N", "B R N")


def dnc_step(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    masked: bool = False,
    deallocates: bool = False,
    sharpened: bool = False,
    oneplus: bool = True,
    detach_usage_write: bool = False,
    mask_floor: float = 0.0,
    clip: float | None = 20.0,
    norm: str = "inner",
    eps: float | None = None,
    allocation_eps: float = EPS,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    r"""One step of a DNC's memory, from the controller's interface vector to the reads, in one kernel.

    .. math::
        u, \psi &= \mathrm{usage}(u, w, r, f) & a &= \mathrm{allocation}(u, g^a g^w) \\
        w &= g^w (g^a a + (1 - g^a)\, C(M, k^w, \beta^w)) & M &= M (1 - w \otimes e) + w \otimes v \\
        L, p, b, f &= \mathrm{linkage}(L, p, w, r) & r &= \pi \cdot (b, C(M, k^r, \beta^r), f), \quad
        \mathrm{reads} = r M

    with :func:`usage_update`, :func:`allocation`, :func:`content_addressing` C, :func:`memory_write`,
    :func:`temporal_linkage` and :func:`weighted_read`. On the right, w and r are those of the step before until they
    are assigned (Graves et al. 2016, "Hybrid computing using a neural network with dynamic external memory"; several
    write heads as in the code published with it). The variants are those of Csordas and Schmidhuber 2019, "Improving
    Differentiable Neural Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control".

    Args:
        interface (Tensor): unbounded numbers, in this order: read keys `[R, W]`, read strengths `[R]`, write keys
            `[Q, W]`, write strengths `[Q]`, erase `[Q, W]`, values `[Q, W]`, free gates `[R]`, allocation gates `[Q]`,
            write gates `[Q]`, read modes `[R, 2Q + 1]` (backward 1..Q, content, forward 1..Q); if `masked`, write masks
            `[Q, W]` and read masks `[R, W]`; if `sharpened`, forward and backward sharpness `[R]` each. Strengths and
            sharpness pass 1 + softplus, gates, erase and masks sigmoid, read modes softmax. Shape `[B, S]`.
        memory (Tensor): Shape `[B, N, W]`.
        usage (Tensor): in [0, 1]. Shape `[B, N]`.
        precedence (Tensor): sums to at most 1. Shape `[B, Q, N]`.
        link (Tensor): zero diagonal, rows and columns that sum to at most 1. Shape `[B, Q, N, N]`.
        write_weights (Tensor): of the step before, sum to at most 1. Shape `[B, Q, N]`.
        read_weights (Tensor): of the step before, sum to at most 1. Shape `[B, R, N]`.
        masked (bool): content lookups compare under a mask of the words. Default: False.
        deallocates (bool): what the free gates release is erased from the memory. Default: False.
        sharpened (bool): forward and backward weights are sharpened. Default: False.
        oneplus (bool): strengths are 1 + softplus; False: softplus alone. Default: True.
        detach_usage_write (bool): no gradient from the usage into the last write weights. Default: False.
        mask_floor (float): masks lie in [mask_floor, 1]; in [0, 1). Default: 0.
        clip (float, optional): the interface is clamped to +-clip first. Default: 20; None: not at all.
        norm (str), eps (float, optional): the cosine, as in :func:`content_addressing`.
        allocation_eps (float): the eps of :func:`allocation`. Default: 1e-6.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The new memory, usage, precedence, link, write weights and read weights, and the reads `[B, R, W]`.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. All results are differentiable with respect to all tensors; second
    derivatives raise NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: one read and one write of `link` and `memory`, B Q N^2 (4 R + 4) + 2 B N W (3 R + 4 Q) flops; the backward
    three times the flops. Saves the arguments, the results and B N (1 + 2 Q + 2 Q R + R) numbers.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, an unknown norm, a mask floor or an
            allocation eps outside [0, 1).
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    options = _options(
        masked, deallocates, sharpened, oneplus, detach_usage_write, mask_floor, clip, norm, eps, allocation_eps
    )
    state = (memory, usage, precedence, link, write_weights, read_weights)
    return _library.call(STEM, interface, *state, *options, backend=backend)[:7]


def taped_dnc_step(interface: Tensor, *state: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """`dnc_step` with all options by keyword, and after its results the tape, for `reference.dnc_step.replayed`."""
    return _library.call(STEM, interface, *state, *_options(**options), backend=None)


def dnc_step_(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    reads: Tensor,
    masked: bool = False,
    deallocates: bool = False,
    sharpened: bool = False,
    oneplus: bool = True,
    mask_floor: float = 0.0,
    clip: float | None = 20.0,
    norm: str = "inner",
    eps: float | None = None,
    allocation_eps: float = EPS,
    *,
    backend: str | None = None,
) -> None:
    """`dnc_step` for inference: writes the new state over the old and the reads into `reads` `[B, R, W]`.

    Arguments as for `dnc_step`; all seven tensors must be contiguous and share no memory with each other or with the
    interface. The C++ kernel allocates no tensor. It has no gradient: call it under `torch.no_grad()` or with tensors
    that do not require one (RuntimeError otherwise).
    """
    options = _options(masked, deallocates, sharpened, oneplus, False, mask_floor, clip, norm, eps, allocation_eps)
    state = (memory, usage, precedence, link, write_weights, read_weights)
    _library.call("dnc_step_", interface, *state, reads, *options, backend=backend)


@_check.once
def _options(
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float | None,
    norm: str,
    eps: float | None,
    allocation_eps: float,
) -> tuple[Any, ...]:
    """The options as the op takes them, checked."""
    _check.share("mask_floor", mask_floor)
    _check.share("allocation_eps", allocation_eps)
    _check.clip(clip)
    _check.flags(
        masked=masked, deallocates=deallocates, sharpened=sharpened, oneplus=oneplus,
        detach_usage_write=detach_usage_write,
    )  # fmt: skip
    bound = inf if clip is None else float(clip)
    flags = (masked, deallocates, sharpened, oneplus, detach_usage_write)
    return (*flags, float(mask_floor), bound, norm, _content.resolve_eps(norm, eps), float(allocation_eps))


def _check_dnc_step(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float | None,
    norm: str,
    eps: float | None,
    allocation_eps: float,
) -> None:
    _content.check_norm(norm, eps)
    _check.share("mask_floor", mask_floor)
    _check.share("allocation_eps", allocation_eps)
    _check.clip(clip)
    state = (memory, usage, precedence, link, write_weights, read_weights)
    _check.dtypes("interface", interface, _check.STATE_DTYPES)
    _check.same_kind(("interface", interface), *zip(STATE, state, strict=True))
    _check.layouts(("interface", interface, "B S"), *zip(STATE, state, LAYOUTS, strict=True))
    heads = (memory.shape[2], read_weights.shape[1], write_weights.shape[1])
    size = interface_size(*heads, masked, sharpened)
    if interface.shape[1] != size:
        fields = ", ".join(
            f"{name} {list(shape)}" for name, shape in interface_shapes(*heads, masked, sharpened).items()
        )
        raise ValueError(f"interface: expected {size} numbers for each sample ({fields}), got {interface.shape[1]}")


def _check_in_place(interface: Tensor, *arguments: Any) -> None:
    *state, reads = arguments[:7]
    _check_dnc_step(interface, *state, *arguments[7:])
    _check.same_kind(("interface", interface), ("reads", reads))
    _check.layouts(("memory", state[0], "B N W"), ("read_weights", state[5], "B R N"), ("reads", reads, "B R W"))
    written = tuple(zip((*STATE, "reads"), (*state, reads), strict=True))
    _check.in_place("dnc_step_", written, ("interface", interface))


def _check_backward(*arguments: Any) -> None:
    upstream, (new_memory, new_usage, new_write, new_read, tape) = arguments[:7], arguments[7:12]
    interface, *rest = arguments[12:-1]
    state = rest[:6]
    _check_dnc_step(interface, *rest)
    made = (new_memory, new_usage, new_write, new_read)
    names = ("new_memory", "new_usage", "new_write_weights", "new_read_weights")
    layouts = ("B N W", "B N", "B Q N", "B R N")
    grads = tuple(zip((f"grad_{name}" for name in (*STATE, "reads")), upstream, (*LAYOUTS, "B R W"), strict=True))
    _check.same_kind(("interface", interface), ("tape", tape), *zip(names, made, strict=True), *(g[:2] for g in grads))
    _check.layouts(*zip(STATE, state, LAYOUTS, strict=True), *zip(names, made, layouts, strict=True), *grads)
    _check.layouts(("memory", state[0], "B N W"), ("tape", tape, "B K"))


def _select_dnc_step(interface: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(interface), "triton": _select.triton_refusal(interface)}
    return _select.choose(STEM, interface, refusals, backend)


def _fake(interface: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    memory, _, _, _, write_weights, read_weights, _, _, sharpened = arguments[:9]
    batch, slots, word = memory.shape
    heads = (read_weights.shape[1], write_weights.shape[1])
    made = tuple(tensor.new_empty(tensor.shape) for tensor in arguments[:6])
    return (
        *made,
        memory.new_empty(batch, heads[0], word),
        memory.new_empty(batch, tape_size(slots, *heads, sharpened)),
    )


def _fake_in_place(*arguments: Any) -> None:
    return None


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *rest, output_mask = arguments
    return tuple(
        tensor.new_empty(tensor.shape if wants else 0) for tensor, wants in zip(rest[12:19], output_mask, strict=True)
    )


_STATE = ", ".join(f"Tensor {name}" for name in STATE)
_OPTIONS = (
    "bool masked, bool deallocates, bool sharpened, bool oneplus, bool detach_usage_write, float mask_floor,"
    " float clip, str norm, float eps, float allocation_eps"
)
_library.register(
    STEM,
    "dnc_step",
    f"(Tensor interface, {_STATE}, {_OPTIONS}, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    select=_select_dnc_step,
    check=_check_dnc_step,
    fake=_fake,
)
_library.register(
    STEM,
    "dnc_step_",
    "(Tensor interface, Tensor(a!) memory, Tensor(b!) usage, Tensor(c!) precedence, Tensor(d!) link,"
    f" Tensor(e!) write_weights, Tensor(f!) read_weights, Tensor(g!) reads, {_OPTIONS}, *, str? backend=None) -> ()",
    select=_select_dnc_step,
    check=_check_in_place,
    fake=_fake_in_place,
)
_library.register(
    STEM,
    "dnc_step_backward",
    f"({', '.join(f'Tensor? grad_{name}' for name in (*STATE, 'reads'))}, Tensor new_memory, Tensor new_usage,"
    f" Tensor new_write_weights, Tensor new_read_weights, Tensor tape, Tensor interface, {_STATE}, {_OPTIONS},"
    " bool[7] output_mask, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_dnc_step(arguments[12], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.options = inputs[7:]
    memory, usage, _, _, write_weights, read_weights, _, tape = output
    ctx.save_for_backward(memory, usage, write_weights, read_weights, tape, *inputs[:7])
    ctx.mark_non_differentiable(tape)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = tuple(ctx.needs_input_grad[:7])
    gradients = _library.call(
        f"{STEM}_backward", *grads[:7], *ctx.saved_tensors, *ctx.options, output_mask, backend=ctx.backend
    )
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))
    return (*wanted, *(None for _ in ctx.options))


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=tuple(range(7)))
