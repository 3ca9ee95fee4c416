"""Location addressing in Triton.

    gated      = gate content + (1 - gate) previous
    shifted[i] = sum_j shift[j] gated[(i - j) mod N]
    weights    = sharpen(shifted)

One program owns one head. What a step hands to the next lies in memory, since a slot needs its neighbours': the shifted
weights where the result goes, in the backward their gradient too.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .sharpen import BLOCK, sharpen_head, sharpen_head_backward


@triton.jit
def gated_weights(p_content, p_previous, gate, o_n, m_n):
    b_content = tl.load(p_content + o_n, mask=m_n, other=0.0)
    b_previous = tl.load(p_previous + o_n, mask=m_n, other=0.0)
    return gate * b_content + (1.0 - gate) * b_previous


@triton.jit
def behind(o_n, i_tap, taps, N, DIRECTION: tl.constexpr):
    """The slots that tap i_tap moves to o_n; DIRECTION is 1, or -1 for a reversed shift. A remainder has the sign of
    what is divided, hence + N."""
    return (o_n - DIRECTION * (i_tap - taps // 2) % N + N) % N


@triton.jit
def store_shifted(
    p_content, p_previous, p_shift, gate, p_shifted, taps, N, DIRECTION: tl.constexpr, BN: tl.constexpr
):  # fmt: skip
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_shifted = tl.zeros([BN], dtype=gate.dtype)
        for i_tap in range(taps):
            o_from = behind(o_n, i_tap, taps, N, DIRECTION)
            b_shifted += tl.load(p_shift + i_tap) * gated_weights(p_content, p_previous, gate, o_from, o_n < N)
        tl.store(p_shifted + o_n, b_shifted, mask=o_n < N)
    # What follows reads what other threads have stored.
    tl.debug_barrier()


@triton.jit
def address_head(
    p_content,  # [H, N]
    p_previous,  # [H, N]
    p_gate,  # [H]
    p_shift,  # [H, taps]
    p_sharpness,  # [H]
    p_shifted,  # [H, N], scratch, may be p_weights
    p_weights,  # [H, N], may be p_previous if p_shifted is not
    i_h,
    N,
    taps,
    DIRECTION: tl.constexpr,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    o_h = i_h * N
    gate = tl.load(p_gate + i_h)
    sharpness = tl.load(p_sharpness + i_h)
    store_shifted(
        p_content + o_h, p_previous + o_h, p_shift + i_h * taps, gate, p_shifted + o_h, taps, N, DIRECTION, BN
    )  # fmt: skip
    sharpen_head(p_shifted + o_h, sharpness, p_weights + o_h, N, EPS, IN_POWERS, BN)


@triton.jit
def location_addressing_fwd_kernel(
    p_content,
    p_previous,
    p_gate,
    p_shift,
    p_sharpness,
    p_weights,
    N,
    taps,
    DIRECTION: tl.constexpr,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    address_head(
        p_content, p_previous, p_gate, p_shift, p_sharpness, p_weights, p_weights, tl.program_id(0).to(tl.int64),
        N, taps, DIRECTION, EPS, IN_POWERS, BN,
    )  # fmt: skip


@triton.jit
def address_head_backward(
    p_grad_weights,  # [H, N]
    p_weights,  # [H, N]
    p_content,  # [H, N]
    p_previous,  # [H, N]
    p_gate,  # [H]
    p_shift,  # [H, taps]
    p_sharpness,  # [H]
    p_grad_shifted,  # [H, N], scratch: the shifted weights, then their gradient
    p_grad_content,  # [H, N] or None
    p_grad_previous,  # [H, N] or None, may be p_grad_weights
    p_grad_gate,  # [H] or None
    p_grad_shift,  # [H, taps] or None
    p_grad_sharpness,  # [H] or None
    i_h,
    N,
    taps,
    DIRECTION: tl.constexpr,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    o_h = i_h * N
    p_content += o_h
    p_previous += o_h
    p_shift += i_h * taps
    p_grad_shifted += o_h
    gate = tl.load(p_gate + i_h)
    sharpness = tl.load(p_sharpness + i_h)
    if p_grad_sharpness is not None:
        p_grad_sharpness += i_h

    store_shifted(p_content, p_previous, p_shift, gate, p_grad_shifted, taps, N, DIRECTION, BN)
    sharpen_head_backward(
        p_grad_weights + o_h, p_weights + o_h, p_grad_shifted, sharpness, p_grad_shifted, p_grad_sharpness,
        N, EPS, IN_POWERS, BN,
    )  # fmt: skip
    tl.debug_barrier()

    if p_grad_shift is not None:
        for i_tap in range(taps):
            grad_tap = tl.full([], 0.0, gate.dtype)
            for i_n in range(0, N, BN):
                o_n = i_n + tl.arange(0, BN)
                o_from = behind(o_n, i_tap, taps, N, DIRECTION)
                b_gated = gated_weights(p_content, p_previous, gate, o_from, o_n < N)
                grad_tap += tl.sum(tl.load(p_grad_shifted + o_n, mask=o_n < N, other=0.0) * b_gated, 0)
            tl.store(p_grad_shift + i_h * taps + i_tap, grad_tap)

    grad_gate = tl.full([], 0.0, gate.dtype)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < N
        b_grad_gated = tl.zeros([BN], dtype=gate.dtype)
        for i_tap in range(taps):
            o_to = behind(o_n, i_tap, taps, N, -DIRECTION)
            b_grad_gated += tl.load(p_shift + i_tap) * tl.load(p_grad_shifted + o_to, mask=m_n, other=0.0)
        if p_grad_content is not None:
            tl.store(p_grad_content + o_h + o_n, gate * b_grad_gated, mask=m_n)
        if p_grad_previous is not None:
            tl.store(p_grad_previous + o_h + o_n, (1.0 - gate) * b_grad_gated, mask=m_n)
        if p_grad_gate is not None:
            b_content = tl.load(p_content + o_n, mask=m_n, other=0.0)
            b_previous = tl.load(p_previous + o_n, mask=m_n, other=0.0)
            grad_gate += tl.sum(b_grad_gated * (b_content - b_previous), 0)
    if p_grad_gate is not None:
        tl.store(p_grad_gate + i_h, grad_gate)


@triton.jit
def location_addressing_bwd_kernel(
    p_grad_weights,
    p_weights,
    p_content,
    p_previous,
    p_gate,
    p_shift,
    p_sharpness,
    p_grad_shifted,
    p_grad_content,
    p_grad_previous,
    p_grad_gate,
    p_grad_shift,
    p_grad_sharpness,
    N,
    taps,
    DIRECTION: tl.constexpr,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    address_head_backward(
        p_grad_weights, p_weights, p_content, p_previous, p_gate, p_shift, p_sharpness, p_grad_shifted,
        p_grad_content, p_grad_previous, p_grad_gate, p_grad_shift, p_grad_sharpness, tl.program_id(0).to(tl.int64),
        N, taps, DIRECTION, EPS, IN_POWERS, BN,
    )  # fmt: skip


def location_addressing(
    content: Tensor,
    previous: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharpness: Tensor,
    reversed_shift: bool,
    in_powers: bool,
    eps: float,
) -> Tensor:
    B, A, N = content.shape
    weights = content.new_empty(B, A, N)
    if weights.numel():
        with torch.cuda.device_of(content):
            location_addressing_fwd_kernel[(B * A,)](
                *(tensor.contiguous() for tensor in (content, previous, gate, shift, sharpness)), weights,
                N, shift.shape[-1], -1 if reversed_shift else 1, eps, in_powers, BLOCK,
            )  # fmt: skip
    return weights


def location_addressing_backward(
    grad_weights: Tensor,
    weights: Tensor,
    content: Tensor,
    previous: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharpness: Tensor,
    reversed_shift: bool,
    in_powers: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    B, A, N = content.shape
    inputs = tuple(tensor.contiguous() for tensor in (content, previous, gate, shift, sharpness))
    gradients = tuple(
        tensor.new_empty(tensor.shape if wants else 0) for tensor, wants in zip(inputs, output_mask, strict=True)
    )
    if content.numel() == 0 or not any(output_mask):
        for gradient in gradients:
            gradient.zero_()
        return gradients
    with torch.cuda.device_of(content):
        location_addressing_bwd_kernel[(B * A,)](
            grad_weights.contiguous(), weights.contiguous(), *inputs, content.new_empty(B, A, N),
            *(gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True)),
            N, shift.shape[-1], -1 if reversed_shift else 1, eps, in_powers, BLOCK,
        )  # fmt: skip
    return gradients
