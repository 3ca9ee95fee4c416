"""Temporal linkage: which slot was written after which. Schema, checks, gradient and the public functions."""

from typing import Any

import torch
from torch import Tensor

from fastmem import _check, _library, _select

STEM = "temporal_linkage"


def temporal_linkage(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    r"""Updates the link matrix and reads it forward and backward, in one pass over it.

    .. math::
        L'_{ij} = (1 - w_i - w_j) L_{ij} + w_i p_j, \quad L'_{ii} = 0, \qquad p' = (1 - \sum_i w_i) p + w, \qquad
        f^r = L' r^r, \quad b^r = L'^\top r^r

    :math:`L_{ij}` near 1 says that slot i was written right after slot j (Graves et al. 2016, "Hybrid computing using a
    neural network with dynamic external memory", equations for temporal memory linkage). Each write head has a link of
    its own.

    Args:
        link (Tensor): link matrices, zero diagonal, rows and columns that sum to at most 1. Shape `[B, Q, N, N]`.
        precedence (Tensor): how recently each slot was written, sums to at most 1. Shape `[B, Q, N]`.
        write_weights (Tensor): the new write weights, in [0, 1], sums to at most 1. Shape `[B, Q, N]`.
        read_weights (Tensor): the previous read weights. Shape `[B, R, N]`.
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The new link `[B, Q, N, N]` and precedence `[B, Q, N]`, and the forward and backward weights `[B, Q, R, N]`.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. All results are differentiable with respect to all arguments; second
    derivatives raise NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any order.

    Cost: one read and one write of `link`, B Q N^2 (4 R + 4) flops; the backward one read of `link` and of its
    gradient, one write, and saves the arguments only.

    Raises:
        TypeError: for a dtype other than float32 and float64, or dtypes that differ.
        ValueError: for shapes or devices that do not fit together.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    return _library.call(STEM, link, precedence, write_weights, read_weights, backend=backend)


def temporal_linkage_(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """`temporal_linkage` for inference: writes the new link and precedence over the old, returns forward and backward.

    Arguments as for `temporal_linkage`; `link` and `precedence` must have dense rows and share no memory with each
    other or with the weights. It has no gradient: call it under `torch.no_grad()` or with tensors that do not require
    one (RuntimeError otherwise). Autograd notices when it overwrites a tensor that a gradient still needs.
    """
    return _library.call("temporal_linkage_", link, precedence, write_weights, read_weights, backend=backend)


def _check_temporal_linkage(link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> None:
    _check.dtypes("link", link, _check.STATE_DTYPES)
    _check.same_kind(
        ("link", link), ("precedence", precedence), ("write_weights", write_weights), ("read_weights", read_weights)
    )
    _check.layouts(
        ("link", link, "B Q N N"),
        ("precedence", precedence, "B Q N"),
        ("write_weights", write_weights, "B Q N"),
        ("read_weights", read_weights, "B R N"),
    )


def _check_in_place(link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> None:
    _check_temporal_linkage(link, precedence, write_weights, read_weights)
    if torch.is_grad_enabled() and any(t.requires_grad for t in (link, precedence, write_weights, read_weights)):
        raise RuntimeError("temporal_linkage_: expected torch.no_grad(), got arguments that require a gradient")
    _check.writable("link", link)
    _check.writable("precedence", precedence)
    for name, written in (("link", link), ("precedence", precedence)):
        others = (("write_weights", write_weights), ("read_weights", read_weights), ("link", link))
        _check.apart(name, written, *((other, tensor) for other, tensor in others if other != name))


def _check_backward(
    grad_link: Tensor | None,
    grad_precedence: Tensor | None,
    grad_forward: Tensor | None,
    grad_backward: Tensor | None,
    link: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    output_mask: list[bool],
) -> None:
    _check_temporal_linkage(link, precedence, write_weights, read_weights)
    gradients = (("grad_link", grad_link, "B Q N N"), ("grad_precedence", grad_precedence, "B Q N"),
                 ("grad_forward", grad_forward, "B Q R N"), ("grad_backward", grad_backward, "B Q R N"))  # fmt: skip
    _check.same_kind(("link", link), *((name, gradient) for name, gradient, _ in gradients))
    _check.layouts(("link", link, "B Q N N"), ("read_weights", read_weights, "B R N"), *gradients)


def _select_temporal_linkage(link: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(link), "triton": _select.triton_refusal(link)}
    return _select.choose(STEM, link, refusals, backend)


def _reads(link: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    shape = (link.shape[0], link.shape[1], read_weights.shape[1], link.shape[2])
    return link.new_empty(shape), link.new_empty(shape)


def _fake(link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> tuple[Tensor, ...]:
    return (link.new_empty(link.shape), link.new_empty(precedence.shape), *_reads(link, read_weights))


def _fake_in_place(link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> tuple[Tensor, ...]:
    return _reads(link, read_weights)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    *_, link, precedence, write_weights, read_weights, output_mask = arguments
    wanted = zip((link, precedence, write_weights, read_weights), output_mask, strict=True)
    return tuple(link.new_empty(tensor.shape if wants else 0) for tensor, wants in wanted)


_library.register(
    STEM,
    "temporal_linkage",
    "(Tensor link, Tensor precedence, Tensor write_weights, Tensor read_weights, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    select=_select_temporal_linkage,
    check=_check_temporal_linkage,
    fake=_fake,
)
_library.register(
    STEM,
    "temporal_linkage_",
    "(Tensor(a!) link, Tensor(b!) precedence, Tensor write_weights, Tensor read_weights, *, str? backend=None)"
    " -> (Tensor, Tensor)",
    select=_select_temporal_linkage,
    check=_check_in_place,
    fake=_fake_in_place,
)
_library.register(
    STEM,
    "temporal_linkage_backward",
    "(Tensor? grad_link, Tensor? grad_precedence, Tensor? grad_forward, Tensor? grad_backward, Tensor link,"
    " Tensor precedence, Tensor write_weights, Tensor read_weights, bool[4] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_temporal_linkage(arguments[4], backend=backend),
    check=_check_backward,
    fake=_fake_backward,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    output_mask = tuple(ctx.needs_input_grad[:4])
    gradients = _library.call("temporal_linkage_backward", *grads, *ctx.saved_tensors, output_mask, backend=ctx.backend)
    return tuple(gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True))


_library.register_autograd(STEM, _setup_context, _backward)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1, 2, 3))
