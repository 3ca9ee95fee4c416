"""Content read in Triton: reads = softmax over the slots of strength * similarity(key, row), times the rows.

One pass, and the weights are never stored. The forward carries a running peak, mass and read for a block of heads over
a split of the slots; the splits depend on the shapes alone and a second kernel joins them in order. The backward
recomputes the weights from the logsumexp, and <gradient, weights> is <gradient, reads>, so it too needs one pass. The
program that owns a tile of a shared bank walks all samples, which sums its gradient over the batch in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import splits
from ._similarity import (
    BLOCK_HEADS,
    BLOCK_SLOTS,
    add_head_partials,
    block_width,
    empty_gradients,
    finite_peak,
    launch_backward,
    load_heads,
    load_rows,
    prepared,
    row_gradient,
    score_gradient,
    similarity,
    slots_taking_part,
)

# Programs beyond which a program takes several tiles, so that the partials stay small.
MOST_PROGRAMS = 512


@triton.jit
def content_read_fwd_kernel(
    p_memory,  # [B / G, N, W]
    p_keys,  # [B, A, W]
    p_strengths,  # [B, A]
    p_key_mask,  # [B, A, W] or None
    p_slot_mask,  # [B or 1, N] or None
    p_peaks,  # [S, B, A]
    p_masses,  # [S, B, A]
    p_sums,  # [S, B, A, W]
    stride_memory_b,
    stride_memory_n,
    stride_mask_b,
    eps,
    B,
    G,
    A,
    N,
    S,
    tiles,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    NORM: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_w = i_p % tl.cdiv(W, BW)
    i_p = i_p // tl.cdiv(W, BW)
    i_g = i_p % tl.cdiv(A, BA)
    i_p = i_p // tl.cdiv(A, BA)
    i_s = (i_p % S).to(tl.int64)
    i_b = (i_p // S).to(tl.int64)
    o_tile = tl.arange(0, BN)
    o_w = i_w * BW + tl.arange(0, BW)
    o_a = i_g * BA + tl.arange(0, BA)
    o_h = i_b * A + o_a
    m_a = o_a < A
    b_strength = tl.load(p_strengths + o_h, mask=m_a, other=0.0)

    b_peak = tl.full([BA], -float("inf"), dtype=tl.float32)
    b_mass = tl.zeros([BA], dtype=tl.float32)
    b_sum = tl.zeros([BA, BW], dtype=tl.float32)
    for i_t in range(i_s * tiles, min((i_s + 1) * tiles, tl.cdiv(N, BN))):
        m_n = slots_taking_part(p_slot_mask, i_b * stride_mask_b, i_t * BN + o_tile, N)
        p_rows = p_memory + i_b // G * stride_memory_b + i_t * BN * stride_memory_n
        b_similarity, _ = similarity(
            p_rows, p_keys, p_key_mask, o_tile, m_n, stride_memory_n, o_h, m_a, eps, W, BA, BN, BW, NORM
        )
        b_score = tl.where(m_n[None, :], b_strength[:, None] * b_similarity, -float("inf"))
        b_old_peak = b_peak
        b_peak = tl.maximum(b_peak, tl.max(b_score, 1))
        b_decay = tl.exp(b_old_peak - finite_peak(b_peak))
        b_weight = tl.exp(b_score - finite_peak(b_peak)[:, None])
        b_mass = b_mass * b_decay + tl.sum(b_weight, 1)
        b_rows = load_rows(p_rows, o_tile, m_n, stride_memory_n, o_w, W)
        b_sum = tl.dot(b_weight, b_rows, b_sum * b_decay[:, None], input_precision="ieee")
    o_h = i_s * B * A + o_h
    tl.store(p_peaks + o_h, b_peak, mask=m_a & (i_w == 0))
    tl.store(p_masses + o_h, b_mass, mask=m_a & (i_w == 0))
    tl.store(p_sums + o_h[:, None] * W + o_w[None, :], b_sum, mask=m_a[:, None] & (o_w < W)[None, :])


@triton.jit
def content_read_fwd_kernel_join(
    p_peaks,  # [S, H]
    p_masses,  # [S, H]
    p_sums,  # [S, H, W]
    p_reads,  # [H, W]
    p_logsumexp,  # [H]
    S,
    H,
    W: tl.constexpr,
    BW: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_w = i_p % tl.cdiv(W, BW)
    i_h = (i_p // tl.cdiv(W, BW)).to(tl.int64)
    o_w = i_w * BW + tl.arange(0, BW)
    peak = -float("inf")
    mass = 0.0
    b_sum = tl.zeros([BW], dtype=tl.float32)
    for i_s in range(S):
        next_peak = tl.load(p_peaks + i_s * H + i_h)
        old_peak = peak
        peak = tl.maximum(peak, next_peak)
        decay = tl.exp(old_peak - finite_peak(peak))
        growth = tl.exp(next_peak - finite_peak(peak))
        mass = mass * decay + tl.load(p_masses + i_s * H + i_h) * growth
        b_next = tl.load(p_sums + (i_s * H + i_h) * W + o_w, mask=o_w < W, other=0.0)
        b_sum = b_sum * decay + b_next * growth
    b_read = tl.where(mass == 0.0, 0.0, b_sum / mass)
    tl.store(p_reads + i_h * W + o_w, b_read, mask=o_w < W)
    logsumexp = tl.where(mass == 0.0, -float("inf"), finite_peak(peak) + tl.log(mass))
    tl.store(p_logsumexp + i_h, logsumexp, mask=i_w == 0)


@triton.jit
def content_read_bwd_kernel(
    p_grad_reads,  # [B, A, W]
    p_reads,  # [B, A, W]
    p_logsumexp,  # [B, A]
    stride_mask_b,
    G,
    p_memory,  # [B / G, N, W]
    p_keys,  # [B, A, W]
    p_strengths,  # [B, A]
    p_key_mask,  # [B, A, W] or None
    p_slot_mask,  # [B or 1, N] or None
    p_grad_memory,  # [B / G, N, W] or None
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
):
    i_p = tl.program_id(0)
    i_w = i_p % tl.cdiv(W, BW)
    i_s = (i_p // tl.cdiv(W, BW) % S).to(tl.int64)
    i_bank = (i_p // tl.cdiv(W, BW) // S).to(tl.int64)
    o_tile = tl.arange(0, BN)
    o_w = i_w * BW + tl.arange(0, BW)

    for i_t in range(i_s * tiles, min((i_s + 1) * tiles, tl.cdiv(N, BN))):
        o_n = i_t * BN + o_tile
        p_rows = p_memory + i_bank * stride_memory_b + i_t * BN * stride_memory_n
        b_grad_rows = tl.zeros([BN, BW], dtype=tl.float32)
        # All samples of the bank, and all blocks of heads of a sample.
        for i_g in range(G * tl.cdiv(A, BA)):
            i_b = i_bank * G + i_g // tl.cdiv(A, BA)
            o_a = i_g % tl.cdiv(A, BA) * BA + tl.arange(0, BA)
            o_h = i_b * A + o_a
            m_a = o_a < A
            m_n = slots_taking_part(p_slot_mask, i_b * stride_mask_b, o_n, N)
            b_similarity, norms = similarity(
                p_rows, p_keys, p_key_mask, o_tile, m_n, stride_memory_n, o_h, m_a, eps, W, BA, BN, BW, NORM
            )

            b_grad = tl.zeros([BA, BN], dtype=tl.float32)
            b_overlap = tl.zeros([BA], dtype=tl.float32)
            for i_v in range(0, W, BW):
                o_v = i_v + tl.arange(0, BW)
                b_grad_reads = load_heads(p_grad_reads, o_h, m_a, o_v, W)
                b_overlap += tl.sum(b_grad_reads * load_heads(p_reads, o_h, m_a, o_v, W), 1)
                b_rows = load_rows(p_rows, o_tile, m_n, stride_memory_n, o_v, W)
                b_grad = tl.dot(b_grad_reads, tl.trans(b_rows), b_grad, input_precision="ieee")

            b_strength = tl.load(p_strengths + o_h, mask=m_a, other=0.0)
            b_logsumexp = tl.load(p_logsumexp + o_h, mask=m_a, other=-float("inf"))
            b_weight = tl.exp(b_strength[:, None] * b_similarity - b_logsumexp[:, None])
            # Without a finite score a head has no weights.
            b_live = m_n[None, :] & (b_logsumexp != -float("inf"))[:, None] & (b_weight != 0.0)
            b_weight = tl.where(b_live, b_weight, 0.0)
            b_dscore = tl.where(b_live, b_weight * (b_grad - b_overlap[:, None]), 0.0)
            b_pull, b_shrink, b_turned, b_scored = score_gradient(
                b_dscore, b_live, b_strength, b_similarity, norms, eps, NORM
            )
            b_rows = load_rows(p_rows, o_tile, m_n, stride_memory_n, o_w, W)
            if p_grad_memory is not None:
                b_grad_rows += row_gradient(b_pull, b_shrink, b_rows, m_n, p_keys, p_key_mask, o_h, m_a, o_w, W)
                b_grad_reads = load_heads(p_grad_reads, o_h, m_a, o_w, W)
                b_grad_rows = tl.dot(tl.trans(b_weight), b_grad_reads, b_grad_rows, input_precision="ieee")
            if p_pull is not None:
                add_head_partials(
                    p_pull, p_pull_square, p_sums, b_pull, b_shrink, b_turned, b_scored, b_rows,
                    i_s * B * A + o_h, m_a, o_w, i_t > i_s * tiles, i_w == 0, W,
                )  # fmt: skip
        if p_grad_memory is not None:
            p_tile = p_grad_memory + (i_bank * N + o_n)[:, None] * W + o_w[None, :]
            tl.store(p_tile, b_grad_rows, mask=(o_n < N)[:, None] & (o_w < W)[None, :])


def _prepared(
    memory: Tensor, keys: Tensor, strengths: Tensor, key_mask: Tensor | None, slot_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The samples of a shared bank become heads of one sample where no mask tells them apart, so that a tile of the
    bank serves a whole block of them: the shape of the strengths says so."""
    if memory.shape[0] == 1 and (slot_mask is None or slot_mask.shape[0] == 1):
        strengths = strengths.reshape(1, -1)
    return prepared(memory, keys, strengths, key_mask, slot_mask)


