"""Content addressing in Triton: weights = softmax over the slots of strength * similarity(key, row).

The forward scores a tile of slots against a block of heads at once and keeps the tile's peak and mass beside the
scores; a second kernel turns scores into weights in place. A program of the backward owns tiles of rows, walks the
heads, and leaves their gradients as partials that a last kernel folds in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import unit_stride
from ._program import this_program
from ._similarity import (
    BLOCK_HEADS,
    BLOCK_SLOTS,
    add_head_partials,
    block_width,
    empty_gradients,
    finite_peak,
    launch_backward,
    load_rows,
    prepared,
    row_gradient,
    score_gradient,
    similarity,
    slots_taking_part,
)

BLOCK_SOFTMAX = 1024
# Programs of a backward launch beyond which a program takes several tiles, so that the partials stay small.
MOST_PROGRAMS = 512


@triton.jit
def softmax_weight(b_score, peak, mass):
    return tl.where(mass == 0.0, 0.0, tl.exp(b_score - finite_peak(peak)) / mass)


@triton.jit
def overlap_terms(b_grad, b_weight):
    """Of <gradient, weights>; a slot without a weight has none, whatever its gradient is."""
    return tl.where(b_weight != 0.0, b_grad * b_weight, 0.0)


@triton.jit
def softmax_gradient(b_grad, b_weight, b_overlap):
    return tl.where(b_weight != 0.0, b_weight * (b_grad - b_overlap), 0.0)


@triton.jit
def content_addressing_fwd_kernel_scores(
    p_memory,  # [B, N, W]
    p_keys,  # [B, A, W]
    p_strengths,  # [B, A]
    p_key_mask,  # [B, A, W] or None
    p_slot_mask,  # [B, N] or None
    p_scores,  # [B, A, N]
    p_peaks,  # [B, A, T]
    p_masses,  # [B, A, T]
    stride_memory_b,
    stride_memory_n,
    eps,
    A,
    N,
    T,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    NORM: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_t = i_p % T
    i_g = i_p // T % tl.cdiv(A, BA)
    i_b = (i_p // T // tl.cdiv(A, BA)).to(tl.int64)
    o_tile = tl.arange(0, BN)
    o_n = i_t * BN + o_tile
    o_a = i_g * BA + tl.arange(0, BA)
    m_a = o_a < A
    o_h = i_b * A + o_a
    m_n = slots_taking_part(p_slot_mask, i_b, o_n, N)

    p_rows = p_memory + i_b * stride_memory_b + i_t.to(tl.int64) * BN * stride_memory_n
    b_similarity, _ = similarity(
        p_rows, p_keys, p_key_mask, o_tile, m_n, stride_memory_n, o_h, m_a, eps, W, BA, BN, BW, NORM
    )
    b_strength = tl.load(p_strengths + o_h, mask=m_a, other=0.0)
    b_score = tl.where(m_n[None, :], b_strength[:, None] * b_similarity, -float("inf"))
    b_peak = tl.max(b_score, 1)
    b_mass = tl.sum(tl.exp(b_score - finite_peak(b_peak)[:, None]), 1)
    p_tile = p_scores + o_h[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_score, mask=m_a[:, None] & (o_n < N)[None, :])
    tl.store(p_peaks + o_h * T + i_t, b_peak, mask=m_a)
    tl.store(p_masses + o_h * T + i_t, b_mass, mask=m_a)


@triton.jit
def content_addressing_fwd_kernel_softmax(
    p_weights,  # [B, A, N], scores on entry
    p_peaks,  # [B, A, T]
    p_masses,  # [B, A, T]
    N,
    T,
    BT: tl.constexpr,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_n = i_p % tl.cdiv(N, BN)
    i_h = (i_p // tl.cdiv(N, BN)).to(tl.int64)
    peak = -float("inf")
    mass = 0.0
    for i_t in range(0, T, BT):
        o_t = i_t + tl.arange(0, BT)
        b_peak = tl.load(p_peaks + i_h * T + o_t, mask=o_t < T, other=-float("inf"))
        b_mass = tl.load(p_masses + i_h * T + o_t, mask=o_t < T, other=0.0)
        old_peak = peak
        peak = tl.maximum(peak, tl.max(b_peak, 0))
        mass *= tl.exp(old_peak - finite_peak(peak))
        mass += tl.sum(b_mass * tl.exp(b_peak - finite_peak(peak)), 0)
    o_n = i_n * BN + tl.arange(0, BN)
    b_score = tl.load(p_weights + i_h * N + o_n, mask=o_n < N, other=-float("inf"))
    tl.store(p_weights + i_h * N + o_n, softmax_weight(b_score, peak, mass), mask=o_n < N)


@triton.jit
def content_addressing_bwd_kernel_overlap(
    p_grad_weights,  # [B, A, N]
    p_weights,  # [B, A, N]
    p_overlap,  # [B, A], <gradient, weights>
    stride_grad_b,
    stride_grad_a,
    stride_weights_b,
    stride_weights_a,
    A,
    N,
    BN: tl.constexpr,
    i_p=None,
):
    i_h = this_program(i_p).to(tl.int64)
    i_b = i_h // A
    i_a = i_h % A
    b_sum = tl.zeros([BN], dtype=tl.float32)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_grad = tl.load(p_grad_weights + i_b * stride_grad_b + i_a * stride_grad_a + o_n, mask=o_n < N, other=0.0)
        b_weight = tl.load(p_weights + i_b * stride_weights_b + i_a * stride_weights_a + o_n, mask=o_n < N, other=0.0)
        b_sum += overlap_terms(b_grad, b_weight)
    tl.store(p_overlap + i_h, tl.sum(b_sum, 0))


@triton.jit
def content_addressing_bwd_kernel(
    p_grad_weights,  # [B, A, N]
    p_weights,  # [B, A, N]
    p_overlap,  # [B, A]
    stride_grad_b,
    stride_grad_a,
    stride_weights_b,
    stride_weights_a,
    p_memory,  # [B, N, W]
    p_keys,  # [B, A, W]
    p_strengths,  # [B, A]
    p_key_mask,  # [B, A, W] or None
    p_slot_mask,  # [B, N] or None
    p_grad_memory,  # [B, N, W] or None
    p_pull,  # [S, B, A, W] or None
    p_pull_square,  # [S, B, A, W] or None
    p_sums,  # [S, B, A, 2] or None
    stride_memory_b,
    stride_memory_n,
    eps,
    B,
    A,
    N,
    S,
    tiles,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    NORM: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_w = i_p % tl.cdiv(W, BW)
    i_s = (i_p // tl.cdiv(W, BW) % S).to(tl.int64)
    i_b = (i_p // tl.cdiv(W, BW) // S).to(tl.int64)
    o_tile = tl.arange(0, BN)
    o_w = i_w * BW + tl.arange(0, BW)

    for i_t in range(i_s * tiles, min((i_s + 1) * tiles, tl.cdiv(N, BN))):
        o_n = i_t * BN + o_tile
        m_n = slots_taking_part(p_slot_mask, i_b, o_n, N)
        p_rows = p_memory + i_b * stride_memory_b + i_t * BN * stride_memory_n
        b_grad_rows = tl.zeros([BN, BW], dtype=tl.float32)
        for i_a in range(0, A, BA):
            o_a = tl.cast(i_a, tl.int64) + tl.arange(0, BA)
            o_h = i_b * A + o_a
            m_a = o_a < A
            m_an = m_a[:, None] & m_n[None, :]
            b_similarity, norms = similarity(
                p_rows, p_keys, p_key_mask, o_tile, m_n, stride_memory_n, o_h, m_a, eps, W, BA, BN, BW, NORM
            )
            p_tile = p_weights + i_b * stride_weights_b + o_a[:, None] * stride_weights_a + o_n[None, :]
            b_weight = tl.load(p_tile, mask=m_an, other=0.0)
            p_tile = p_grad_weights + i_b * stride_grad_b + o_a[:, None] * stride_grad_a + o_n[None, :]
            b_grad = tl.load(p_tile, mask=m_an, other=0.0)
            b_overlap = tl.load(p_overlap + o_h, mask=m_a, other=0.0)
            b_strength = tl.load(p_strengths + o_h, mask=m_a, other=0.0)
            b_dscore = softmax_gradient(b_grad, b_weight, b_overlap[:, None])
            b_pull, b_shrink, b_turned, b_scored = score_gradient(
                b_dscore, b_weight != 0.0, b_strength, b_similarity, norms, eps, NORM
            )
            b_rows = load_rows(p_rows, o_tile, m_n, stride_memory_n, o_w, W)
            if p_grad_memory is not None:
                b_grad_rows += row_gradient(b_pull, b_shrink, b_rows, m_n, p_keys, p_key_mask, o_h, m_a, o_w, W)
            if p_pull is not None:
                add_head_partials(
                    p_pull, p_pull_square, p_sums, b_pull, b_shrink, b_turned, b_scored, b_rows,
                    i_s * B * A + o_h, m_a, o_w, i_t > i_s * tiles, i_w == 0, W,
                )  # fmt: skip
        if p_grad_memory is not None:
            p_tile = p_grad_memory + (i_b * N + o_n)[:, None] * W + o_w[None, :]
            tl.store(p_tile, b_grad_rows, mask=(o_n < N)[:, None] & (o_w < W)[None, :])


def content_addressing(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor:
    B, N, W = memory.shape
    A = keys.shape[1]
    weights = keys.new_empty(B, A, N)
    if weights.numel() == 0:
        return weights
    memory, keys, strengths, key_mask, slot_mask = prepared(memory, keys, strengths, key_mask, slot_mask)
    T = triton.cdiv(N, BLOCK_SLOTS)
    peaks = keys.new_empty(B, A, T)
    masses = torch.empty_like(peaks)
    with torch.cuda.device_of(memory):
        content_addressing_fwd_kernel_scores[(B * triton.cdiv(A, BLOCK_HEADS) * T,)](
            memory, keys, strengths, key_mask, slot_mask, weights, peaks, masses, *memory.stride()[:2], eps,
            A, N, T, W, BLOCK_HEADS, BLOCK_SLOTS, block_width(W, key_mask is not None), norm,
        )  # fmt: skip
        content_addressing_fwd_kernel_softmax[(B * A * triton.cdiv(N, BLOCK_SOFTMAX),)](
            weights, peaks, masses, N, T, 128, BLOCK_SOFTMAX
        )
    return weights


def content_addressing_backward(
    grad_weights: Tensor,
    weights: Tensor,
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradients = empty_gradients(memory, keys, strengths, key_mask, output_mask)
    if weights.numel() == 0 or not any(gradient.numel() for gradient in gradients):
        for gradient in gradients:
            gradient.zero_()
        return gradients

    grad_weights, weights = unit_stride(grad_weights), unit_stride(weights)
    inputs = prepared(memory, keys, strengths, key_mask, slot_mask)
    B, A, N = weights.shape
    overlap = keys.new_empty(B, A)
    strides = *grad_weights.stride()[:2], *weights.stride()[:2]
    with torch.cuda.device_of(memory):
        content_addressing_bwd_kernel_overlap[(B * A,)](grad_weights, weights, overlap, *strides, A, N, BLOCK_SOFTMAX)
        own = grad_weights, weights, overlap, *strides
        launch_backward(content_addressing_bwd_kernel, own, *inputs, norm, eps, gradients, MOST_PROGRAMS)
    return gradients
