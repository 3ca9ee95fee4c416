"""What the ops share that find things by content: the norms; schema, check and gradient of those that take a memory."""

from typing import Any

import torch
from torch import Tensor

from fastmem import _check, _library

NORMS = {"inner": 1e-6, "outer": 1e-6, "rsqrt": 1e-12, "clamp": 1e-8, "width": 1e-6}  # and the eps of each
SCHEMA = "Tensor memory, Tensor keys, Tensor strengths, Tensor? key_mask, Tensor? slot_mask, str norm, float eps"


def resolve_eps(norm: str, eps: float | None, prefix: str = "") -> float:
    """eps, or the norm's own where it is None. Checks both; `prefix`: of the names under which they were given."""
    check_norm(norm, eps, prefix)
    return NORMS[norm] if eps is None else float(eps)


def check_norm(norm: str, eps: float | None, prefix: str = "") -> None:
    """Checks a norm and its eps."""
    if not isinstance(norm, str) or norm not in NORMS:
        raise ValueError(f"{prefix}norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if eps is not None and (isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < float("inf")):
        raise ValueError(f"{prefix}eps: expected a finite number of at least 0, got {eps!r}")


def check(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
    *,
    memory_layout: str,
    slot_mask_layout: str,
) -> None:
    """Checks all but what differs between the ops: the dtypes, and which sizes memory and slot mask may have."""
    check_norm(norm, eps)
    _check.layouts(
        ("memory", memory, memory_layout),
        ("keys", keys, "B A W"),
        ("strengths", strengths, "B A"),
        ("key_mask", key_mask, "B A W"),
        ("slot_mask", slot_mask, slot_mask_layout),
    )
    if slot_mask is not None:
        _check.dtypes("slot_mask", slot_mask, (torch.bool,))
        _check.same_kind(("memory", memory), ("slot_mask", slot_mask), device_only=True)


def fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """The gradients of memory, keys, strengths and key mask; whatever comes before the memory plays no part."""
    memory, keys, strengths, key_mask, _slot_mask, _norm, _eps, output_mask = arguments[-8:]
    return tuple(
        keys.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape if wants else 0)
        for tensor, wants in zip((memory, keys, strengths, key_mask), output_mask, strict=True)
    )


def register_autograd(name: str) -> None:
    """The gradient of an op's first output. A second one is there for the backward pass and has none."""

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, ...]) -> None:
        outputs = (output,) if isinstance(output, Tensor) else output
        *tensors, ctx.norm, ctx.eps = inputs
        ctx.save_for_backward(*outputs, *tensors)
        ctx.mark_non_differentiable(*outputs[1:])

    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        output_mask = ctx.needs_input_grad[:4]
        arguments = (grad, *ctx.saved_tensors, ctx.norm, ctx.eps, output_mask)
        gradients = _library.call(f"{name}_backward", *arguments, backend=ctx.backend)
        wanted = (gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))
        return (*wanted, None, None, None)

    _library.register_autograd(name, setup_context, backward)
