"""Usage of the slots in Triton.

    retention = prod_r (1 - free_r read_r)
    usage'    = (1 - (1 - usage) prod_q (1 - write_q)) retention

One program owns a tile of slots of one sample. The backward multiplies all factors but one afresh for each head, so
that nothing is divided and nothing but the sums over slots of the free gates' gradients is kept.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._program import this_program

BLOCK = 256


@triton.jit
def kept(p_weights, p_gates, i_h, o_n, m_n, N):
    """1 - gate weight of one head; without gates they are 1."""
    b_weight = tl.load(p_weights + i_h * N + o_n, mask=m_n, other=0.0)
    if p_gates is not None:
        b_weight *= tl.load(p_gates + i_h)
    return 1.0 - b_weight


@triton.jit
def times_others(b_value, p_weights, p_gates, i_b, i_head, heads, o_n, m_n, N):
    """The value times what every head but one keeps; all heads, where `i_head` is none of them."""
    for i_other in range(heads):
        b_kept = kept(p_weights, p_gates, i_b * heads + i_other, o_n, m_n, N)
        b_value = tl.where(i_other == i_head, b_value, b_value * b_kept)
    return b_value


@triton.jit
def used_and_retention(p_usage, p_write_weights, p_read_weights, p_free_gates, i_b, o_n, m_n, N, Q, R):
    b_used = tl.load(p_usage + i_b * N + o_n, mask=m_n, other=0.0)
    # Head by head: the same product, but a small weight on a free slot is not rounded against 1, and a full slot
    # stays at 1.
    for i_q in range(Q):
        b_write = tl.load(p_write_weights + (i_b * Q + i_q) * N + o_n, mask=m_n, other=0.0)
        b_used += b_write * (1.0 - b_used)
    one = tl.full(o_n.shape, 1.0, b_used.dtype)
    return b_used, times_others(one, p_read_weights, p_free_gates, i_b, R, R, o_n, m_n, N)


@triton.jit
def usage_update_fwd_kernel(
    p_usage,  # [B, N]
    p_write_weights,  # [B, Q, N]
    p_read_weights,  # [B, R, N]
    p_free_gates,  # [B, R]
    p_new_usage,  # [B, N]
    p_retention,  # [B, N]
    N,
    Q,
    R,
    T,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_b = (i_p // T).to(tl.int64)
    o_n = i_p % T * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_used, b_retention = used_and_retention(
        p_usage, p_write_weights, p_read_weights, p_free_gates, i_b, o_n, m_n, N, Q, R
    )
    tl.store(p_new_usage + i_b * N + o_n, b_used * b_retention, mask=m_n)
    tl.store(p_retention + i_b * N + o_n, b_retention, mask=m_n)


@triton.jit
def usage_update_bwd_kernel(
    p_grad_new_usage,  # [B, N] or None
    p_grad_retention,  # [B, N] or None
    p_usage,  # [B, N]
    p_write_weights,  # [B, Q, N]
    p_read_weights,  # [B, R, N]
    p_free_gates,  # [B, R]
    p_grad_usage,  # [B, N] or None
    p_grad_write_weights,  # [B, Q, N] or None
    p_grad_read_weights,  # [B, R, N] or None
    p_sums,  # [B, R, T] or None, the gradients of the free gates over each tile
    N,
    Q,
    R,
    T,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_t = i_p % T
    i_b = (i_p // T).to(tl.int64)
    o_n = i_t * BN + tl.arange(0, BN)
    m_n = o_n < N
    b_used, b_retention = used_and_retention(
        p_usage, p_write_weights, p_read_weights, p_free_gates, i_b, o_n, m_n, N, Q, R
    )
    b_grad_used = tl.zeros_like(b_used)
    b_grad_retention = tl.zeros_like(b_used)
    if p_grad_new_usage is not None:
        b_grad = tl.load(p_grad_new_usage + i_b * N + o_n, mask=m_n, other=0.0)
        b_grad_used = b_grad * b_retention
        b_grad_retention = b_grad * b_used
    if p_grad_retention is not None:
        b_grad_retention += tl.load(p_grad_retention + i_b * N + o_n, mask=m_n, other=0.0)

    if p_grad_usage is not None:
        b_grad = times_others(b_grad_used, p_write_weights, None, i_b, Q, Q, o_n, m_n, N)
        tl.store(p_grad_usage + i_b * N + o_n, b_grad, mask=m_n)
    if p_grad_write_weights is not None:
        b_grad_used *= 1.0 - tl.load(p_usage + i_b * N + o_n, mask=m_n, other=0.0)
        for i_q in range(Q):
            b_grad = times_others(b_grad_used, p_write_weights, None, i_b, i_q, Q, o_n, m_n, N)
            tl.store(p_grad_write_weights + (i_b * Q + i_q) * N + o_n, b_grad, mask=m_n)
    if (p_grad_read_weights is not None) or (p_sums is not None):
        for i_r in range(R):
            i_h = i_b * R + i_r
            b_grad = -times_others(b_grad_retention, p_read_weights, p_free_gates, i_b, i_r, R, o_n, m_n, N)
            if p_grad_read_weights is not None:
                tl.store(p_grad_read_weights + i_h * N + o_n, b_grad * tl.load(p_free_gates + i_h), mask=m_n)
            if p_sums is not None:
                b_read = tl.load(p_read_weights + i_h * N + o_n, mask=m_n, other=0.0)
                tl.store(p_sums + i_h * T + i_t, tl.sum(b_grad * b_read, 0))


def usage_update(
    usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor
) -> tuple[Tensor, Tensor]:
    B, N = usage.shape
    Q, R = write_weights.shape[1], read_weights.shape[1]
    new_usage, retention = usage.new_empty(B, N), usage.new_empty(B, N)
    inputs = (tensor.contiguous() for tensor in (usage, write_weights, read_weights, free_gates))
    if usage.numel():
        T = triton.cdiv(N, BLOCK)
        with torch.cuda.device_of(usage):
            usage_update_fwd_kernel[(B * T,)](*inputs, new_usage, retention, N, Q, R, T, BLOCK)
    return new_usage, retention


def usage_update_backward(
    grad_usage: Tensor | None,
    grad_retention: Tensor | None,
    usage: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    free_gates: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N = usage.shape
    Q, R = write_weights.shape[1], read_weights.shape[1]
    inputs = usage, write_weights, read_weights, free_gates
    gradients = [usage.new_empty(x.shape if wants else 0) for x, wants in zip(inputs, output_mask, strict=True)]
    grad_old_usage, grad_write_weights, grad_read_weights, grad_free_gates = gradients
    want_usage, want_write, want_read, want_gates = output_mask
    T = triton.cdiv(N, BLOCK)
    sums = usage.new_empty(B, R, T)
    if usage.numel() and any(output_mask):
        upstream = (None if grad is None else grad.contiguous() for grad in (grad_usage, grad_retention))
        with torch.cuda.device_of(usage):
            usage_update_bwd_kernel[(B * T,)](
                *upstream, *(tensor.contiguous() for tensor in inputs),
                grad_old_usage if want_usage else None, grad_write_weights if want_write else None,
                grad_read_weights if want_read else None, sums if want_gates else None,
                N, Q, R, T, BLOCK,
            )  # fmt: skip
    if want_gates:
        torch.sum(sums, -1, out=grad_free_gates)
    return grad_old_usage, grad_write_weights, grad_read_weights, grad_free_gates