def content_read(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    reads = torch.empty_like(keys, memory_format=torch.contiguous_format)
    logsumexp = torch.empty_like(strengths, memory_format=torch.contiguous_format)
    _, N, W = memory.shape
    if reads.numel() == 0 or N == 0:  # without words every slot that takes part scores 0
        slots = torch.full_like(logsumexp, N) if slot_mask is None else slot_mask.sum(-1, keepdim=True)
        return reads.zero_(), logsumexp.copy_(slots.to(logsumexp.dtype).log())
    memory, keys, strengths, key_mask, slot_mask = _prepared(memory, keys, strengths, key_mask, slot_mask)
    B, A = strengths.shape
    BW = block_width(W, key_mask is not None)
    pieces = triton.cdiv(W, BW)
    blocks = B * triton.cdiv(A, BLOCK_HEADS) * pieces
    tiles, S = splits(triton.cdiv(N, BLOCK_SLOTS), blocks, MOST_PROGRAMS)
    peaks = keys.new_empty(S, B, A)
    masses = torch.empty_like(peaks)
    sums = keys.new_empty(S, B, A, W)
    mask_step = int(slot_mask is not None and slot_mask.shape[0] > 1)
    with torch.cuda.device_of(memory):
        content_read_fwd_kernel[(blocks * S,)](
            memory, keys, strengths, key_mask, slot_mask, peaks, masses, sums, *memory.stride()[:2], mask_step, eps,
            B, B // memory.shape[0], A, N, S, tiles, W, BLOCK_HEADS, BLOCK_SLOTS, BW, norm,
        )  # fmt: skip
        content_read_fwd_kernel_join[(B * A * pieces,)](
            peaks, masses, sums, reads, logsumexp, S, B * A, W, BW, num_warps=1
        )
    return reads, logsumexp


def content_read_backward(
    grad_reads: Tensor,
    reads: Tensor,
    logsumexp: Tensor,
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
    if reads.numel() == 0 or memory.shape[1] == 0 or not any(gradient.numel() for gradient in gradients):
        for gradient in gradients:
            gradient.zero_()
        return gradients

    inputs = _prepared(memory, keys, strengths, key_mask, slot_mask)
    mask_step = int(slot_mask is not None and slot_mask.shape[0] > 1)
    samples = inputs[2].shape[0] // memory.shape[0]
    own = grad_reads.contiguous(), reads.contiguous(), logsumexp.contiguous(), mask_step, samples
    with torch.cuda.device_of(memory):
        launch_backward(content_read_bwd_kernel, own, *inputs, norm, eps, gradients, MOST_PROGRAMS)
    return gradients
