"""Allocation in Triton: write weights that prefer the least used slots.

    u = eps + (1 - eps) usage,   order = stable ascending argsort of u
    weights[order_j] = (1 - u[order_j]) prod_{i<j} u[order_i]

A slot's place in the order is a count of the slots before it, so the sort needs no block that holds all slots. The
products along the order, and the sums of the backward against it, are scans, one program a sample. A later head
sees what the earlier ones leave; heads beyond the first are rare, and PyTorch's operators carry the usage between them.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._program import this_program

BLOCK_COUNT = 64  # slots that one program places, and slots that it compares them with at a time
BLOCK_SCAN = 256


@triton.jit
def floored(b_usage, EPS: tl.constexpr):
    return EPS + (1.0 - EPS) * b_usage


@triton.jit
def sort_key(p_usage, o_n, N, EPS: tl.constexpr):
    """u, NaN as the largest of all."""
    b_used = floored(tl.load(p_usage + o_n, mask=o_n < N, other=0.0), EPS)
    return tl.where(b_used != b_used, float("inf"), b_used)


@triton.jit
def allocation_kernel_order(
    p_usage,  # [B, N]
    p_order,  # [B, N], the slots from the least used on
    N,
    T,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_b = (i_p // T).to(tl.int64)
    p_usage += i_b * N
    o_i = i_p % T * BN + tl.arange(0, BN)
    b_mine = sort_key(p_usage, o_i, N, EPS)
    b_place = tl.zeros([BN], dtype=tl.int32)
    for i_t in range(T):
        o_j = i_t * BN + tl.arange(0, BN)
        b_other = sort_key(p_usage, o_j, N, EPS)
        less = b_other[None, :] < b_mine[:, None]
        tied = (b_other[None, :] == b_mine[:, None]) & (o_j[None, :] < o_i[:, None])
        b_place += tl.sum(((less | tied) & (o_j < N)[None, :]).to(tl.int32), 1)
    tl.store(p_order + i_b * N + b_place, o_i, mask=o_i < N)


@triton.jit
def multiply(before, factor):
    return before * factor


@triton.jit
def then(before_scale, before_offset, scale, offset):
    """The map x -> scale x + offset after another."""
    return scale * before_scale, scale * before_offset + offset


@triton.jit
def last(b_x, BN: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BN) == BN - 1, b_x, 0.0), 0)


@triton.jit
def product_before(p_usage, p_order, before, o_j, N, EPS: tl.constexpr):
    """prod_{i<j} u[order_i] for a block of j; `before` is that of the last j of the block before, 1 for the first."""
    m_j = (o_j > 0) & (o_j < N)
    b_slot = tl.load(p_order + o_j - 1, mask=m_j, other=0)
    b_used = floored(tl.load(p_usage + b_slot, mask=m_j, other=0.0), EPS)
    return before * tl.associative_scan(tl.where(m_j, b_used, 1.0), 0, multiply)


# These two are for tensors too, by their `fn`: one place for what PyTorch's operators and a fused step both compute.
@triton.jit
def left(used, gate, weight):
    """The usage that a head leaves to the next."""
    return used + (1.0 - used) * gate * weight


@triton.jit
def left_backward(grad_left, used, gate, weight):
    """Gradients of the usage and of the weight, and for each slot that of the gate."""
    into_free = (1.0 - used) * grad_left
    return grad_left * (1.0 - gate * weight), gate * into_free, into_free * weight


@triton.jit
def allocation_fwd_kernel(
    p_usage,  # [B, N]
    p_order,  # [B, N]
    p_weights,  # [B, N]
    stride_weights_b,
    N,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    i_p=None,
):
    i_b = this_program(i_p).to(tl.int64)
    p_usage += i_b * N
    p_order += i_b * N
    before = tl.full([], 1.0, p_usage.dtype.element_ty)
    for start in range(0, N, BN):
        o_j = start + tl.arange(0, BN)
        b_before = product_before(p_usage, p_order, before, o_j, N, EPS)
        before = last(b_before, BN)
        b_slot = tl.load(p_order + o_j, mask=o_j < N, other=0)
        b_used = floored(tl.load(p_usage + b_slot, mask=o_j < N, other=0.0), EPS)
        tl.store(p_weights + i_b * stride_weights_b + b_slot, (1.0 - b_used) * b_before, mask=o_j < N)


# later_j = g_{j+1} (1 - u_{j+1}) + u_{j+1} later_{j+1}, a chain of maps from the most used slot down, with u and
# g = grad_weights in order. Nothing is divided: the least used slots have u near zero.
@triton.jit
def allocation_bwd_kernel_later(
    p_grad_weights,  # [B, N]
    p_usage,  # [B, N]
    p_order,  # [B, N]
    p_difference,  # [B, N], later - g
    stride_grad_b,
    N,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    i_p=None,
):
    i_b = this_program(i_p).to(tl.int64)
    p_grad_weights += i_b * stride_grad_b
    p_usage += i_b * N
    p_order += i_b * N
    later = tl.full([], 0.0, p_usage.dtype.element_ty)
    for start in range(0, N, BN):
        o_j = N - 1 - start - tl.arange(0, BN)
        m_next = (o_j >= 0) & (o_j + 1 < N)
        b_next = tl.load(p_order + o_j + 1, mask=m_next, other=0)
        b_used = floored(tl.load(p_usage + b_next, mask=m_next, other=0.0), EPS)
        b_grad = tl.load(p_grad_weights + b_next, mask=m_next, other=0.0)
        b_scale = tl.where(m_next, b_used, 1.0)
        b_scale, b_offset = tl.associative_scan((b_scale, b_grad * (1.0 - b_used)), 0, then)
        b_later = b_scale * later + b_offset
        later = last(b_later, BN)
        b_slot = tl.load(p_order + o_j, mask=o_j >= 0, other=0)
        b_grad = tl.load(p_grad_weights + b_slot, mask=o_j >= 0, other=0.0)
        tl.store(p_difference + i_b * N + b_slot, b_later - b_grad, mask=o_j >= 0)


@triton.jit
def allocation_bwd_kernel(
    p_usage,  # [B, N]
    p_order,  # [B, N]
    p_difference,  # [B, N], later - g
    p_grad_usage,  # [B, N], added to
    N,
    EPS: tl.constexpr,
    BN: tl.constexpr,
    i_p=None,
):
    i_b = this_program(i_p).to(tl.int64)
    p_usage += i_b * N
    p_order += i_b * N
    before = tl.full([], 1.0, p_usage.dtype.element_ty)
    for start in range(0, N, BN):
        o_j = start + tl.arange(0, BN)
        b_before = product_before(p_usage, p_order, before, o_j, N, EPS)
        before = last(b_before, BN)
        b_slot = tl.load(p_order + o_j, mask=o_j < N, other=0)
        b_difference = tl.load(p_difference + i_b * N + b_slot, mask=o_j < N, other=0.0)
        p_slot = p_grad_usage + i_b * N + b_slot
        b_grad = tl.load(p_slot, mask=o_j < N, other=0.0)
        tl.store(p_slot, b_grad + (1.0 - EPS) * b_before * b_difference, mask=o_j < N)


def _order(usage: Tensor, eps: float) -> Tensor:
    B, N = usage.shape
    T = triton.cdiv(N, BLOCK_COUNT)
    order = usage.new_empty(B, N, dtype=torch.int32)
    allocation_kernel_order[(B * T,)](usage, order, N, T, eps, BLOCK_COUNT)
    return order


def _columns(gates: Tensor | None) -> tuple[Tensor, ...]:
    """A column [B, 1] for each head; one head alone needs none."""
    return () if gates is None else gates.unsqueeze(-1).unbind(1)


def allocation(usage: Tensor, gates: Tensor | None, eps: float) -> Tensor:
    B, N = usage.shape
    Q = 1 if gates is None else gates.shape[1]
    weights = usage.new_empty(B, Q, N)
    if usage.numel() == 0:
        return weights
    gate = _columns(gates)
    usage = usage.contiguous()
    with torch.cuda.device_of(usage):
        for q in range(Q):
            if q > 0:
                usage = left.fn(usage, gate[q - 1], weights[:, q - 1])
            allocation_fwd_kernel[(B,)](usage, _order(usage, eps), weights[:, q], Q * N, N, eps, BLOCK_SCAN)
    return weights


def allocation_backward(
    grad_weights: Tensor, weights: Tensor, usage: Tensor, gates: Tensor | None, eps: float, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    B, Q, N = weights.shape
    grad_usage, grad_gates = torch.zeros_like(usage, memory_format=torch.contiguous_format), usage.new_zeros(B, Q)
    if usage.numel():
        grad_weights, gate = grad_weights.contiguous(), _columns(gates)
        seen = [usage.contiguous()]
        for q in range(Q - 1):
            seen.append(left.fn(seen[q], gate[q], weights[:, q]))
        difference = torch.empty_like(grad_usage)
        with torch.cuda.device_of(usage):
            for q in reversed(range(Q)):
                into_weights = grad_weights[:, q]
                if q + 1 < Q:
                    grad_usage, more, by_slot = left_backward.fn(grad_usage, seen[q], gate[q], weights[:, q])
                    torch.sum(by_slot, -1, out=grad_gates[:, q])
                    into_weights = into_weights + more
                order = _order(seen[q], eps)
                allocation_bwd_kernel_later[(B,)](
                    into_weights, seen[q], order, difference, into_weights.stride(0), N, eps, BLOCK_SCAN
                )
                allocation_bwd_kernel[(B,)](seen[q], order, difference, grad_usage, N, eps, BLOCK_SCAN)
    return (
        grad_usage if output_mask[0] else usage.new_empty(0),
        grad_gates if output_mask[1] and gates is not None else usage.new_empty(0),
    )
