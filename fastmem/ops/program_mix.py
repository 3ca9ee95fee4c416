"""Program mix: a linear map mixed from stored programs. Schema, checks, gradient and the public function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _programs

STEM = "program_mix"


def program_mix(
    inputs: Tensor,
    program_weights: Tensor,
    weights: Tensor,
    biases: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Applies to every sample its own mixture of stored linear maps.

    .. math::
        y_b = \sum_p w_{bp}\, (x_b V_p + c_p)

    The mixed map [I, O] of a sample is never formed, nor the output of every program: the mixture weights multiply the
    inputs inside one matrix product (Le et al. 2020, "Neural Stored-program Memory"). :func:`program_lookup` finds the
    mixture weights by content as well.

    Args:
        inputs (Tensor): what the programs are applied to. Shape `[B, I]`.
        program_weights (Tensor): how much of each program; usually they sum to 1, any values are allowed.
            Shape `[B, P]`.
        weights (Tensor): the programs. Shape `[P, I, O]`.
        biases (Tensor, optional): Shape `[P, O]`. Default: none.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The outputs `[B, O]`; 0 where P = 0.

    Dtype: float32, or float64 throughout; `weights` and `biases` may be bfloat16 or float16 where the rest is float32,
    and their gradients then have that dtype; results are float32. Autocast casts everything but `weights` and `biases`.
    Accumulates in float32 (float64), in an order that depends on shapes alone: reruns are bitwise equal (large products
    are torch's, whose order may depend on the number of threads). The C++ kernels read and write subnormal numbers
    (below 1.2e-38) as zero. Differentiable with respect to all four tensors; second derivatives raise
    NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: one read of `weights` and 2 B P I O flops; the backward twice that and one write of the gradient of `weights`.
    It saves the arguments. `weights` whose last stride is not 1 are copied.

    Raises:
        TypeError: for a dtype other than these, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, inputs, program_weights, weights, biases, backend=backend)


def _check_program_mix(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor | None) -> None:
    _check.dtypes("inputs", inputs, _check.STATE_DTYPES)
    _check.same_kind(("inputs", inputs), ("program_weights", program_weights))
    _programs.check_dtypes(inputs, weights, biases)
    _check.layouts(
        ("inputs", inputs, "B I"),
        ("program_weights", program_weights, "B P"),
        ("weights", weights, "P I O"),
        ("biases", biases, "P O"),
    )


def _check_backward(
    grad_outputs: Tensor,
    inputs: Tensor,
    program_weights: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    output_mask: list[bool],
) -> None:
    _check_program_mix(inputs, program_weights, weights, biases)
    _check.same_kind(("inputs", inputs), ("grad_outputs", grad_outputs))
    _check.layouts(("inputs", inputs, "B I"), ("weights", weights, "P I O"), ("grad_outputs", grad_outputs, "B O"))


def _select_program_mix(
    inputs: Tensor, program_weights: Tensor, weights: Tensor, *rest: Any, backend: str | None = None
) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(inputs, weights), "triton": _select.triton_refusal(inputs)}
    return _select.choose(STEM, inputs, refusals, backend)


def _fake(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
    return inputs.new_empty(inputs.shape[0], weights.shape[2])


def _fake_backward(grad_outputs: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    *arguments, output_mask = rest
    return _programs.fake_gradients(grad_outputs, arguments, output_mask)


_SCHEMA = "Tensor inputs, Tensor program_weights, Tensor weights, Tensor? biases"
_library.register(
    STEM,
    "program_mix",
    f"({_SCHEMA}, *, str? backend=None) -> Tensor",
    select=_select_program_mix,
    check=_check_program_mix,
    fake=_fake,
)
_library.register(
    STEM,
    "program_mix_backward",
    f"(Tensor grad_outputs, {_SCHEMA}, bool[4] output_mask, *, str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_program_mix(*arguments[1:], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_outputs is None:
        return (None,) * 4
    output_mask = tuple(ctx.needs_input_grad[:4])
    gradients = _library.call(f"{STEM}_backward", grad_outputs, *ctx.saved_tensors, output_mask, backend=ctx.backend)
    return tuple(gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM, keep=(2, 3))
_library.register_vmap(STEM, batched=(0, 1))
