"""Usage: how far each slot is in use. Schema, checks, gradient and the public function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select

STEM = "usage_update"


def usage_update(
    usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    r"""Adds to the usage what was written in the last step, and takes off what the free gates release.

    .. math::
        \psi_i = \prod_r (1 - f^r w^r_i), \qquad
        u'_i = \Big(1 - (1 - u_i) \prod_q (1 - w^q_i)\Big)\, \psi_i

    with the write weights :math:`w^q` and read weights :math:`w^r` of the step before and the free gates :math:`f` of
    this one (Graves et al. 2016, "Hybrid computing using a neural network with dynamic external memory", equations for
    dynamic memory allocation; several write heads as in the code published with it).

    Args:
        usage (Tensor): the old usage, in [0, 1]. Shape `[B, N]`.
        write_weights (Tensor): of the step before, in [0, 1]. Shape `[B, Q, N]`.
        read_weights (Tensor): of the step before, in [0, 1]. Shape `[B, R, N]`.
        free_gates (Tensor): 1 releases what the head read, 0 keeps it. Shape `[B, R]`.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The new usage and the retention :math:`\psi`, both in [0, 1] for arguments in range. Shapes `[B, N]`.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Computes in the same
    dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write subnormal
    numbers (below 1.2e-38) as zero. Both results are differentiable with respect to all arguments, without a division,
    so a factor may be zero; second derivatives raise NotImplementedError. Under torch.func.grad and its kin the PyTorch
    reference runs, to any order.

    Cost: one read of every argument, one write of both results, about B N (3 Q + 2 R) flops; the backward the same
    again with a write of every gradient, and saves the arguments only.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, usage, write_weights, read_weights, free_gates, backend=backend)


def _check_usage_update(usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor) -> None:
    _check.dtypes("usage", usage, _check.STATE_DTYPES)
    _check.same_kind(
        ("usage", usage), ("write_weights", write_weights), ("read_weights", read_weights), ("free_gates", free_gates)
    )
    _check.layouts(
        ("usage", usage, "B N"),
        ("write_weights", write_weights, "B Q N"),
        ("read_weights", read_weights, "B R N"),
        ("free_gates", free_gates, "B R"),
    )


def _check_backward(grad_usage: Tensor | None, grad_retention: Tensor | None, usage: Tensor, *rest: Any) -> None:
    _check_usage_update(usage, *rest[:-1])
    gradients = (("grad_usage", grad_usage, "B N"), ("grad_retention", grad_retention, "B N"))
    _check.same_kind(("usage", usage), *((name, gradient) for name, gradient, _ in gradients))
    _check.layouts(("usage", usage, "B N"), *gradients)


def _select_usage_update(usage: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(usage), "triton": _select.triton_refusal(usage, float64=True)}
    return _select.choose(STEM, usage, refusals, backend)


def _fake(usage: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    return usage.new_empty(usage.shape), usage.new_empty(usage.shape)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *_, usage, write_weights, read_weights, free_gates, output_mask = arguments
    wanted = zip((usage, write_weights, read_weights, free_gates), output_mask, strict=True)
    return tuple(usage.new_empty(tensor.shape if wants else 0) for tensor, wants in wanted)


_SCHEMA = "Tensor usage, Tensor write_weights, Tensor read_weights, Tensor free_gates"
_library.register(
    STEM,
    "usage_update",
    f"({_SCHEMA}, *, str? backend=None) -> (Tensor, Tensor)",
    select=_select_usage_update,
    check=_check_usage_update,
    fake=_fake,
)
_library.register(
    STEM,
    "usage_update_backward",
    f"(Tensor? grad_usage, Tensor? grad_retention, {_SCHEMA}, bool[4] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_usage_update(arguments[2], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = tuple(ctx.needs_input_grad[:4])
    gradients = _library.call(f"{STEM}_backward", *grads, *ctx.saved_tensors, output_mask, backend=ctx.backend)
    return tuple(gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1, 2, 3))
