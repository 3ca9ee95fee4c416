"""Allocation: write weights that prefer the least used slots. Schema, checks, gradient and the public function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select

STEM = "allocation"
EPS = 1e-6


def allocation(usage: Tensor, gates: Tensor | None = None, eps: float = EPS, *, backend: str | None = None) -> Tensor:
    r"""Finds room: weights that fall off from the least used slot on.

    .. math::
        \hat u = \epsilon + (1 - \epsilon)\, u, \qquad
        a_{\varphi_j} = (1 - \hat u_{\varphi_j}) \prod_{i<j} \hat u_{\varphi_i}, \qquad
        u \leftarrow u + (1 - u)\, g_q\, a^q

    with :math:`\varphi` the slots in ascending order of :math:`\hat u` (Graves et al. 2016, "Hybrid computing using a
    neural network with dynamic external memory", equations for dynamic memory allocation). With several write heads
    each head sees the usage that the heads before it would leave, the last formula, as in the code published with it.

    Equal usages go by slot, the lowest first, and NaN comes last. The order is a constant for the gradient; where two
    usages cross, their slots swap weights.

    Args:
        usage (Tensor): how far each slot is in use, in [0, 1]. Shape `[B, N]`.
        gates (Tensor, optional): share of a full write that each head makes there, its allocation gate times its write
            gate, in [0, 1]; the last one has no effect. Shape `[B, Q]`. Default: None, one head.
        eps (float): in [0, 1). Published code of the DNC has 1e-6, other code 0. Default: 1e-6.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The weights `[B, Q, N]`, Q = 1 without gates, in [0, 1]. Those of a head sum to 1 less the product of all
        :math:`\hat u`: to nearly 1 while a slot is free, and to 0 where all are in full use.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Computes in the same
    dtype, in an order that depends on shapes and on the order of the usages alone: reruns are bitwise equal. The C++
    kernels read and write subnormal numbers (below 1.2e-38) as zero. Differentiable with respect to both arguments,
    without a division, so a usage may be zero; second derivatives raise NotImplementedError. Under torch.func.grad and
    its kin the PyTorch reference runs, to any order.

    Cost: for each head a sort of N usages (on CUDA devices N^2 comparisons) and a few flops a slot; the backward twice
    as much, and saves the arguments and the weights.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, or an eps outside [0, 1).
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, usage, gates, float(_check.share("eps", eps)), backend=backend)


def _check_allocation(usage: Tensor, gates: Tensor | None, eps: float) -> None:
    _check.share("eps", eps)
    _check.dtypes("usage", usage, _check.STATE_DTYPES)
    _check.same_kind(("usage", usage), ("gates", gates))
    _check.layouts(("usage", usage, "B N"), ("gates", gates, "B Q"))


def _check_backward(
    grad_weights: Tensor, weights: Tensor, usage: Tensor, gates: Tensor | None, eps: float, output_mask: list[bool]
) -> None:
    _check_allocation(usage, gates, eps)
    _check.same_kind(("usage", usage), ("grad_weights", grad_weights), ("weights", weights))
    _check.layouts(
        ("usage", usage, "B N"),
        ("gates", gates, "B Q"),
        ("grad_weights", grad_weights, "B Q N"),
        ("weights", weights, "B Q N"),
    )


def _select_allocation(usage: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(usage), "triton": _select.triton_refusal(usage, float64=True)}
    return _select.choose(STEM, usage, refusals, backend)


def _fake(usage: Tensor, gates: Tensor | None, eps: float) -> Tensor:
    return usage.new_empty(usage.shape[0], 1 if gates is None else gates.shape[1], usage.shape[1])


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *_, usage, gates, _eps, output_mask = arguments
    return tuple(
        usage.new_empty(tensor.shape if wants and tensor is not None else 0)
        for tensor, wants in zip((usage, gates), output_mask, strict=True)
    )


_library.register(
    STEM,
    "allocation",
    "(Tensor usage, Tensor? gates, float eps, *, str? backend=None) -> Tensor",
    select=_select_allocation,
    check=_check_allocation,
    fake=_fake,
)
_library.register(
    STEM,
    "allocation_backward",
    "(Tensor grad_weights, Tensor weights, Tensor usage, Tensor? gates, float eps, bool[2] output_mask, *,"
    " str? backend=None) -> (Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_allocation(arguments[2], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(output, *tensors)


def _backward(ctx: Any, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_weights is None:
        return None, None, None
    output_mask = tuple(ctx.needs_input_grad[:2])
    arguments = (grad_weights, *ctx.saved_tensors, ctx.eps, output_mask)
    gradients = _library.call(f"{STEM}_backward", *arguments, backend=ctx.backend)
    return *(gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True)), None


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1))
