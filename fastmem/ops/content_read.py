"""Content read: memory rows averaged by how much they resemble a key. Schema, checks, gradient and function."""

from typing import Any

import torch
from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _content

STEM = "content_read"


def content_read(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
    norm: str = "inner",
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Reads a memory by content: `content_addressing` and the weighted sum of rows in one pass, no weights stored.

    .. math::
        r_a = \sum_i w_{ai} m_i, \qquad w_{ai} = \mathrm{softmax}_i\big(\beta_a\, D(k_a, m_i)\big)

    (Graves et al. 2014, "Neural Turing Machines", and 2016, "Hybrid computing using a neural network with dynamic
    external memory".) :math:`D`, the norms and the masks are those of `content_addressing`.

    Args:
        memory (Tensor): any finite values, any number of rows. Shape `[B, N, W]`, or `[1, N, W]`: a bank that all
            samples share. May be bfloat16 or float16 when the rest is float32.
        keys (Tensor): what each head looks for. Shape `[B, A, W]`.
        strengths (Tensor): how sharply; usually at least 1, any sign is allowed. Shape `[B, A]`.
        key_mask (Tensor, optional): which words count, in [0, 1], differentiable. Shape `[B, A, W]`. Default: all.
        slot_mask (Tensor, optional): bool, False leaves a slot out, whatever it holds. Shape `[B, N]` or `[1, N]`.
            Default: all in.
        norm (str): "inner", "outer", "rsqrt", "clamp" or "width", as in `content_addressing`. Default: "inner".
        eps (float, optional): Default: 1e-6 for "inner", "outer" and "width", 1e-12 for "rsqrt", 1e-8 for "clamp".
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The reads `[B, A, W]` and the log of the softmax's normaliser `[B, A]`, which is not differentiable. Without a
        finite score they are 0 and -inf. A score of +inf or NaN makes both NaN for its head and sample alone.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments but the memory become float32. A
    low-precision memory gives float32 results and a gradient of its own dtype; on a CPU the PyTorch reference serves
    it. Accumulates in the results' dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++
    kernels read and write subnormal numbers (below 1.2e-38) as zero. The reads are differentiable with respect to
    memory, keys, strengths and key mask; second derivatives raise NotImplementedError. Under torch.func.grad and its
    kin the PyTorch reference runs, to any order.

    Cost: one read of `memory` (by all samples together where they share it) and 4 B N W A flops; the backward one read
    of `memory`, one write of its gradient and five times 2 B N W A flops, and saves the arguments and the results.

    Raises:
        TypeError: for a dtype other than those above (bool for the slot mask), or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, an unknown norm or a negative eps.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    arguments = (memory, keys, strengths, key_mask, slot_mask, norm, _content.resolve_eps(norm, eps))
    return _library.call(STEM, *arguments, backend=backend)


def _check_content_read(
    memory: Tensor, keys: Tensor, strengths: Tensor, key_mask: Tensor | None, slot_mask: Tensor | None, *rest: Any
) -> None:
    _check.dtypes("memory", memory, _check.BANK_DTYPES)
    low_precision = memory.dtype not in _check.STATE_DTYPES
    _check.dtypes("keys", keys, (torch.float32,) if low_precision else _check.STATE_DTYPES)
    _check.same_kind(("memory", memory), ("keys", keys), device_only=low_precision)
    _check.same_kind(("keys", keys), ("strengths", strengths), ("key_mask", key_mask))
    arguments = (memory, keys, strengths, key_mask, slot_mask, *rest)
    _content.check(*arguments, memory_layout="M N W", slot_mask_layout="S N")
    for name, tensor in (("memory", memory), ("slot_mask", slot_mask)):
        if tensor is not None and tensor.shape[0] not in (1, keys.shape[0]):
            raise ValueError(f"{name}: expected a first size of 1 or {keys.shape[0]}, got {tensor.shape[0]}")


def _check_backward(
    grad_reads: Tensor, reads: Tensor, logsumexp: Tensor, memory: Tensor, keys: Tensor, *rest: Any
) -> None:
    _check_content_read(memory, keys, *rest[:-1])
    _check.same_kind(("keys", keys), ("grad_reads", grad_reads), ("reads", reads), ("logsumexp", logsumexp))
    _check.layouts(
        ("keys", keys, "B A W"),
        ("grad_reads", grad_reads, "B A W"),
        ("reads", reads, "B A W"),
        ("logsumexp", logsumexp, "B A"),
    )


def _select_content_read(memory: Tensor, keys: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(keys, memory), "triton": _select.triton_refusal(keys)}
    return _select.choose(STEM, keys, refusals, backend)


def _fake(memory: Tensor, keys: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return keys.new_empty(keys.shape), keys.new_empty(keys.shape[:2])


_library.register(
    STEM,
    "content_read",
    f"({_content.SCHEMA}, *, str? backend=None) -> (Tensor, Tensor)",
    select=_select_content_read,
    check=_check_content_read,
    fake=_fake,
)
_library.register(
    STEM,
    "content_read_backward",
    f"(Tensor grad_reads, Tensor reads, Tensor logsumexp, {_content.SCHEMA}, bool[4] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_content_read(*arguments[3:5], backend=backend),
    check=_check_backward,
    fake=_content.fake_backward,
)
_content.register_autograd(STEM)
_library.register_autocast(STEM, keep=(0,))


def _vmap(
    info: Any, in_dims: tuple[int | None, ...], *arguments: Any, **keywords: Any
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """Folds the dimension into the batch; a bank or slot mask that all samples share stays shared."""
    keys, keys_dim = arguments[1], in_dims[1]
    batch = keys.shape[0] if keys_dim is None else keys.movedim(keys_dim, 0).shape[1]
    folded = list(arguments)
    for i, (argument, dim) in enumerate(zip(arguments, in_dims, strict=True)):
        may_share = i in (0, 4)
        if not isinstance(argument, Tensor) or (may_share and dim is None and argument.shape[0] == 1):
            continue
        each = argument.unsqueeze(0) if dim is None else argument.movedim(dim, 0)
        size = batch if may_share and each.shape[1] == 1 else each.shape[1]
        folded[i] = each.expand(info.batch_size, size, *each.shape[2:]).flatten(0, 1)
    outputs = torch.ops.fastmem.content_read.default(*folded, **keywords)
    return tuple(out.unflatten(0, (info.batch_size, batch)) for out in outputs), (0, 0)


torch.library.register_vmap(f"fastmem::{STEM}", _vmap, lib=_library.library)
