"""Additive attention over a small cache. Schema, checks, gradient and the public function."""

from typing import Any

import torch
from torch import Tensor

from fastmem import _check, _library, _select

STEM = "cached_attention"


def cached_attention(
    query: Tensor,
    keys: Tensor,
    cache: Tensor,
    score_weights: Tensor,
    mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Attends to a small cache of vectors by additive scores, whose projections the caller makes.

    .. math::
        e_{bj} = \sum_a v_a \tanh(q_{ba} + k_{bja}), \qquad w_{bj} = \mathrm{softmax}_j(e_{bj}), \qquad
        a_b = \sum_j w_{bj}\, d_{bj}

    (Bahdanau et al. 2015, "Neural Machine Translation by Jointly Learning to Align and Translate".) Le et al. 2019,
    "Learning to Remember More with Less Memorization", attend so to the hidden states since the last write:
    :math:`q = W h + V r` of the newest state and the last read, :math:`k_j = U d_j`. A key is made once, when its entry
    is pushed to the cache.

    Args:
        query (Tensor): what each sample looks for. Shape `[B, A]`.
        keys (Tensor): the projected entries. Shape `[B, L, A]`.
        cache (Tensor): the entries, any finite values. Shape `[B, L, H]`.
        score_weights (Tensor): what every element of the tanh counts, shared by all samples. Shape `[A]`.
        mask (Tensor, optional): bool, False leaves an entry out, whatever it holds. Shape `[B, L]`. Default: all in.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        What is attended to `[B, H]`, and the weights `[B, L]`, which sum to 1. Both are 0, and so are the gradients,
        where no entry takes part or every score is -inf. A score of +inf or NaN makes both NaN for its sample alone.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes and mask alone: reruns are bitwise equal. The C++ kernels read and
    write subnormal numbers (below 1.2e-38) as zero. Both results are differentiable with respect to query, keys, cache
    and score weights; second derivatives raise NotImplementedError. Under torch.func.grad and its kin the PyTorch
    reference runs, to any order.

    Cost: one read of `keys` and of `cache`, B L A hyperbolic tangents and 2 B L (A + H) flops. The backward reads both
    again, writes their gradients and makes the tangents anew; it saves the arguments and the weights. Slices of a
    longer history, as `history.transpose(0, 1)` of a `[T, B, H]` one, are read where they are; a copy is made of `keys`
    or `cache` whose last stride is not 1.

    Raises:
        TypeError: for a dtype other than float32 and float64 (bool for the mask), or dtypes that differ.
        ValueError: for shapes or devices that do not fit together.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, query, keys, cache, score_weights, mask, backend=backend)


def _check_cached_attention(
    query: Tensor, keys: Tensor, cache: Tensor, score_weights: Tensor, mask: Tensor | None
) -> None:
    _check.dtypes("query", query, _check.STATE_DTYPES)
    _check.same_kind(("query", query), ("keys", keys), ("cache", cache), ("score_weights", score_weights))
    _check.layouts(
        ("query", query, "B A"),
        ("keys", keys, "B L A"),
        ("cache", cache, "B L H"),
        ("score_weights", score_weights, "A"),
        ("mask", mask, "B L"),
    )
    if mask is not None:
        _check.dtypes("mask", mask, (torch.bool,))
        _check.same_kind(("query", query), ("mask", mask), device_only=True)


def _check_backward(
    grad_attended: Tensor | None,
    grad_weights: Tensor | None,
    weights: Tensor,
    query: Tensor,
    keys: Tensor,
    cache: Tensor,
    *rest: Any,
) -> None:
    _check_cached_attention(query, keys, cache, *rest[:-1])
    own = (("grad_attended", grad_attended, "B H"), ("grad_weights", grad_weights, "B L"), ("weights", weights, "B L"))
    _check.same_kind(("query", query), *((name, tensor) for name, tensor, _ in own))
    _check.layouts(("cache", cache, "B L H"), *own)


def _select_cached_attention(query: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(query), "triton": _select.triton_refusal(query, float64=True)}
    return _select.choose(STEM, query, refusals, backend)


def _fake(query: Tensor, keys: Tensor, cache: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, hidden = cache.shape
    return query.new_empty(batch, hidden), query.new_empty(batch, length)


def _fake_backward(
    grad_attended: Tensor | None, grad_weights: Tensor | None, weights: Tensor, *rest: Any
) -> tuple[Tensor, ...]:
    *differentiable, _mask, output_mask = rest
    wanted = zip(differentiable, output_mask, strict=True)
    return tuple(weights.new_empty(tensor.shape if wants else 0) for tensor, wants in wanted)


_SCHEMA = "Tensor query, Tensor keys, Tensor cache, Tensor score_weights, Tensor? mask"
_library.register(
    STEM,
    "cached_attention",
    f"({_SCHEMA}, *, str? backend=None) -> (Tensor, Tensor)",
    select=_select_cached_attention,
    check=_check_cached_attention,
    fake=_fake,
)
_library.register(
    STEM,
    "cached_attention_backward",
    f"(Tensor? grad_attended, Tensor? grad_weights, Tensor weights, {_SCHEMA}, bool[4] output_mask, *,"
    " str? backend=None) -> (Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_cached_attention(arguments[3], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx: Any, grad_attended: Tensor | None, grad_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = tuple(ctx.needs_input_grad[:4])
    arguments = (grad_attended, grad_weights, *ctx.saved_tensors, output_mask)
    gradients = _library.call(f"{STEM}_backward", *arguments, backend=ctx.backend)
    wanted = (gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))
    return (*wanted, None)


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1, 2, 4))
