"""Content addressing: weights over memory rows by how much they resemble a key. Schema, checks, gradient, function."""

from typing import Any

from torch import Tensor

from fastmem import _check, _library, _select
from fastmem.ops import _content

STEM = "content_addressing"


def content_addressing(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None = None,
    slot_mask: Tensor | None = None,
    norm: str = "inner",
    eps: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    r"""Softmax over memory rows of strength times cosine similarity, for every head in one pass over the memory.

    .. math::
        w_{ai} = \mathrm{softmax}_i\big(\beta_a\, D(k_a, m_i)\big), \qquad
        D(k, m) = \frac{k \cdot m}{|k|\,|m| + \delta}

    (Graves et al. 2014, "Neural Turing Machines", and 2016, "Hybrid computing using a neural network with dynamic
    external memory".) A key mask c compares :math:`c \circ k` with :math:`c \circ m_i` (Csordas and Schmidhuber 2019,
    "Improving Differentiable Neural Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness
    Control").

    Args:
        memory (Tensor): any finite values; a zero row has similarity 0. Shape `[B, N, W]`.
        keys (Tensor): what each head looks for. Shape `[B, A, W]`.
        strengths (Tensor): how sharply; usually at least 1, any sign is allowed. Shape `[B, A]`.
        key_mask (Tensor, optional): which words count, in [0, 1], differentiable. Shape `[B, A, W]`. Default: all.
        slot_mask (Tensor, optional): bool, False leaves a slot out, whatever it holds. Shape `[B, N]`. Default: all in.
        norm (str): how lengths stay away from zero. "inner": sqrt(sum x^2 + eps), "outer": the plain length, both with
            delta = eps; "rsqrt": sqrt(max(sum x^2, eps)), "clamp": max(length, eps), both with delta = 0; "width":
            length + eps with delta = eps, the key's times W, which makes scores W times smaller (the code published
            with Le et al. 2020, "Neural Stored-program Memory"). Default: "inner".
        eps (float, optional): Default: 1e-6 for "inner", "outer" and "width", 1e-12 for "rsqrt", 1e-8 for "clamp".
        backend (str, optional): forces "cpp", "triton" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The weights `[B, A, N]`, in [0, 1]. They sum to 1 over the slots that take part; with none, or with every score
        -inf, they are 0. A score of +inf or NaN makes the weights of its head and sample NaN, and no others.

    Dtype: float32, or float64 throughout; under autocast low-precision arguments become float32. Accumulates in the
    same dtype, in an order that depends on shapes alone: reruns are bitwise equal. The C++ kernels read and write
    subnormal numbers (below 1.2e-38) as zero. Differentiable with respect to memory, keys, strengths and key mask;
    second derivatives raise NotImplementedError. Under torch.func.grad and its kin the PyTorch reference runs, to any
    order.

    Cost: one read of `memory` and 2 B N W (A + 1) flops (twice the products with a key mask); the backward one read of
    `memory`, one write of its gradient, three times the flops, and saves the arguments and the weights.

    Raises:
        TypeError: for a dtype other than float32 and float64 (bool for the slot mask), or dtypes that differ.
        ValueError: for shapes or devices that do not fit together, an unknown norm or a negative eps.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    arguments = (memory, keys, strengths, key_mask, slot_mask, norm, _content.resolve_eps(norm, eps))
    return _library.call(STEM, *arguments, backend=backend)


def _check_content_addressing(
    memory: Tensor, keys: Tensor, strengths: Tensor, key_mask: Tensor | None, *rest: Any
) -> None:
    _check.dtypes("memory", memory, _check.STATE_DTYPES)
    _check.same_kind(("memory", memory), ("keys", keys), ("strengths", strengths), ("key_mask", key_mask))
    _content.check(memory, keys, strengths, key_mask, *rest, memory_layout="B N W", slot_mask_layout="B N")


def _check_backward(grad_weights: Tensor, weights: Tensor, memory: Tensor, keys: Tensor, *rest: Any) -> None:
    _check_content_addressing(memory, keys, *rest[:-1])
    _check.same_kind(("memory", memory), ("grad_weights", grad_weights), ("weights", weights))
    _check.layouts(
        ("memory", memory, "B N W"),
        ("keys", keys, "B A W"),
        ("grad_weights", grad_weights, "B A N"),
        ("weights", weights, "B A N"),
    )


def _select_content_addressing(memory: Tensor, *arguments: Any, backend: str | None = None) -> _select.Choice:
    refusals = {"cpp": _select.cpp_refusal(memory), "triton": _select.triton_refusal(memory)}
    return _select.choose(STEM, memory, refusals, backend)


def _fake(memory: Tensor, keys: Tensor, *rest: Any) -> Tensor:
    return memory.new_empty(memory.shape[0], keys.shape[1], memory.shape[1])


_library.register(
    STEM,
    "content_addressing",
    f"({_content.SCHEMA}, *, str? backend=None) -> Tensor",
    select=_select_content_addressing,
    check=_check_content_addressing,
    fake=_fake,
)
_library.register(
    STEM,
    "content_addressing_backward",
    f"(Tensor grad_weights, Tensor weights, {_content.SCHEMA}, bool[4] output_mask, *, str? backend=None)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    select=lambda *arguments, backend=None: _select_content_addressing(arguments[2], backend=backend),
    check=_check_backward,
    fake=_content.fake_backward,
)
_content.register_autograd(STEM)
_library.register_autocast(STEM)
_library.register_vmap(STEM, batched=(0, 1, 2, 3, 4))
