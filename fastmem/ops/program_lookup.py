"""Program lookup: a linear map mixed from stored programs. Schema, checks, gradient and the public function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _content, _programs

STEM = "program_lookup"


def program_lookup(
    inputs: Tensor,
    query: Tensor,
    strength: Tensor,
    keys: Tensor,
    weights: Tensor,
    biases: Tensor | None = None,
    norm: str = "inner",
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Applies to every sample its own mixture of stored linear maps, found by content.

    .. math::
        w_{bp} = \mathrm{softmax}_p\big(\beta_b\, D(q_b, k_p)\big), \qquad
        y_b = \sum_p w_{bp}\, (x_b V_p + c_p), \qquad
        D(q, k) = \frac{q \cdot k}{|q|\,|k| + \delta}

    The mixed map [I, O] of a sample is never formed, nor the output of every program: the mixture weights multiply the
    inputs inside one matrix product (Le et al. 2020, "Neural Stored-program Memory"). :func:`program_mix` takes the
    mixture weights as they are given.

    Args:
        inputs (Tensor): what the programs are applied to. Shape `[B, I]`.
        query (Tensor): what each sample looks for. Shape `[B, K]`.
        strength (Tensor): how sharply; usually positive, any sign is allowed. Shape `[B]`.
        keys (Tensor): the name of each program, shared by all samples. Shape `[P, K]`.
        weights (Tensor): the programs. Shape `[P, I, O]`.
        biases (Tensor, optional): Shape `[P, O]`. Default: none.
        norm (str): how lengths stay away from zero: "inner", "outer", "rsqrt", "clamp" or "width", see
            `content_addressing`. The last is that of the published code. Default: "inner".
        eps (float, optional): Default: 1e-6 for "inner", "outer" and "width", 1e-12 for "rsqrt", 1e-8 for "clamp".
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The outputs `[B, O]` and the program weights `[B, P]`, which sum to 1 (0 where P = 0 or every score is -inf).
        A score of +inf or NaN makes the results of its sample NaN, and no others.

    Dtype: float32, or float64 throughout; `weights` and `biases` may be bfloat16 or float16 where the rest is float32,
    and their gradients then have that dtype; results are float32. Autocast casts everything but `weights` and `biases`.
    Accumulates in float32 (float64), in an order that depends on shapes alone: reruns are bitwise equal (large products
    are torch's, whose order may depend on the number of threads). The C++ kernels read and write subnormal numbers
    (below 1.2e-38) as zero. Both results are differentiable with respect to all six tensors; second derivatives raise
    NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: one read of `weights` and 2 B P I O flops; the backward twice that and one write of the gradient of `weights`.
    It saves the arguments and the program weights. `weights` whose last stride is not 1 are copied.

    Raises:
        TypeError: for a dtype other than these, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, an unknown norm or a negative eps.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    arguments = (inputs, query, strength, keys, weights, biases, norm, _content.resolve_eps(norm, eps))
    return _library.call(STEM, *arguments, backend=backend)


def _check_program_lookup(
    inputs: Tensor,
    query: Tensor,
    strength: Tensor,
    keys: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    norm: str,
    eps: float,
) -> None:
    _content.check_norm(norm, eps)
    _check.dtypes("inputs", inputs, _check.STATE_DTYPES)
    _check.same_kind(("inputs", inputs), ("query", query), ("strength", strength), ("keys", keys))
    _programs.check_dtypes(inputs, weights, biases)
    _check.layouts(
        ("inputs", inputs, "B I"),
        ("query", query, "B K"),
        ("strength", strength, "B"),
        ("keys", keys, "P K"),
        ("weights", weights, "P I O"),
        ("biases", biases, "P O"),
    )


def _check_backward(
    grad_outputs: Tensor | None,
    grad_program_weights: Tensor | None,
    program_weights: Tensor,
    inputs: Tensor,
    query: Tensor,
    strength: Tensor,
    keys: Tensor,
    weights: Tensor,
    *rest: Any,
) -> None:
    _check_program_lookup(inputs, query, strength, keys, weights, *rest[:-1])
    own = (("grad_outputs", grad_outputs, "B O"), ("grad_program_weights", grad_program_weights, "B P"),
           ("program_weights", program_weights, "B P"))  # fmt: skip
    _check.same_kind(("inputs", inputs), *((name, tensor) for name, tensor, _ in own))
    _check.layouts(("inputs", inputs, "B I"), ("weights", weights, "P I O"), *own)


def _select_program_lookup(
    inputs: Tensor,
    query: Tensor,
    strength: Tensor,
    keys: Tensor,
    weights: Tensor,
    *rest: Any,
    backend: str | None = None,
) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(inputs, weights), "triton": _select.triton_refusal(inputs)}
    return _select.choose(STEM, inputs, refusals, backend)


def _fake(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    batch = inputs.shape[0]
    return inputs.new_empty(batch, weights.shape[2]), inputs.new_empty(batch, keys.shape[0])


def _fake_backward(
    grad_outputs: Tensor | None, grad_program_weights: Tensor | None, program_weights: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *differentiable, _norm, _eps, output_mask = rest
    return _programs.fake_gradients(program_weights, differentiable, output_mask)


_SCHEMA = (
    "Tensor inputs, Tensor query, Tensor strength, Tensor keys, Tensor weights, Tensor? biases, str norm, float eps"
)
_library.register(
    STEM,
    "program_lookup",
    f"({_SCHEMA}, *, str? backend=None) -> (Tensor, Tensor)",
    select=_select_program_lookup,
    check=_check_program_lookup,
    fake=_fake,
)
_library.register(
    STEM,
    "program_lookup_backward",
    f"(Tensor? grad_outputs, Tensor? grad_program_weights, Tensor program_weights, {_SCHEMA}, bool[6] output_mask, *,"
    " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_program_lookup(*arguments[3:], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.norm, ctx.eps = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(ctx: Any, grad_outputs: Tensor | None, grad_program_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = tuple(ctx.needs_input_grad[:6])
    arguments = (grad_outputs, grad_program_weights, *ctx.saved_tensors, ctx.norm, ctx.eps, output_mask)
    gradients = _library.call(f"{STEM}_backward", *arguments, backend=ctx.backend)
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))
    return (*wanted, None, None)


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM, keep=(4, 5))
_library.register_vmap(STEM, batched=(0, 1, 2))
