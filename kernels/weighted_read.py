"""Weighted read in Triton: reads[a] = sum over i of weights[a, i] memory[i].

The forward gives a block of heads a split of the slots; the splits depend on the shapes alone, and where there are
several a second kernel adds them in order. The backward is a product for each gradient; a program owns one tile of it.
All arithmetic is in the dtype of the memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import splits, unit_stride
from ._program import this_program
from ._tiles import block, block_of_rows, load_tile, multiply_add, store_tile, sum_of_parts, tile_size

BLOCK_HEADS = 16  # the least inner size of `tl.dot`
# Programs beyond which a program takes several tiles, so that the partial sums stay small.
MOST_PROGRAMS = 512


@triton.jit
def weighted_read_fwd_kernel(
    p_memory,  # [B, N, W]
    p_weights,  # [B, A, N]
    p_sums,  # [S, B, A, W]
    stride_memory_b,
    stride_memory_n,
    B,
    A,
    N,
    W,
    S,
    tiles,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    o_w, m_w = block(i_p % tl.cdiv(W, BW) * BW, W, BW)
    i_p = i_p // tl.cdiv(W, BW)
    o_a, m_a = block_of_rows(i_p % tl.cdiv(A, BA) * BA, A, BA)
    i_p = i_p // tl.cdiv(A, BA)
    i_s = (i_p % S).to(tl.int64)
    i_b = (i_p // S).to(tl.int64)
    o_tile = tl.arange(0, BN)
    b_sum = tl.zeros([BA, BW], dtype=p_sums.dtype.element_ty)
    for i_t in range(i_s * tiles, min((i_s + 1) * tiles, tl.cdiv(N, BN))):
        m_n = i_t * BN + o_tile < N
        p_rows = p_memory + i_b * stride_memory_b + i_t * BN * stride_memory_n
        b_rows = load_tile(p_rows, stride_memory_n, o_tile, m_n, o_w, m_w)
        b_weights = load_tile(p_weights + i_b * A * N + i_t * BN, N, o_a, m_a, o_tile, m_n)
        b_sum = multiply_add(b_weights, b_rows, b_sum)
    store_tile(p_sums + (i_s * B + i_b) * A * W, b_sum, W, o_a, m_a, o_w, m_w)


@triton.jit
def weighted_read_bwd_kernel_memory(
    p_grad_reads,  # [B, A, W]
    p_weights,  # [B, A, N]
    p_grad_memory,  # [B, N, W]
    A,
    N,
    W,
    BA: tl.constexpr,
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
    b_grad = tl.zeros([BN, BW], dtype=p_grad_memory.dtype.element_ty)
    for i_a in range(0, A, BA):
        o_a, m_a = block_of_rows(i_a, A, BA)
        b_weights = load_tile(p_weights + i_b * A * N + i_n, N, o_a, m_a, o_n, m_n)
        b_grad_reads = load_tile(p_grad_reads + i_b * A * W, W, o_a, m_a, o_w, m_w)
        b_grad = multiply_add(tl.trans(b_weights), b_grad_reads, b_grad)
    store_tile(p_grad_memory + (i_b * N + i_n) * W, b_grad, W, o_n, m_n, o_w, m_w)


@triton.jit
def weighted_read_bwd_kernel_weights(
    p_grad_reads,  # [B, A, W]
    p_memory,  # [B, N, W]
    p_grad_weights,  # [B, A, N]
    stride_memory_b,
    stride_memory_n,
    A,
    N,
    W,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    o_a, m_a = block_of_rows(i_p % tl.cdiv(A, BA) * BA, A, BA)
    i_p = i_p // tl.cdiv(A, BA)
    i_n = (i_p % tl.cdiv(N, BN)).to(tl.int64) * BN
    i_b = (i_p // tl.cdiv(N, BN)).to(tl.int64)
    o_n = tl.arange(0, BN)
    m_n = i_n + o_n < N
    p_memory += i_b * stride_memory_b + i_n * stride_memory_n
    b_grad = tl.zeros([BA, BN], dtype=p_grad_weights.dtype.element_ty)
    for i_w in range(0, W, BW):
        o_w, m_w = block(i_w, W, BW)
        b_rows = load_tile(p_memory, stride_memory_n, o_n, m_n, o_w, m_w)
        b_grad_reads = load_tile(p_grad_reads + i_b * A * W, W, o_a, m_a, o_w, m_w)
        b_grad = multiply_add(b_grad_reads, tl.trans(b_rows), b_grad)
    store_tile(p_grad_weights + i_b * A * N + i_n, b_grad, N, o_a, m_a, o_n, m_n)


def weighted_read(memory: Tensor, weights: Tensor) -> Tensor:
    B, N, W = memory.shape
    A = weights.shape[1]
    reads = memory.new_empty(B, A, W)
    if reads.numel() == 0 or N == 0:
        return reads.zero_()
    memory, weights = unit_stride(memory), weights.contiguous()
    BN, BW = tile_size(memory)
    blocks = B * triton.cdiv(A, BLOCK_HEADS) * triton.cdiv(W, BW)
    tiles, S = splits(triton.cdiv(N, BN), blocks, MOST_PROGRAMS)
    sums = reads if S == 1 else memory.new_empty(S, B, A, W)
    with torch.cuda.device_of(memory):
        weighted_read_fwd_kernel[(blocks * S,)](
            memory, weights, sums, *memory.stride()[:2], B, A, N, W, S, tiles, BLOCK_HEADS, BN, BW
        )
        if S > 1:
            sum_of_parts(sums, reads)
    return reads


def weighted_read_backward(
    grad_reads: Tensor, memory: Tensor, weights: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    want_memory, want_weights = output_mask
    B, N, W = memory.shape
    A = weights.shape[1]
    grad_memory = memory.new_empty((B, N, W) if want_memory else 0)
    grad_weights = memory.new_empty((B, A, N) if want_weights else 0)
    if grad_reads.numel() == 0 or N == 0 or not any(output_mask):
        return grad_memory.zero_(), grad_weights.zero_()
    memory, weights, grad_reads = unit_stride(memory), weights.contiguous(), grad_reads.contiguous()
    BN, BW = tile_size(memory)
    tiles = B * triton.cdiv(N, BN)
    with torch.cuda.device_of(memory):
        if want_memory:
            weighted_read_bwd_kernel_memory[(tiles * triton.cdiv(W, BW),)](
                grad_reads, weights, grad_memory, A, N, W, BLOCK_HEADS, BN, BW
            )
        if want_weights:
            weighted_read_bwd_kernel_weights[(tiles * triton.cdiv(A, BLOCK_HEADS),)](
                grad_reads, memory, grad_weights, *memory.stride()[:2], A, N, W, BLOCK_HEADS, BN, BW
            )
    return grad_memory, grad_weights
