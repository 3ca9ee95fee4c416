"""Sharpening: weightings raised to a power. Schema, checks, gradient and the public function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _forms

STEM = "sharpen"


def sharpen(
    weights: Tensor,
    sharpness: Tensor,
    form: str = "softmax",
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Raises every weighting to a power and makes it sum to 1, so that a blurred one becomes sharp again.

    .. math::
        w'_i = \mathrm{softmax}_i\big(\gamma \ln(w_i + \epsilon)\big)
             = \frac{(w_i + \epsilon)^\gamma}{\sum_n (w_n + \epsilon)^\gamma}

    (Graves et al. 2014, "Neural Turing Machines", equation 9, and, for links, Csordas and Schmidhuber 2019, "Improving
    Differentiable Neural Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control".)

    Args:
        weights (Tensor): at least 0; they need not sum to 1. Shape `[B, A, N]`.
        sharpness (Tensor): the power, at least 0, usually at least 1. At 1 little changes, at 0 all slots become alike.
            Shape `[B, A]`.
        form (str): where eps stands. "softmax": added to each weight, as above, which cannot underflow; "power":
            :math:`w_i^\gamma / (\sum_n w_n^\gamma + \epsilon)`, as public code of the NTM writes it. Default:
            "softmax".
        eps (float, optional): above 0. Default: 1e-6 for "softmax", 1e-16 for "power".
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The weights `[B, A, N]`, in [0, 1]. They sum to 1; to less in form "power" where the powers are not large
        against eps. What comes of infinite, NaN or negative weights stays in their head.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. Differentiable with respect to weights and sharpness; in form "power" a
    weight of 0 has an infinite gradient where the sharpness is below 1. Second derivatives raise NotImplementedError.
    Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: B A N logarithms and exponentials, one read and one write of the weights; the backward as many logarithms,
    three reads and one write, and saves the arguments and the result.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, an unknown form or an eps that is not above 0.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, *_arguments(weights, sharpness, form, eps), backend=backend)


def _arguments(weights: Tensor, sharpness: Tensor, form: str, eps: float | None) -> tuple[Any, ...]:
    return weights, sharpness, *_forms.resolve(form, eps)


def _check_sharpen(weights: Tensor, sharpness: Tensor, in_powers: bool, eps: float) -> None:
    _forms.check(eps)
    _check.dtypes("weights", weights, _check.STATE_DTYPES)
    _check.same_kind(("weights", weights), ("sharpness", sharpness))
    _check.layouts(("weights", weights, "B A N"), ("sharpness", sharpness, "B A"))


def _check_backward(
    grad_new_weights: Tensor, new_weights: Tensor, weights: Tensor, sharpness: Tensor, *rest: Any
) -> None:
    *form, _output_mask = rest
    _check_sharpen(weights, sharpness, *form)
    others = (("grad_new_weights", grad_new_weights), ("new_weights", new_weights))
    _check.same_kind(("weights", weights), *others)
    _check.layouts(("weights", weights, "B A N"), *((name, tensor, "B A N") for name, tensor in others))


def _select_sharpen(weights: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(weights), "triton": _select.triton_refusal(weights, float64=True)}
    return _select.choose(STEM, weights, refusals, backend)


def _fake(weights: Tensor, *rest: Any) -> Tensor:
    return weights.new_empty(weights.shape)


def _fake_backward(
    grad_new_weights: Tensor, new_weights: Tensor, weights: Tensor, sharpness: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    wanted = zip((weights, sharpness), rest[-1], strict=True)
    return tuple(weights.new_empty(tensor.shape if wants else 0) for tensor, wants in wanted)


_SCHEMA = "Tensor weights, Tensor sharpness, bool in_powers, float eps"
_library.register(
    STEM,
    "sharpen",
    f"({_SCHEMA}, *, str? backend=None) -> Tensor",
    select=_select_sharpen,
    check=_check_sharpen,
    fake=_fake,
    translate=_arguments,
)
_library.register(
    STEM,
    "sharpen_backward",
    f"(Tensor grad_new_weights, Tensor new_weights, {_SCHEMA}, bool[2] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_sharpen(arguments[2], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, sharpness, ctx.in_powers, ctx.eps = inputs
    ctx.save_for_backward(output, weights, sharpness)


def _backward(ctx: Any, grad_new_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_new_weights is None:
        return (None,) * 4
    output_mask = ctx.needs_input_grad[:2]
    gradients = _library.call(
        "sharpen_backward", grad_new_weights, *ctx.saved_tensors, ctx.in_powers, ctx.eps, output_mask,
        backend=ctx.backend,
    )  # fmt: skip
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))
    return (*wanted, None, None)


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1))
