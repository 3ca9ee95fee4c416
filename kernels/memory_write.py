"""Memory write in Triton.

    memory'[i] = memory[i] retention[i] prod over q of (1 - w[q, i] erase[q]) + sum over q of w[q, i] values[q]

A program of the forward owns a tile. Those of the backward own a block of slots with their whole words, for all heads
or for one: they end what sums over a word and leave the sums over their slots, the gradients of erase and values, as
partials that another kernel adds in order. The product over the other heads, which the gradient of a head needs, is
formed anew, without a division. All arithmetic is in the dtype of the memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import unit_stride
from ._program import this_program
from ._tiles import block, load_tile, store_tile, sum_of_parts, tile_size


@triton.jit
def kept(p_write_weights, p_erase, first, last, o_n, m_n, o_w, m_w, N, W):
    """What the heads from first to before last keep of a tile: the product of 1 - w[q] (x) erase[q]."""
    b_kept = tl.full([o_n.shape[0], o_w.shape[0]], 1.0, dtype=p_erase.dtype.element_ty)
    for i_q in range(first, last):
        b_weight = tl.load(p_write_weights + tl.cast(i_q, tl.int64) * N + o_n, mask=m_n, other=0.0)
        b_erase = tl.load(p_erase + i_q * W + o_w, mask=m_w, other=0.0)
        b_kept *= 1.0 - b_weight[:, None] * b_erase[None, :]
    return b_kept


@triton.jit
def added(p_write_weights, p_values, first, last, o_n, m_n, o_w, m_w, N, W):
    """What the heads from first to before last add to a tile: the sum of w[q] (x) values[q]."""
    b_added = tl.zeros([o_n.shape[0], o_w.shape[0]], dtype=p_values.dtype.element_ty)
    for i_q in range(first, last):
        b_weight = tl.load(p_write_weights + tl.cast(i_q, tl.int64) * N + o_n, mask=m_n, other=0.0)
        b_value = tl.load(p_values + i_q * W + o_w, mask=m_w, other=0.0)
        b_added += b_weight[:, None] * b_value[None, :]
    return b_added


@triton.jit
def value_gradient(b_grad, b_weight):
    """What a tile [BN, BW] gives to the gradient of the values [BW] of a head."""
    return tl.sum(b_weight[:, None] * b_grad, 0)


@triton.jit
def erase_gradient(b_erased, b_weight):
    """The same of its erase [BW]; b_erased is the gradient times the memory as the other heads leave it."""
    return -tl.sum(b_weight[:, None] * b_erased, 0)


@triton.jit
def weight_gradient(b_grad, b_erased, b_erase, b_value):
    """The same of its weights [BN]."""
    return tl.sum(b_grad * b_value[None, :] - b_erased * b_erase[None, :], 1)


@triton.jit
def load_retention(p_retention, o_n, m_n, DTYPE: tl.constexpr):
    if p_retention is not None:
        b_retention = tl.load(p_retention + o_n, mask=m_n, other=0.0)
    else:
        b_retention = tl.full([o_n.shape[0]], 1.0, dtype=DTYPE)
    return b_retention


@triton.jit
def memory_write_fwd_kernel(
    p_memory,  # [B, N, W]
    p_write_weights,  # [B, Q, N]
    p_erase,  # [B, Q, W]
    p_values,  # [B, Q, W]
    p_retention,  # [B, N] or None
    p_new_memory,  # [B, N, W], may be p_memory
    stride_memory_b,
    stride_memory_n,
    stride_new_b,
    stride_new_n,
    Q,
    N,
    W,
    BN: tl.constexpr,
    BW: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    o_w, m_w = block(i_p % tl.cdiv(W, BW) * BW, W, BW)
    i_p = i_p // tl.cdiv(W, BW)
    i_n = (i_p % tl.cdiv(N, BN)).to(tl.int64) * BN
    i_b = (i_p // tl.cdiv(N, BN)).to(tl.int64)
    o_n = tl.arange(0, BN)
    m_n = i_n + o_n < N
    p_write_weights += i_b * Q * N + i_n
    p_erase += i_b * Q * W
    p_values += i_b * Q * W

    b_memory = load_tile(p_memory + i_b * stride_memory_b + i_n * stride_memory_n, stride_memory_n, o_n, m_n, o_w, m_w)
    b_memory *= kept(p_write_weights, p_erase, 0, Q, o_n, m_n, o_w, m_w, N, W)
    b_memory *= load_retention(p_retention, i_b * N + i_n + o_n, m_n, p_memory.dtype.element_ty)[:, None]
    b_memory += added(p_write_weights, p_values, 0, Q, o_n, m_n, o_w, m_w, N, W)
    p_new_memory += i_b * stride_new_b + i_n * stride_new_n
    store_tile(p_new_memory, b_memory, stride_new_n, o_n, m_n, o_w, m_w)


@triton.jit
def memory_write_bwd_kernel_slots(
    p_grad_new_memory,  # [B, N, W]
    p_memory,  # [B, N, W]
    p_write_weights,  # [B, Q, N]
    p_erase,  # [B, Q, W]
    p_retention,  # [B, N] or None
    p_grad_memory,  # [B, N, W] or None
    p_grad_retention,  # [B, N] or None
    stride_grad_b,
    stride_grad_n,
    stride_memory_b,
    stride_memory_n,
    Q,
    N,
    W,
    BN: tl.constexpr,
    BW: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_n = (i_p % tl.cdiv(N, BN)).to(tl.int64) * BN
    i_b = (i_p // tl.cdiv(N, BN)).to(tl.int64)
    o_n = tl.arange(0, BN)
    m_n = i_n + o_n < N
    p_grad_new_memory += i_b * stride_grad_b + i_n * stride_grad_n
    p_memory += i_b * stride_memory_b + i_n * stride_memory_n
    p_write_weights += i_b * Q * N + i_n
    p_erase += i_b * Q * W
    b_retention = load_retention(p_retention, i_b * N + i_n + o_n, m_n, p_memory.dtype.element_ty)

    b_sum = tl.zeros([BN], dtype=p_memory.dtype.element_ty)
    for i_w in range(0, W, BW):
        o_w, m_w = block(i_w, W, BW)
        b_grad = load_tile(p_grad_new_memory, stride_grad_n, o_n, m_n, o_w, m_w)
        b_grad *= kept(p_write_weights, p_erase, 0, Q, o_n, m_n, o_w, m_w, N, W)
        if p_grad_memory is not None:
            p_rows = p_grad_memory + (i_b * N + i_n) * W
            store_tile(p_rows, b_grad * b_retention[:, None], W, o_n, m_n, o_w, m_w)
        if p_grad_retention is not None:
            b_sum += tl.sum(b_grad * load_tile(p_memory, stride_memory_n, o_n, m_n, o_w, m_w), 1)
    if p_grad_retention is not None:
        tl.store(p_grad_retention + i_b * N + i_n + o_n, b_sum, mask=m_n)


@triton.jit
def memory_write_bwd_kernel_heads(
    p_grad_new_memory,  # [B, N, W]
    p_memory,  # [B, N, W]
    p_write_weights,  # [B, Q, N]
    p_erase,  # [B, Q, W]
    p_values,  # [B, Q, W]
    p_retention,  # [B, N] or None
    p_grad_write_weights,  # [B, Q, N] or None
    p_erase_parts,  # [T, B, Q, W] or None
    p_value_parts,  # [T, B, Q, W] or None
    stride_grad_b,
    stride_grad_n,
    stride_memory_b,
    stride_memory_n,
    B,
    Q,
    N,
    W,
    BN: tl.constexpr,
    BW: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_q = (i_p % Q).to(tl.int64)
    i_t = (i_p // Q % tl.cdiv(N, BN)).to(tl.int64)
    i_b = (i_p // Q // tl.cdiv(N, BN)).to(tl.int64)
    i_n = i_t * BN
    o_n = tl.arange(0, BN)
    m_n = i_n + o_n < N
    p_grad_new_memory += i_b * stride_grad_b + i_n * stride_grad_n
    p_memory += i_b * stride_memory_b + i_n * stride_memory_n
    p_write_weights += i_b * Q * N + i_n
    p_erase += i_b * Q * W
    p_values += (i_b * Q + i_q) * W
    b_retention = load_retention(p_retention, i_b * N + i_n + o_n, m_n, p_memory.dtype.element_ty)
    b_weight = tl.load(p_write_weights + i_q * N + o_n, mask=m_n, other=0.0)

    b_sum = tl.zeros([BN], dtype=p_memory.dtype.element_ty)
    for i_w in range(0, W, BW):
        o_w, m_w = block(i_w, W, BW)
        o_part = ((i_t * B + i_b) * Q + i_q) * W + o_w
        b_grad = load_tile(p_grad_new_memory, stride_grad_n, o_n, m_n, o_w, m_w)
        if p_value_parts is not None:
            tl.store(p_value_parts + o_part, value_gradient(b_grad, b_weight), mask=m_w)
        if (p_grad_write_weights is not None) or (p_erase_parts is not None):
            b_erased = b_grad * load_tile(p_memory, stride_memory_n, o_n, m_n, o_w, m_w) * b_retention[:, None]
            b_erased *= kept(p_write_weights, p_erase, 0, i_q, o_n, m_n, o_w, m_w, N, W)
            b_erased *= kept(p_write_weights, p_erase, i_q + 1, Q, o_n, m_n, o_w, m_w, N, W)
            if p_erase_parts is not None:
                tl.store(p_erase_parts + o_part, erase_gradient(b_erased, b_weight), mask=m_w)
            if p_grad_write_weights is not None:
                b_erase = tl.load(p_erase + i_q * W + o_w, mask=m_w, other=0.0)
                b_value = tl.load(p_values + o_w, mask=m_w, other=0.0)
                b_sum += weight_gradient(b_grad, b_erased, b_erase, b_value)
    if p_grad_write_weights is not None:
        tl.store(p_grad_write_weights + (i_b * Q + i_q) * N + i_n + o_n, b_sum, mask=m_n)


def _write(
    memory: Tensor, new_memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, retention: Tensor | None
) -> None:
    B, N, W = memory.shape
    if memory.numel() == 0:
        return
    BN, BW = tile_size(memory)
    with torch.cuda.device_of(memory):
        memory_write_fwd_kernel[(B * triton.cdiv(N, BN) * triton.cdiv(W, BW),)](
            memory, write_weights.contiguous(), erase.contiguous(), values.contiguous(),
            None if retention is None else retention.contiguous(), new_memory,
            *memory.stride()[:2], *new_memory.stride()[:2], write_weights.shape[1], N, W, BN, BW,
        )  # fmt: skip


def memory_write(
    memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, retention: Tensor | None
) -> Tensor:
    memory = unit_stride(memory)
    new_memory = torch.empty_like(memory, memory_format=torch.contiguous_format)
    _write(memory, new_memory, write_weights, erase, values, retention)
    return new_memory


def memory_write_(
    memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, retention: Tensor | None
) -> None:
    """Overwrites `memory`; a layout that the kernel cannot write goes through a copy."""
    new_memory = unit_stride(memory)
    _write(new_memory, new_memory, write_weights, erase, values, retention)
    if new_memory is not memory:
        memory.copy_(new_memory)


def memory_write_backward(
    grad_memory: Tensor,
    memory: Tensor,
    write_weights: Tensor,
    erase: Tensor,
    values: Tensor,
    retention: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    B, N, W = memory.shape
    Q = write_weights.shape[1]

    def empty(tensor: Tensor | None, wants: bool) -> Tensor:
        return memory.new_empty(tensor.shape if wants and tensor is not None else 0)

    wants_memory, wants_write_weights, wants_erase, wants_values, wants_retention = output_mask
    gradients = (
        empty(memory, wants_memory),
        empty(write_weights, wants_write_weights),
        empty(erase, wants_erase),
        empty(values, wants_values),
        empty(retention, wants_retention),
    )
    if memory.numel() == 0 or not any(gradient.numel() for gradient in gradients):
        for gradient in gradients:
            gradient.zero_()
        return gradients

    grad_old_memory, grad_write_weights, grad_erase, grad_values, grad_retention = (
        gradient if gradient.numel() else None for gradient in gradients
    )
    grad_memory, memory = unit_stride(grad_memory), unit_stride(memory)
    BN, BW = tile_size(memory)
    T = triton.cdiv(N, BN)
    erase_parts, value_parts = (
        None if gradient is None else memory.new_empty(T, B, Q, W) for gradient in (grad_erase, grad_values)
    )
    write_weights, erase, values = write_weights.contiguous(), erase.contiguous(), values.contiguous()
    retention = None if retention is None else retention.contiguous()
    strides = *grad_memory.stride()[:2], *memory.stride()[:2]
    with torch.cuda.device_of(memory):
        if grad_old_memory is not None or grad_retention is not None:
            memory_write_bwd_kernel_slots[(B * T,)](
                grad_memory, memory, write_weights, erase, retention, grad_old_memory, grad_retention,
                *strides, Q, N, W, BN, BW,
            )  # fmt: skip
        if any(gradient is not None for gradient in (grad_write_weights, grad_erase, grad_values)):
            memory_write_bwd_kernel_heads[(B * T * Q,)](
                grad_memory, memory, write_weights, erase, values, retention,
                grad_write_weights, erase_parts, value_parts, *strides, B, Q, N, W, BN, BW,
            )  # fmt: skip
        for parts, total in ((erase_parts, grad_erase), (value_parts, grad_values)):
            if parts is not None and total is not None:
                sum_of_parts(parts, total)
    return gradients
