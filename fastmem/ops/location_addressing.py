"""Location addressing: interpolate, shift, sharpen. Schema, checks, gradient and the public function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _forms

STEM = "location_addressing"


def location_addressing(
    content: Tensor,
    previous: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharpness: Tensor,
    reversed_shift: bool = False,
    form: str = "softmax",
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Interpolates with the previous weights, shifts around the circle of slots and sharpens, in one pass.

    .. math::
        w^g = g\, w^c + (1 - g)\, w^{prev}, \qquad
        \tilde w_i = \sum_{j=-S}^{S} s_j\, w^g_{(i-j) \bmod N}, \qquad
        w_i = \frac{(\tilde w_i + \epsilon)^\gamma}{\sum_n (\tilde w_n + \epsilon)^\gamma}

    (Graves et al. 2014, "Neural Turing Machines", equations 7 to 9; eps is ours.)

    Args:
        content (Tensor): weights by content, in [0, 1], as of `content_addressing`. Shape `[B, A, N]`.
        previous (Tensor): the head's previous weights, in [0, 1]. Shape `[B, A, N]`.
        gate (Tensor): in [0, 1]; 1 takes the content, 0 keeps the previous weights. Shape `[B, A]`.
        shift (Tensor): how much to move by each of -S..S slots, at least 0, sums to 1. More taps than slots go around
            several times. Shape `[B, A, 2S+1]`.
        sharpness (Tensor): the power of `sharpen`, at least 0, usually at least 1. Shape `[B, A]`.
        reversed_shift (bool): whether the first tap moves by +S and the last by -S, as in public code of the NTM,
            instead of -S to +S. Default: False.
        form (str): "softmax", as above, or "power": :math:`\tilde w_i^\gamma / (\sum_n \tilde w_n^\gamma + \epsilon)`.
            Default: "softmax".
        eps (float, optional): above 0. Default: 1e-6 for "softmax", 1e-16 for "power".
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The weights `[B, A, N]`, in [0, 1]. They sum to 1; to less in form "power" where the powers are not large
        against eps. What comes of infinite or NaN arguments stays in their head.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. Differentiable with respect to the five tensors; in form "power" a
    shifted weight of 0 has an infinite gradient where the sharpness is below 1. Second derivatives raise
    NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: B A N (2S+1) multiplications and additions, B A N logarithms and exponentials, one read of `content` and
    `previous` and one write; the backward three times that, and saves the arguments and the result.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, an even number of taps, an unknown form or an eps
            that is not above 0.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    arguments = _arguments(content, previous, gate, shift, sharpness, reversed_shift, form, eps)
    return _library.call(STEM, *arguments, backend=backend)


def _arguments(*arguments: Any) -> tuple[Any, ...]:
    *others, reversed_shift, form, eps = arguments
    _check.flags(reversed_shift=reversed_shift)
    return *others, reversed_shift, *_forms.resolve(form, eps)


def _check_location_addressing(
    content: Tensor,
    previous: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharpness: Tensor,
    reversed_shift: bool,
    in_powers: bool,
    eps: float,
) -> None:
    _forms.check(eps)
    _check.dtypes("content", content, _check.STATE_DTYPES)
    others = (("previous", previous), ("gate", gate), ("shift", shift), ("sharpness", sharpness))
    _check.same_kind(("content", content), *others)
    sizes = _check.layouts(
        ("content", content, "B A N"),
        ("previous", previous, "B A N"),
        ("gate", gate, "B A"),
        ("shift", shift, "B A T"),
        ("sharpness", sharpness, "B A"),
    )
    if sizes["T"] % 2 == 0:
        raise ValueError(f"shift: expected shape [B, A, T] with an odd number T of taps, got T={sizes['T']}")


def _check_backward(grad_weights: Tensor, weights: Tensor, content: Tensor, *rest: Any) -> None:
    *others, _output_mask = rest
    _check_location_addressing(content, *others)
    upstream = (("grad_weights", grad_weights), ("weights", weights))
    _check.same_kind(("content", content), *upstream)
    _check.layouts(("content", content, "B A N"), *((name, tensor, "B A N") for name, tensor in upstream))


def _select_location_addressing(content: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(content), "triton": _select.triton_refusal(content, float64=True)}
    return _select.choose(STEM, content, refusals, backend)


def _fake(content: Tensor, *rest: Any) -> Tensor:
    return content.new_empty(content.shape)


def _fake_backward(grad_weights: Tensor, weights: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *differentiable, _reversed_shift, _in_powers, _eps, output_mask = rest
    wanted = zip(differentiable, output_mask, strict=True)
    return tuple(weights.new_empty(tensor.shape if wants else 0) for tensor, wants in wanted)


_SCHEMA = (
    "Tensor content, Tensor previous, Tensor gate, Tensor shift, Tensor sharpness,"
    " bool reversed_shift, bool in_powers, float eps"
)
_library.register(
    STEM,
    "location_addressing",
    f"({_SCHEMA}, *, str? backend=None) -> Tensor",
    select=_select_location_addressing,
    check=_check_location_addressing,
    fake=_fake,
    translate=_arguments,
)
_library.register(
    STEM,
    "location_addressing_backward",
    f"(Tensor grad_weights, Tensor weights, {_SCHEMA}, bool[5] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_location_addressing(arguments[2], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.reversed_shift, ctx.in_powers, ctx.eps = inputs
    ctx.save_for_backward(output, *tensors)


def _backward(ctx: Any, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_weights is None:
        return (None,) * 8
    output_mask = ctx.needs_input_grad[:5]
    options = ctx.reversed_shift, ctx.in_powers, ctx.eps
    gradients = _library.call(
        f"{STEM}_backward", grad_weights, *ctx.saved_tensors, *options, output_mask, backend=ctx.backend
    )
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))
    return (*wanted, None, None, None)


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1, 2, 3, 4))
