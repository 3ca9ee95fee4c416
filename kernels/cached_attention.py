"""Additive attention over a small cache in Triton.

    scores[j] = sum_a score_weights[a] tanh(query[a] + keys[j, a]),   weights = softmax(scores)
    attended = sum_j weights[j] cache[j]

One kernel scores the entries and another reads the cache by them; the weights of a sample are written by the program
that reads its first columns. The backward takes the gradient of the weights from the cache first, then that of query,
keys and score weights from the keys, with the tangents made anew. Every program adds in order, and so does the kernel
that sums the gradient of the score weights over the samples. All arithmetic is in the dtype of the tensors.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import unit_stride
from ._similarity import finite_peak, slots_taking_part
from ._tiles import block, block_of_rows, load_tile, store_tile, sum_of_parts

# Entries, and columns of a key or of an entry, of the tile that a program holds.
BLOCK_ENTRIES = 16
WIDEST = 64


@triton.jit
def tanh(x):
    """1 - 2 / (e^2|x| + 1), which loses digits where |x| is small. There, in float32, a polynomial fitted to
    tanh(x) / x, 2e-10 off; in float64 (e^2|x| - 1) / (e^2|x| + 1), made up for what the power rounded away."""
    b_twice = tl.minimum(2.0 * tl.abs(x), 40.0, propagate_nan=tl.PropagateNan.ALL)
    b_power = tl.exp(b_twice)
    if x.dtype == tl.float64:
        b_less = b_power - 1.0
        b_above = tl.where(b_power == 1.0, b_twice, b_less * (b_twice / tl.where(b_power == 1.0, 1.0, tl.log(b_power))))
        b_near = b_above / (b_above + 2.0)
        b_result = tl.where(x < 0.0, -b_near, b_near)
    else:
        b_square = x * x
        b_slope = 2.14261763e-3 * b_square - 8.17689681e-3
        b_slope = b_slope * b_square + 2.17004238e-2
        b_slope = b_slope * b_square - 5.39466897e-2
        b_slope = b_slope * b_square + 0.133332051
        b_slope = b_slope * b_square - 0.333333308
        b_far = 1.0 - 2.0 / (b_power + 1.0)
        b_far = tl.where(x < 0.0, -b_far, b_far)
        b_result = tl.where(b_twice < 1.25, x + x * b_square * b_slope, b_far)
    return b_result


@triton.jit
def active(p_keys, stride_keys_l, o_l, m_l, b_query, o_a, m_a):
    """tanh(query + keys) of a tile. Keys of entries that take no part are not read."""
    return tanh(b_query[None, :] + load_tile(p_keys, stride_keys_l, o_l, m_l, o_a, m_a))


@triton.jit
def cached_attention_fwd_kernel_scores(
    p_query,  # [B, A]
    p_keys,  # [B, L, A]
    p_score_weights,  # [A]
    p_mask,  # [B, L] or None
    p_scores,  # [B, L]
    stride_keys_b,
    stride_keys_l,
    L,
    A,
    BL: tl.constexpr,
    BA: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_b = (i_p // tl.cdiv(L, BL)).to(tl.int64)
    o_l, m_within = block_of_rows(i_p % tl.cdiv(L, BL) * BL, L, BL)
    m_l = slots_taking_part(p_mask, i_b, o_l, L)
    b_score = tl.zeros([BL], dtype=p_scores.dtype.element_ty)
    for i_a in range(0, A, BA):
        o_a, m_a = block(i_a, A, BA)
        b_query = tl.load(p_query + i_b * A + o_a, mask=m_a, other=0.0)
        b_weight = tl.load(p_score_weights + o_a, mask=m_a, other=0.0)
        b_active = active(p_keys + i_b * stride_keys_b, stride_keys_l, o_l, m_l, b_query, o_a, m_a)
        b_score += tl.sum(b_weight[None, :] * b_active, 1)
    tl.store(p_scores + i_b * L + o_l, tl.where(m_l, b_score, -float("inf")), mask=m_within)


@triton.jit
def cached_attention_fwd_kernel_read(
    p_scores,  # [B, L]
    p_cache,  # [B, L, H]
    p_mask,  # [B, L] or None
    p_attended,  # [B, H]
    p_weights,  # [B, L]
    stride_cache_b,
    stride_cache_l,
    L,
    H,
    blocks,
    BL: tl.constexpr,
    BH: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_b = (i_p // blocks).to(tl.int64)
    o_h, m_h = block(i_p % blocks * BH, H, BH)
    p_scores += i_b * L
    peak = tl.full([], -float("inf"), p_scores.dtype.element_ty)
    for i_l in range(0, L, BL):
        o_l, m_within = block(i_l, L, BL)
        peak = tl.maximum(peak, tl.max(tl.load(p_scores + o_l, mask=m_within, other=-float("inf")), 0))
    peak = finite_peak(peak)
    mass = tl.full([], 0.0, p_scores.dtype.element_ty)
    b_sum = tl.zeros([BH], dtype=p_scores.dtype.element_ty)
    for i_l in range(0, L, BL):
        o_l, m_within = block_of_rows(i_l, L, BL)
        b_power = tl.exp(tl.load(p_scores + o_l, mask=m_within, other=-float("inf")) - peak)
        m_l = slots_taking_part(p_mask, i_b, o_l, L)
        b_rows = load_tile(p_cache + i_b * stride_cache_b, stride_cache_l, o_l, m_l, o_h, m_h)
        mass += tl.sum(b_power, 0)
        b_sum += tl.sum(b_power[:, None] * b_rows, 0)
    # Without a score above -inf the mass is 0, and so are the powers.
    mass = tl.where(mass == 0.0, 1.0, mass)
    tl.store(p_attended + i_b * H + o_h, b_sum / mass, mask=m_h)
    if i_p % blocks == 0:
        for i_l in range(0, L, BL):
            o_l, m_within = block(i_l, L, BL)
            b_power = tl.exp(tl.load(p_scores + o_l, mask=m_within, other=-float("inf")) - peak)
            tl.store(p_weights + i_b * L + o_l, b_power / mass, mask=m_within)


@triton.jit
def cached_attention_bwd_kernel_cache(
    p_grad_attended,  # [B, H]
    p_upstream,  # [B, L] or None
    p_weights,  # [B, L]
    p_cache,  # [B, L, H]
    p_mask,  # [B, L] or None
    p_grad_cache,  # [B, L, H] or None
    p_grad_weights,  # [B, L]
    stride_cache_b,
    stride_cache_l,
    L,
    H,
    BL: tl.constexpr,
    BH: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_b = (i_p // tl.cdiv(L, BL)).to(tl.int64)
    o_l, m_within = block_of_rows(i_p % tl.cdiv(L, BL) * BL, L, BL)
    m_l = slots_taking_part(p_mask, i_b, o_l, L)
    b_weight = tl.load(p_weights + i_b * L + o_l, mask=m_within, other=0.0)
    b_grad_weight = tl.zeros([BL], dtype=p_weights.dtype.element_ty)
    if p_upstream is not None:
        b_grad_weight += tl.load(p_upstream + i_b * L + o_l, mask=m_within, other=0.0)
    for i_h in range(0, H, BH):
        o_h, m_h = block(i_h, H, BH)
        b_grad = tl.load(p_grad_attended + i_b * H + o_h, mask=m_h, other=0.0)
        b_rows = load_tile(p_cache + i_b * stride_cache_b, stride_cache_l, o_l, m_l, o_h, m_h)
        b_grad_weight += tl.sum(tl.where(m_l[:, None], b_rows * b_grad[None, :], 0.0), 1)
        if p_grad_cache is not None:
            b_grad_rows = tl.where((m_l & (b_weight != 0.0))[:, None], b_weight[:, None] * b_grad[None, :], 0.0)
            store_tile(p_grad_cache + i_b * L * H, b_grad_rows, H, o_l, m_within, o_h, m_h)
    tl.store(p_grad_weights + i_b * L + o_l, b_grad_weight, mask=m_within)


@triton.jit
def cached_attention_bwd_kernel_scores(
    p_grad_weights,  # [B, L]
    p_weights,  # [B, L]
    p_query,  # [B, A]
    p_keys,  # [B, L, A]
    p_score_weights,  # [A]
    p_mask,  # [B, L] or None
    p_grad_query,  # [B, A] or None
    p_grad_keys,  # [B, L, A] or None
    p_parts,  # [B, A] or None, the gradient of the score weights from each sample
    stride_keys_b,
    stride_keys_l,
    L,
    A,
    BL: tl.constexpr,
    BA: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_b = (i_p // tl.cdiv(A, BA)).to(tl.int64)
    o_a, m_a = block(i_p % tl.cdiv(A, BA) * BA, A, BA)
    p_grad_weights += i_b * L
    p_weights += i_b * L
    total = tl.full([], 0.0, p_weights.dtype.element_ty)
    mean = tl.full([], 0.0, p_weights.dtype.element_ty)
    for i_l in range(0, L, BL):
        o_l, m_within = block(i_l, L, BL)
        b_weight = tl.load(p_weights + o_l, mask=m_within, other=0.0)
        total += tl.sum(b_weight, 0)
        mean += tl.sum(b_weight * tl.load(p_grad_weights + o_l, mask=m_within, other=0.0), 0)
    b_query = tl.load(p_query + i_b * A + o_a, mask=m_a, other=0.0)
    b_score_weight = tl.load(p_score_weights + o_a, mask=m_a, other=0.0)
    b_grad_query = tl.zeros([BA], dtype=p_weights.dtype.element_ty)
    b_grad_score_weight = tl.zeros([BA], dtype=p_weights.dtype.element_ty)
    for i_l in range(0, L, BL):
        o_l, m_within = block_of_rows(i_l, L, BL)
        m_l = slots_taking_part(p_mask, i_b, o_l, L)
        b_weight = tl.load(p_weights + o_l, mask=m_within, other=0.0)
        b_z = b_weight * (tl.load(p_grad_weights + o_l, mask=m_within, other=0.0) - mean)
        b_active = active(p_keys + i_b * stride_keys_b, stride_keys_l, o_l, m_l, b_query, o_a, m_a)
        # Without a score above -inf all weights are 0, and nothing infinite may multiply them.
        b_live = tl.where(total != 0.0, m_l, False)[:, None] & m_a[None, :]
        b_grad_key = b_z[:, None] * b_score_weight[None, :] * (1.0 - b_active * b_active)
        b_grad_key = tl.where(b_live, b_grad_key, 0.0)
        if p_grad_keys is not None:
            store_tile(p_grad_keys + i_b * L * A, b_grad_key, A, o_l, m_within, o_a, m_a)
        b_grad_query += tl.sum(b_grad_key, 0)
        b_grad_score_weight += tl.sum(tl.where(b_live, b_z[:, None] * b_active, 0.0), 0)
    if p_grad_query is not None:
        tl.store(p_grad_query + i_b * A + o_a, b_grad_query, mask=m_a)
    if p_parts is not None:
        tl.store(p_parts + i_b * A + o_a, b_grad_score_weight, mask=m_a)


def block_width(width: int) -> int:
    return min(WIDEST, max(16, triton.next_power_of_2(width)))


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def cached_attention(
    query: Tensor, keys: Tensor, cache: Tensor, score_weights: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, L, H = cache.shape
    A = keys.shape[2]
    attended, weights = query.new_empty(B, H), query.new_empty(B, L)
    if weights.numel() == 0:
        return attended.zero_(), weights
    query, score_weights, mask = query.contiguous(), score_weights.contiguous(), as_bytes(mask)
    keys, cache = unit_stride(keys), unit_stride(cache)
    scores = torch.empty_like(weights)
    BL, BA, BH = BLOCK_ENTRIES, block_width(A), block_width(H)
    blocks = max(1, triton.cdiv(H, BH))
    with torch.cuda.device_of(query):
        cached_attention_fwd_kernel_scores[(B * triton.cdiv(L, BL),)](
            query, keys, score_weights, mask, scores, *keys.stride()[:2], L, A, BL, BA
        )
        cached_attention_fwd_kernel_read[(B * blocks,)](
            scores, cache, mask, attended, weights, *cache.stride()[:2], L, H, blocks, BL, BH
        )
    return attended, weights


def cached_attention_backward(
    grad_attended: Tensor | None,
    grad_weights: Tensor | None,
    weights: Tensor,
    query: Tensor,
    keys: Tensor,
    cache: Tensor,
    score_weights: Tensor,
    mask: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, L, H = cache.shape
    A = keys.shape[2]
    want_query, want_keys, want_cache, want_score_weights = output_mask
    grad_query = query.new_empty(query.shape if want_query else 0)
    grad_keys = query.new_empty(keys.shape if want_keys else 0)
    grad_cache = query.new_empty(cache.shape if want_cache else 0)
    grad_score_weights = query.new_empty(score_weights.shape if want_score_weights else 0)
    if weights.numel() == 0:
        return grad_query.zero_(), grad_keys, grad_cache, grad_score_weights.zero_()
    query, score_weights, mask = query.contiguous(), score_weights.contiguous(), as_bytes(mask)
    keys, cache, weights = unit_stride(keys), unit_stride(cache), weights.contiguous()
    grad_attended = query.new_zeros(B, H) if grad_attended is None else grad_attended.contiguous()
    upstream = None if grad_weights is None else grad_weights.contiguous()
    into_weights = torch.empty_like(weights)
    BL, BA, BH = BLOCK_ENTRIES, block_width(A), block_width(H)
    with torch.cuda.device_of(query):
        cached_attention_bwd_kernel_cache[(B * triton.cdiv(L, BL),)](
            grad_attended, upstream, weights, cache, mask, grad_cache if want_cache else None, into_weights,
            *cache.stride()[:2], L, H, BL, BH,
        )  # fmt: skip
        if A and (want_query or want_keys or want_score_weights):
            parts = query.new_empty(B, A) if want_score_weights else None
            cached_attention_bwd_kernel_scores[(B * triton.cdiv(A, BA),)](
                into_weights, weights, query, keys, score_weights, mask, grad_query if want_query else None,
                grad_keys if want_keys else None, parts, *keys.stride()[:2], L, A, BL, BA,
            )  # fmt: skip
            if parts is not None:
                sum_of_parts(parts, grad_score_weights)
    return grad_query, grad_keys, grad_cache, grad_score_weights
