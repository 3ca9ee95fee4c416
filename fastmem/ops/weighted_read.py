"""Weighted read: memory rows summed with given weights. Schema, checks, gradient and the public function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select

STEM = "weighted_read"


def weighted_read(memory: Tensor, weights: Tensor, *, backend: str | None = None) -> Tensor:
    r"""Reads a memory with given weights, one word a head.

    .. math::
        r_a = \sum_i w_{ai} m_i

    (Graves et al. 2014, "Neural Turing Machines", equation 2.) `content_read` finds the weights too, in the same pass.

    Args:
        memory (Tensor): any finite values. Shape `[B, N, W]`.
        weights (Tensor): usually in [0, 1] with sums of at most 1; any values are allowed. Shape `[B, A, N]`.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The reads `[B, A, W]`; 0 where there are no slots.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. Differentiable with respect to both arguments; second derivatives raise
    NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: one read of `memory` and 2 B N W A flops; the backward one read of `memory`, one write of its gradient and
    twice the flops, and saves the arguments only.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, memory, weights, backend=backend)


def _check_weighted_read(memory: Tensor, weights: Tensor) -> None:
    _check.dtypes("memory", memory, _check.STATE_DTYPES)
    _check.same_kind(("memory", memory), ("weights", weights))
    _check.layouts(("memory", memory, "B N W"), ("weights", weights, "B A N"))


def _check_backward(grad_reads: Tensor, memory: Tensor, weights: Tensor, output_mask: list[bool]) -> None:
    _check_weighted_read(memory, weights)
    _check.same_kind(("memory", memory), ("grad_reads", grad_reads))
    _check.layouts(("memory", memory, "B N W"), ("weights", weights, "B A N"), ("grad_reads", grad_reads, "B A W"))


def _select_weighted_read(memory: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(memory), "triton": _select.triton_refusal(memory, float64=True)}
    return _select.choose(STEM, memory, refusals, backend)


def _fake(memory: Tensor, weights: Tensor) -> Tensor:
    return memory.new_empty(*weights.shape[:2], memory.shape[2])


def _fake_backward(grad_reads: Tensor, memory: Tensor, weights: Tensor, output_mask: list[bool]) -> tuple[Tensor, ...]:
    wanted = zip((memory, weights), output_mask, strict=True)
    return tuple(memory.new_empty(tensor.shape if wants else 0) for tensor, wants in wanted)


_library.register(
    STEM,
    "weighted_read",
    "(Tensor memory, Tensor weights, *, str? backend=None) -> Tensor",
    select=_select_weighted_read,
    check=_check_weighted_read,
    fake=_fake,
)
_library.register(
    STEM,
    "weighted_read_backward",
    "(Tensor grad_reads, Tensor memory, Tensor weights, bool[2] output_mask, *, str? backend=None) -> (Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_weighted_read(arguments[1], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_reads: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_reads is None:
        return (None,) * 2
    output_mask = tuple(ctx.needs_input_grad[:2])
    gradients = _library.call(f"{STEM}_backward", grad_reads, *ctx.saved_tensors, output_mask, backend=ctx.backend)
    return tuple(gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1))
