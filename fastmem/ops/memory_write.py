"""Memory write: all write heads erase, then all add. Schema, checks, gradient and the public functions."""

from typing import Any

import torch
from torch import Tensor

from fastmem import _check, _library, _select

STEM = "memory_write"


def memory_write(
    memory: Tensor,
    write_weights: Tensor,
    erase: Tensor,
    values: Tensor,
    retention: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Writes to a memory: every head erases, then every head adds, in one pass.

    .. math::
        M'_i = M_i \, \psi_i \odot \prod_q (1 - w^q_i e^q) + \sum_q w^q_i v^q

    Erase and add are equations 3 and 4 of Graves et al. 2014, "Neural Turing Machines"; several heads as in the code of
    Graves et al. 2016, "Hybrid computing using a neural network with dynamic external memory"; the retention
    :math:`\psi` wipes slots that are free again (Csordas and Schmidhuber 2019, "Improving Differentiable Neural
    Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control").

    Args:
        memory (Tensor): any finite values. Shape `[B, N, W]`.
        write_weights (Tensor): where each head writes, in [0, 1], sums to at most 1. Shape `[B, Q, N]`.
        erase (Tensor): how much of each word is erased, in [0, 1]; exactly 0 and 1 are allowed. Shape `[B, Q, W]`.
        values (Tensor): what is added. Shape `[B, Q, W]`.
        retention (Tensor, optional): what each slot keeps, in [0, 1]. Shape `[B, N]`. Default: everything.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The new memory `[B, N, W]`.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. Differentiable with respect to all arguments, without a division;
    second derivatives raise NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any
    order.

    Cost: one read and one write of `memory` and 5 B Q N W flops; the backward one read of `memory` and of the gradient,
    one write, and saves the arguments only.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, memory, write_weights, erase, values, retention, backend=backend)


def memory_write_(
    memory: Tensor,
    write_weights: Tensor,
    erase: Tensor,
    values: Tensor,
    retention: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """`memory_write` for inference: writes the new memory over the old and returns nothing.

    Arguments as for `memory_write`; `memory` must have dense rows and share no memory with the other arguments. It has
    no gradient: call it under `torch.no_grad()` or with tensors that do not require one (RuntimeError otherwise).
    Autograd notices when it overwrites a tensor that a gradient still needs.
    """
    _library.call("memory_write_", memory, write_weights, erase, values, retention, backend=backend)


def _named(
    memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, retention: Tensor | None
) -> tuple[tuple[str, Tensor | None, str], ...]:
    return (("memory", memory, "B N W"), ("write_weights", write_weights, "B Q N"), ("erase", erase, "B Q W"),
            ("values", values, "B Q W"), ("retention", retention, "B N"))  # fmt: skip


def _check_memory_write(*arguments: Any) -> None:
    named = _named(*arguments)
    memory = arguments[0]
    _check.dtypes("memory", memory, _check.STATE_DTYPES)
    _check.same_kind(("memory", memory), *((name, tensor) for name, tensor, _ in named[1:]))
    _check.layouts(*named)


def _check_in_place(memory: Tensor, *others: Any) -> None:
    _check_memory_write(memory, *others)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (memory, *others)):
        raise RuntimeError("memory_write_: expected torch.no_grad(), got arguments that require a gradient")
    _check.writable("memory", memory)
    named = _named(memory, *others)[1:]
    _check.apart("memory", memory, *((name, tensor) for name, tensor, _ in named if tensor is not None))


def _check_backward(grad_memory: Tensor, memory: Tensor, *rest: Any) -> None:
    _check_memory_write(memory, *rest[:-1])
    _check.same_kind(("memory", memory), ("grad_memory", grad_memory))
    _check.layouts(("memory", memory, "B N W"), ("grad_memory", grad_memory, "B N W"))


def _select_memory_write(memory: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(memory), "triton": _select.triton_refusal(memory, float64=True)}
    return _select.choose(STEM, memory, refusals, backend)


def _fake(memory: Tensor, *others: Tensor | None) -> Tensor:
    return memory.new_empty(memory.shape)


def _fake_backward(grad_memory: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *inputs, output_mask = rest
    return tuple(
        grad_memory.new_empty(tensor.shape if wants and tensor is not None else 0)
        for tensor, wants in zip(inputs, output_mask, strict=True)
    )


_SCHEMA = "Tensor write_weights, Tensor erase, Tensor values, Tensor? retention"
_library.register(
    STEM,
    "memory_write",
    f"(Tensor memory, {_SCHEMA}, *, str? backend=None) -> Tensor",
    select=_select_memory_write,
    check=_check_memory_write,
    fake=_fake,
)
_library.register(
    STEM,
    "memory_write_",
    f"(Tensor(a!) memory, {_SCHEMA}, *, str? backend=None) -> ()",
    select=_select_memory_write,
    check=_check_in_place,
    fake=lambda *arguments: None,
)
_library.register(
    STEM,
    "memory_write_backward",
    f"(Tensor grad_memory, Tensor memory, {_SCHEMA}, bool[5] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_memory_write(arguments[1], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_memory: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_memory is None:
        return (None,) * 5
    output_mask = tuple(ctx.needs_input_grad[:5])
    gradients = _library.call(f"{STEM}_backward", grad_memory, *ctx.saved_tensors, output_mask, backend=ctx.backend)
    return tuple(gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1, 2, 3, 4))
