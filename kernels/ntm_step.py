"""One memory step of an NTM in Triton: one launch forward, one launch backward.

    content = content_addressing(M, key, strength)
    weights = location_addressing(content, weights of the step before, gate, shift, sharpness)
    a read head: reads = weighted_read(M, weights)          a write head: M = memory_write(M, weights, erase, values)

Heads act in the order of their list, each complete before the next begins. Heads between two writes see the same memory
and form a run: they are looked up together, and the write head that ends the run is one of them. Joint writes make the
whole list one run, whose writes come together at its end. The tape holds the content weights of each head, and the
memory that each run but the first begins with.

One program owns one sample and walks its memory tile by tile in each phase. The list of heads is a constant, so the
loops over runs and heads are unrolled. What a phase hands to the next lies in memory, and a barrier ends each phase.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ranges import clamped, sigmoid, sigmoid_slope, softmax, softmax_backward, softplus, through_clamp
from ._similarity import (
    BLOCK_HEADS,
    BLOCK_SLOTS_BACKWARD,
    finite_peak,
    key_gradient,
    key_slope,
    load_heads,
    row_gradient,
    score_gradient,
    similarity,
)
from ._tiles import block, load_tile, multiply_add, store_tile, tile_size
from .content_addressing import overlap_terms, softmax_gradient, softmax_weight
from .location_addressing import address_head, address_head_backward
from .memory_write import added, erase_gradient, kept, value_gradient, weight_gradient
from .sharpen import BLOCK

# All phases together take more registers than one alone: smaller tiles in the backward and the warps below spill none.
WIDEST_BACKWARD = 32


@triton.constexpr_function
def run_bounds(heads, joint_writes):
    """The first head of each run, and the number of heads."""
    after_writes = [] if joint_writes else [h + 1 for h in range(len(heads) - 1) if heads[h] == "w"]
    return [0, *after_writes, len(heads)]


@triton.constexpr_function
def bound(heads, joint_writes, run):
    return run_bounds(heads, joint_writes)[run]


@triton.constexpr_function
def runs(heads, joint_writes):
    return len(run_bounds(heads, joint_writes)) - 1


@triton.constexpr_function
def writes(heads, head):
    return heads[head] == "w"


@triton.constexpr_function
def before(kind, heads, head):
    """The number of heads of a kind before this one."""
    return heads[:head].count(kind)


@triton.constexpr_function
def readers(heads, head, first):
    """The number of read heads from here to the next write, counted once: 0 in their midst."""
    if head > first and heads[head - 1] == "r":
        return 0
    return len(heads) - head - len(heads[head:].lstrip("r"))


@triton.constexpr_function
def raw_size(kind, word, taps):
    return word + 3 + taps + (2 * word if kind == "w" else 0)


@triton.constexpr_function
def raw_offset(heads, head, word, taps):
    return sum(raw_size(kind, word, taps) for kind in heads[:head])


@triton.constexpr_function
def power_of_two(count):
    return 1 << max(0, count - 1).bit_length()


@triton.jit
def row(p_matrix, i_row, N):
    """The start of a row of N numbers; a sample alone may have more of them than an int32 counts."""
    return p_matrix + tl.cast(i_row, tl.int64) * N


@triton.jit
def fields_of(p_fields, HEADS: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr):
    """Keys [A, W], strengths [A], gates [A], shifts [A, TAPS], sharpness [A], erase [Q, W], values [Q, W]: the fields
    of all heads, each field together, so that a run of heads is looked up at once. They fill as much as the vector."""
    A: tl.constexpr = len(HEADS)
    p_strengths = p_fields + A * W
    p_gates = p_strengths + A
    p_shifts = p_gates + A
    p_sharpness = p_shifts + A * TAPS
    p_erase = p_sharpness + A
    p_values = p_erase + before("w", HEADS, A) * W
    return p_fields, p_strengths, p_gates, p_shifts, p_sharpness, p_erase, p_values


@triton.jit
def take_field(p_raw, p_grad_raw, p_field, limit, first, COUNT: tl.constexpr, RANGE: tl.constexpr):
    """The numbers from first on as a field within its range; with p_grad_raw, their gradient from that of the field."""
    o_field, m_field = block(0, COUNT, power_of_two(COUNT))
    b_raw = tl.load(p_raw + first + o_field, mask=m_field, other=0.0)
    b_inside = clamped(b_raw, limit)
    if RANGE == "simplex":
        b_inside = softmax(tl.where(m_field, b_inside, -float("inf")))
    if p_grad_raw is None:
        if RANGE == "positive":
            b_inside = softplus(b_inside)
        elif RANGE == "above one":
            b_inside = 1.0 + softplus(b_inside)
        elif RANGE == "unit":
            b_inside = sigmoid(b_inside)
        tl.store(p_field + o_field, b_inside, mask=m_field)
    else:
        b_grad = tl.load(p_field + o_field, mask=m_field, other=0.0)
        if RANGE == "simplex":
            b_grad = softmax_backward(b_inside, b_grad)
        elif (RANGE == "positive") or (RANGE == "above one"):
            b_grad *= sigmoid(b_inside)
        elif RANGE == "unit":
            b_grad *= sigmoid_slope(b_inside)
        tl.store(p_grad_raw + first + o_field, through_clamp(b_grad, b_raw, limit), mask=m_field)


@triton.jit
def take_fields(
    p_raw, p_grad_raw, p_fields, limit, HEADS: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr
):  # fmt: skip
    """All fields from the interface vector; with p_grad_raw, from their gradients to that of the vector."""
    p_keys, p_strengths, p_gates, p_shifts, p_sharpness, p_erase, p_values = fields_of(p_fields, HEADS, W, TAPS)
    for h in tl.static_range(len(HEADS)):
        first = raw_offset(HEADS, h, W, TAPS)
        take_field(p_raw, p_grad_raw, p_keys + h * W, limit, first, W, "any")
        take_field(p_raw, p_grad_raw, p_strengths + h, limit, first + W, 1, "positive")
        take_field(p_raw, p_grad_raw, p_gates + h, limit, first + W + 1, 1, "unit")
        take_field(p_raw, p_grad_raw, p_shifts + h * TAPS, limit, first + W + 2, TAPS, "simplex")
        take_field(p_raw, p_grad_raw, p_sharpness + h, limit, first + W + 2 + TAPS, 1, "above one")
        if writes(HEADS, h):
            o_q = before("w", HEADS, h) * W
            take_field(p_raw, p_grad_raw, p_erase + o_q, limit, first + W + 3 + TAPS, W, "unit")
            take_field(p_raw, p_grad_raw, p_values + o_q, limit, first + W + 3 + TAPS + W, W, "any")
    tl.debug_barrier()


@triton.jit
def look_up(
    p_memory,
    p_keys,
    p_strengths,
    p_content,
    eps,
    N,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    NORM: tl.constexpr,
):
    """The content weights of the heads from FIRST to before LAST: their scores, then the softmax of these in place."""
    DTYPE: tl.constexpr = p_keys.dtype.element_ty
    for i_a in range(FIRST, LAST, BA):
        o_a, m_a = block(i_a, LAST, BA)
        b_strength = tl.load(p_strengths + o_a, mask=m_a, other=0.0)
        b_peak = tl.full([BA], -float("inf"), dtype=DTYPE)
        b_mass = tl.zeros([BA], dtype=DTYPE)
        for i_n in range(0, N, BN):
            o_n, m_n = block(i_n, N, BN)
            b_similarity, _ = similarity(
                p_memory, p_keys, None, o_n, m_n, W, o_a, m_a, eps, W, BA, BN, BW, NORM
            )  # fmt: skip
            b_score = tl.where(m_n[None, :], b_strength[:, None] * b_similarity, -float("inf"))
            store_tile(p_content, b_score, N, o_a, m_a, o_n, m_n)
            b_old_peak = b_peak
            b_peak = tl.maximum(b_peak, tl.max(b_score, 1))
            b_mass *= tl.exp(b_old_peak - finite_peak(b_peak))
            b_mass += tl.sum(tl.exp(b_score - finite_peak(b_peak)[:, None]), 1)
        tl.debug_barrier()
        for i_n in range(0, N, BN):
            o_n, m_n = block(i_n, N, BN)
            b_score = load_tile(p_content, N, o_a, m_a, o_n, m_n)
            store_tile(p_content, softmax_weight(b_score, b_peak[:, None], b_mass[:, None]), N, o_a, m_a, o_n, m_n)
    tl.debug_barrier()


@triton.jit
def look_up_backward(
    p_grad_content,
    p_content,
    p_memory,
    p_keys,
    p_strengths,
    p_grad_memory,
    p_grad_keys,
    p_grad_strengths,
    eps,
    N,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    NORM: tl.constexpr,
):
    """Adds to the gradient of the memory. Every piece of a word scores anew, and has the same sums over the slots."""
    DTYPE: tl.constexpr = p_keys.dtype.element_ty
    for i_a in range(FIRST, LAST, BA):
        o_a, m_a = block(i_a, LAST, BA)
        b_strength = tl.load(p_strengths + o_a, mask=m_a, other=0.0)
        b_overlap = tl.zeros([BA], dtype=DTYPE)
        for i_n in range(0, N, BN):
            o_n, m_n = block(i_n, N, BN)
            b_grad = load_tile(p_grad_content, N, o_a, m_a, o_n, m_n)
            b_weight = load_tile(p_content, N, o_a, m_a, o_n, m_n)
            b_overlap += tl.sum(overlap_terms(b_grad, b_weight), 1)
        b_key_square = tl.zeros([BA], dtype=DTYPE)
        for i_w in range(0, W, BW):
            b_key = load_heads(p_keys, o_a, m_a, i_w + tl.arange(0, BW), W)
            b_key_square += tl.sum(b_key * b_key, 1)
        b_scored = tl.zeros([BA], dtype=DTYPE)
        b_key_slope = key_slope(b_key_square, eps, W, NORM)

        for i_w in range(0, W, BW):
            o_w, m_w = block(i_w, W, BW)
            b_pulled = tl.zeros([BA, BW], dtype=DTYPE)
            b_turned = tl.zeros([BA], dtype=DTYPE)
            b_scored = tl.zeros([BA], dtype=DTYPE)
            for i_n in range(0, N, BN):
                o_n, m_n = block(i_n, N, BN)
                b_similarity, norms = similarity(
                    p_memory, p_keys, None, o_n, m_n, W, o_a, m_a, eps, W, BA, BN, BW, NORM
                )  # fmt: skip
                b_grad = load_tile(p_grad_content, N, o_a, m_a, o_n, m_n)
                b_weight = load_tile(p_content, N, o_a, m_a, o_n, m_n)
                b_dscore = softmax_gradient(b_grad, b_weight, b_overlap[:, None])
                b_pull, b_shrink, b_turn, b_score = score_gradient(
                    b_dscore, b_weight != 0.0, b_strength, b_similarity, norms, eps, NORM
                )
                b_rows = load_tile(p_memory, W, o_n, m_n, o_w, m_w)
                b_grad_rows = load_tile(p_grad_memory, W, o_n, m_n, o_w, m_w)
                b_grad_rows += row_gradient(b_pull, b_shrink, b_rows, m_n, p_keys, None, o_a, m_a, o_w, W)
                store_tile(p_grad_memory, b_grad_rows, W, o_n, m_n, o_w, m_w)
                b_pulled = multiply_add(b_pull, b_rows, b_pulled)
                b_turned += b_turn
                b_scored += b_score
            b_key = load_tile(p_keys, W, o_a, m_a, o_w, m_w)
            b_grad_key = key_gradient(b_pulled, (b_turned * b_key_slope)[:, None], b_key)
            store_tile(p_grad_keys, b_grad_key, W, o_a, m_a, o_w, m_w)
        tl.store(p_grad_strengths + o_a, b_scored, mask=m_a)
        tl.debug_barrier()


@triton.jit
def read(
    p_memory,
    p_weights,  # of the first of the heads
    p_reads,
    N,
    COUNT: tl.constexpr,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """What COUNT read heads, one after the other, read. Nothing in this step waits for it."""
    for i_a in range(0, COUNT, BA):
        o_a, m_a = block(i_a, COUNT, BA)
        for i_w in range(0, W, BW):
            o_w, m_w = block(i_w, W, BW)
            b_sum = tl.zeros([BA, BW], dtype=p_reads.dtype.element_ty)
            for i_n in range(0, N, BN):
                o_n, m_n = block(i_n, N, BN)
                b_rows = load_tile(p_memory, W, o_n, m_n, o_w, m_w)
                b_weights = load_tile(p_weights, N, o_a, m_a, o_n, m_n)
                b_sum = multiply_add(b_weights, b_rows, b_sum)
            store_tile(p_reads, b_sum, W, o_a, m_a, o_w, m_w)


@triton.jit
def read_backward(
    p_grad_reads,
    p_memory,
    p_weights,
    p_grad_memory,
    p_grad_weights,
    N,
    COUNT: tl.constexpr,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Adds to the gradients of the memory and of the weights."""
    for i_a in range(0, COUNT, BA):
        o_a, m_a = block(i_a, COUNT, BA)
        for i_n in range(0, N, BN):
            o_n, m_n = block(i_n, N, BN)
            b_weights = load_tile(p_weights, N, o_a, m_a, o_n, m_n)
            b_grad_weights = load_tile(p_grad_weights, N, o_a, m_a, o_n, m_n)
            for i_w in range(0, W, BW):
                o_w, m_w = block(i_w, W, BW)
                b_grad_reads = load_tile(p_grad_reads, W, o_a, m_a, o_w, m_w)
                b_rows = load_tile(p_memory, W, o_n, m_n, o_w, m_w)
                b_grad_weights = multiply_add(b_grad_reads, tl.trans(b_rows), b_grad_weights)
                b_grad_rows = load_tile(p_grad_memory, W, o_n, m_n, o_w, m_w)
                b_grad_rows = multiply_add(tl.trans(b_weights), b_grad_reads, b_grad_rows)
                store_tile(p_grad_memory, b_grad_rows, W, o_n, m_n, o_w, m_w)
            store_tile(p_grad_weights, b_grad_weights, N, o_a, m_a, o_n, m_n)
        tl.debug_barrier()


@triton.jit
def kept_by_others(
    p_weights, p_erase, o_n, m_n, o_w, m_w, N,
    HEAD: tl.constexpr, HEADS: tl.constexpr, FIRST: tl.constexpr, LAST: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """What the write heads of a run but HEAD keep of a tile."""
    b_kept = tl.full([o_n.shape[0], o_w.shape[0]], 1.0, dtype=p_erase.dtype.element_ty)
    for h in tl.static_range(FIRST, LAST):
        if writes(HEADS, h) and h != HEAD:
            b_kept *= kept(row(p_weights, h, N), p_erase + before("w", HEADS, h) * W, 0, 1, o_n, m_n, o_w, m_w, N, W)
    return b_kept


@triton.jit
def write(
    p_memory,
    p_weights,
    p_erase,
    p_values,
    p_new_memory,  # may be p_memory
    p_kept,  # another place for the new memory, or None
    N,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    W: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """All writes of a run."""
    for i_n in range(0, N, BN):
        o_n, m_n = block(i_n, N, BN)
        for i_w in range(0, W, BW):
            o_w, m_w = block(i_w, W, BW)
            b_memory = load_tile(p_memory, W, o_n, m_n, o_w, m_w)
            b_memory *= kept_by_others(p_weights, p_erase, o_n, m_n, o_w, m_w, N, -1, HEADS, FIRST, LAST, W)
            for h in tl.static_range(FIRST, LAST):
                if writes(HEADS, h):
                    p_value = p_values + before("w", HEADS, h) * W
                    b_memory += added(row(p_weights, h, N), p_value, 0, 1, o_n, m_n, o_w, m_w, N, W)
            store_tile(p_new_memory, b_memory, W, o_n, m_n, o_w, m_w)
            if p_kept is not None:
                store_tile(p_kept, b_memory, W, o_n, m_n, o_w, m_w)
    tl.debug_barrier()


@triton.jit
def write_backward(
    p_memory,
    p_weights,
    p_erase,
    p_values,
    p_grad_memory,  # of the new memory on entry, of the old one after
    p_grad_weights,
    p_grad_erase,
    p_grad_values,
    N,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    W: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
):
    """Adds to the gradient of the weights."""
    DTYPE: tl.constexpr = p_erase.dtype.element_ty
    for h in tl.static_range(FIRST, LAST):
        if writes(HEADS, h):
            o_q = before("w", HEADS, h) * W
            for i_w in range(0, W, BW):
                o_w, m_w = block(i_w, W, BW)
                b_erase = tl.load(p_erase + o_q + o_w, mask=m_w, other=0.0)
                b_value = tl.load(p_values + o_q + o_w, mask=m_w, other=0.0)
                b_grad_erase = tl.zeros([BW], dtype=DTYPE)
                b_grad_value = tl.zeros([BW], dtype=DTYPE)
                for i_n in range(0, N, BN):
                    o_n, m_n = block(i_n, N, BN)
                    b_weight = tl.load(row(p_weights, h, N) + o_n, mask=m_n, other=0.0)
                    b_grad = load_tile(p_grad_memory, W, o_n, m_n, o_w, m_w)
                    b_erased = b_grad * load_tile(p_memory, W, o_n, m_n, o_w, m_w)
                    b_erased *= kept_by_others(p_weights, p_erase, o_n, m_n, o_w, m_w, N, h, HEADS, FIRST, LAST, W)
                    b_grad_weight = tl.load(row(p_grad_weights, h, N) + o_n, mask=m_n, other=0.0)
                    b_grad_weight += weight_gradient(b_grad, b_erased, b_erase, b_value)
                    tl.store(row(p_grad_weights, h, N) + o_n, b_grad_weight, mask=m_n)
                    b_grad_erase += erase_gradient(b_erased, b_weight)
                    b_grad_value += value_gradient(b_grad, b_weight)
                tl.store(p_grad_erase + o_q + o_w, b_grad_erase, mask=m_w)
                tl.store(p_grad_values + o_q + o_w, b_grad_value, mask=m_w)
                # The next piece of the word adds to the same weights.
                tl.debug_barrier()
    for i_n in range(0, N, BN):
        o_n, m_n = block(i_n, N, BN)
        for i_w in range(0, W, BW):
            o_w, m_w = block(i_w, W, BW)
            b_grad = load_tile(p_grad_memory, W, o_n, m_n, o_w, m_w)
            b_grad *= kept_by_others(p_weights, p_erase, o_n, m_n, o_w, m_w, N, -1, HEADS, FIRST, LAST, W)
            store_tile(p_grad_memory, b_grad, W, o_n, m_n, o_w, m_w)
    tl.debug_barrier()


@triton.jit
def act(
    fields,
    p_memory,
    p_weights,
    p_new_memory,
    p_new_weights,
    p_reads,
    p_content,
    p_kept,
    p_shifted,
    eps,
    N,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DIRECTION: tl.constexpr,
    IN_POWERS: tl.constexpr,
    SHARPEN_EPS: tl.constexpr,
    NORM: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BS: tl.constexpr,
):
    """The heads of a run, from FIRST to before LAST: they address, read, then write."""
    p_keys, p_strengths, p_gates, p_shifts, p_sharpness, p_erase, p_values = fields
    look_up(p_memory, p_keys, p_strengths, p_content, eps, N, FIRST, LAST, W, BA, BN, BW, NORM)
    for h in tl.static_range(FIRST, LAST):
        address_head(
            p_content, p_weights, p_gates, p_shifts, p_sharpness, p_shifted, p_new_weights, tl.cast(h, tl.int64),
            N, TAPS, DIRECTION, SHARPEN_EPS, IN_POWERS, BS,
        )  # fmt: skip
    tl.debug_barrier()
    for h in tl.static_range(FIRST, LAST):
        if readers(HEADS, h, FIRST) > 0:
            p_first_read = p_reads + before("r", HEADS, h) * W
            read(p_memory, row(p_new_weights, h, N), p_first_read, N, readers(HEADS, h, FIRST), W, BA, BN, BW)
    if before("w", HEADS, LAST) > before("w", HEADS, FIRST):
        # The memory may be written where it was read.
        tl.debug_barrier()
        write(
            p_memory, p_new_weights, p_erase, p_values, p_new_memory, p_kept, N, HEADS, FIRST, LAST, W, BN, BW
        )  # fmt: skip


@triton.jit
def act_backward(
    fields,
    grad_fields,
    p_memory,
    p_weights,
    p_new_weights,
    p_content,
    p_grad_reads,
    p_grad_memory,
    p_grad_weights,
    p_grad_content,
    p_grad_shifted,
    eps,
    N,
    HEADS: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    DIRECTION: tl.constexpr,
    IN_POWERS: tl.constexpr,
    SHARPEN_EPS: tl.constexpr,
    NORM: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BS: tl.constexpr,
):
    p_keys, p_strengths, p_gates, p_shifts, p_sharpness, p_erase, p_values = fields
    p_grad_keys, p_grad_strengths, p_grad_gates, p_grad_shifts, p_grad_sharpness, p_grad_erase, p_grad_values = (
        grad_fields
    )
    if before("w", HEADS, LAST) > before("w", HEADS, FIRST):
        write_backward(
            p_memory, p_new_weights, p_erase, p_values, p_grad_memory, p_grad_weights, p_grad_erase, p_grad_values,
            N, HEADS, FIRST, LAST, W, BN, BW,
        )  # fmt: skip
    if p_grad_reads is not None:
        for h in tl.static_range(FIRST, LAST):
            if readers(HEADS, h, FIRST) > 0:
                read_backward(
                    p_grad_reads + before("r", HEADS, h) * W, p_memory, row(p_new_weights, h, N),
                    p_grad_memory, row(p_grad_weights, h, N), N, readers(HEADS, h, FIRST), W, BA, BN, BW,
                )  # fmt: skip
    for h in tl.static_range(FIRST, LAST):
        address_head_backward(
            p_grad_weights, p_new_weights, p_content, p_weights, p_gates, p_shifts, p_sharpness, p_grad_shifted,
            p_grad_content, p_grad_weights, p_grad_gates, p_grad_shifts, p_grad_sharpness,
            tl.cast(h, tl.int64), N, TAPS, DIRECTION, SHARPEN_EPS, IN_POWERS, BS,
        )  # fmt: skip
    tl.debug_barrier()
    look_up_backward(
        p_grad_content, p_content, p_memory, p_keys, p_strengths, p_grad_memory, p_grad_keys, p_grad_strengths,
        eps, N, FIRST, LAST, W, BA, BN, BW, NORM,
    )  # fmt: skip


@triton.jit
def begin_gradient(p_gradient, p_upstream, o_sample, COUNT, BLOCK: tl.constexpr):
    """The upstream gradient, or zero where there is none."""
    for i in range(0, COUNT, BLOCK):
        o, m = block(i, COUNT, BLOCK)
        b_gradient = tl.zeros([BLOCK], dtype=p_gradient.dtype.element_ty)
        if p_upstream is not None:
            b_gradient = tl.load(p_upstream + o_sample + o, mask=m, other=0.0)
        tl.store(p_gradient + o_sample + o, b_gradient, mask=m)


@triton.jit
def ntm_step_fwd_kernel(
    p_interface,  # [B, S]
    p_memory,  # [B, N, W]
    p_weights,  # [B, A, N]
    p_new_memory,  # [B, N, W], may be p_memory
    p_new_weights,  # [B, A, N], may be p_weights
    p_reads,  # [B, R, W]
    p_tape,  # [B, stride_tape], the first A N numbers alone where no memories are kept
    p_fields,  # [B, S], scratch
    p_shifted,  # [B, A, N], scratch
    stride_tape,
    N,
    HEADS: tl.constexpr,
    JOINT_WRITES: tl.constexpr,
    KEEPS: tl.constexpr,
    DIRECTION: tl.constexpr,
    IN_POWERS: tl.constexpr,
    SHARPEN_EPS: tl.constexpr,
    CLIP: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BS: tl.constexpr,
):
    A: tl.constexpr = len(HEADS)
    S: tl.constexpr = raw_offset(HEADS, A, W, TAPS)
    DTYPE: tl.constexpr = p_memory.dtype.element_ty
    eps = tl.full([], EPS, dtype=DTYPE)
    i_b = tl.program_id(0).to(tl.int64)
    p_memory += i_b * N * W
    p_weights += i_b * A * N
    p_new_memory += i_b * N * W
    p_new_weights += i_b * A * N
    p_reads += i_b * before("r", HEADS, A) * W
    p_content = p_tape + i_b * stride_tape
    p_kept = row(p_content, A, N)
    p_fields += i_b * S
    p_shifted += i_b * A * N

    take_fields(p_interface + i_b * S, None, p_fields, tl.full([], CLIP, dtype=DTYPE), HEADS, W, TAPS)
    fields = fields_of(p_fields, HEADS, W, TAPS)
    for run in tl.static_range(runs(HEADS, JOINT_WRITES)):
        act(
            fields, p_memory, p_weights, p_new_memory, p_new_weights, p_reads, p_content,
            row(p_kept, run * W, N) if KEEPS and run + 1 < runs(HEADS, JOINT_WRITES) else None, p_shifted, eps, N,
            HEADS, bound(HEADS, JOINT_WRITES, run), bound(HEADS, JOINT_WRITES, run + 1), DIRECTION, IN_POWERS,
            SHARPEN_EPS, NORM, W, TAPS, BA, BN, BW, BS,
        )  # fmt: skip
        p_memory = p_new_memory


@triton.jit
def ntm_step_bwd_kernel(
    p_grad_new_memory,  # [B, N, W] or None
    p_grad_new_weights,  # [B, A, N] or None
    p_grad_reads,  # [B, R, W] or None
    p_new_weights,  # [B, A, N]
    p_tape,  # [B, stride_tape]
    p_interface,  # [B, S]
    p_memory,  # [B, N, W]
    p_weights,  # [B, A, N]
    p_grad_interface,  # [B, S]
    p_grad_memory,  # [B, N, W], of the memory as it is at each point on the way back
    p_grad_weights,  # [B, A, N], of the new weights first, then of the old ones
    p_fields,  # [B, S], scratch
    p_grad_fields,  # [B, S], scratch
    p_grad_shifted,  # [B, A, N], scratch
    p_grad_content,  # [B, A, N], scratch
    stride_tape,
    N,
    HEADS: tl.constexpr,
    JOINT_WRITES: tl.constexpr,
    DIRECTION: tl.constexpr,
    IN_POWERS: tl.constexpr,
    SHARPEN_EPS: tl.constexpr,
    CLIP: tl.constexpr,
    NORM: tl.constexpr,
    EPS: tl.constexpr,
    W: tl.constexpr,
    TAPS: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    BS: tl.constexpr,
):
    A: tl.constexpr = len(HEADS)
    S: tl.constexpr = raw_offset(HEADS, A, W, TAPS)
    DTYPE: tl.constexpr = p_memory.dtype.element_ty
    eps = tl.full([], EPS, dtype=DTYPE)
    limit = tl.full([], CLIP, dtype=DTYPE)
    i_b = tl.program_id(0).to(tl.int64)
    begin_gradient(p_grad_memory, p_grad_new_memory, i_b * N * W, tl.cast(N, tl.int64) * W, BS)
    begin_gradient(p_grad_weights, p_grad_new_weights, i_b * A * N, tl.cast(N, tl.int64) * A, BS)
    p_new_weights += i_b * A * N
    p_content = p_tape + i_b * stride_tape
    p_kept = row(p_content, A, N)
    p_interface += i_b * S
    p_memory += i_b * N * W
    p_weights += i_b * A * N
    p_grad_memory += i_b * N * W
    p_grad_weights += i_b * A * N
    p_fields += i_b * S
    p_grad_fields += i_b * S
    p_grad_shifted += i_b * A * N
    p_grad_content += i_b * A * N

    take_fields(p_interface, None, p_fields, limit, HEADS, W, TAPS)
    if p_grad_reads is not None:
        p_grad_reads += i_b * before("r", HEADS, A) * W
    fields = fields_of(p_fields, HEADS, W, TAPS)
    grad_fields = fields_of(p_grad_fields, HEADS, W, TAPS)
    for run in tl.static_range(runs(HEADS, JOINT_WRITES) - 1, -1, -1):
        act_backward(
            fields, grad_fields, row(p_kept, (run - 1) * W, N) if run > 0 else p_memory, p_weights, p_new_weights,
            p_content, p_grad_reads, p_grad_memory, p_grad_weights, p_grad_content, p_grad_shifted, eps, N,
            HEADS, bound(HEADS, JOINT_WRITES, run), bound(HEADS, JOINT_WRITES, run + 1), DIRECTION, IN_POWERS,
            SHARPEN_EPS, NORM, W, TAPS, BA, BN, BW, BS,
        )  # fmt: skip
    take_fields(p_interface, p_grad_interface + i_b * S, p_grad_fields, limit, HEADS, W, TAPS)


def _kept_memories(heads: str, joint_writes: bool) -> int:
    """One for each run but the first: a run ends with each write but one at the end of the list."""
    return 0 if joint_writes else heads[:-1].count("w")


def _taps(interface: Tensor, word: int, heads: str) -> int:
    """What the heads leave over."""
    return (interface.shape[1] - 2 * word * heads.count("w")) // len(heads) - word - 3


def _step(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    new_memory: Tensor,
    new_weights: Tensor,
    reads: Tensor,
    tape: Tensor,
    heads: str,
    joint_writes: bool,
    keeps: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
) -> None:
    B, N, W = memory.shape
    if B * N == 0:
        reads.zero_()
        return
    with torch.cuda.device_of(memory):
        ntm_step_fwd_kernel[(B,)](
            interface, memory, weights, new_memory, new_weights, reads, tape,
            torch.empty_like(interface), torch.empty_like(weights), tape.shape[1], N,
            heads, joint_writes, keeps, -1 if reversed_shift else 1, in_powers, sharpen_eps, clip, norm, eps,
            W, _taps(interface, W, heads), BLOCK_HEADS, *tile_size(memory), BLOCK,
            num_warps=4 if memory.dtype == torch.float64 else 8,
        )  # fmt: skip


def ntm_step(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, W = memory.shape
    interface, memory, weights = interface.contiguous(), memory.contiguous(), weights.contiguous()
    new_memory = torch.empty_like(memory) if "w" in heads else memory.clone()
    new_weights = torch.empty_like(weights)
    reads = memory.new_empty(B, heads.count("r"), W)
    tape = memory.new_empty(B, (len(heads) + _kept_memories(heads, joint_writes) * W) * N)
    _step(
        interface, memory, weights, new_memory, new_weights, reads, tape,
        heads, joint_writes, True, reversed_shift, in_powers, sharpen_eps, clip, norm, eps,
    )  # fmt: skip
    return new_memory, new_weights, reads, tape


def ntm_step_(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    reads: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
) -> None:
    """Overwrites memory, weights and reads, which are contiguous."""
    content = torch.empty_like(weights).flatten(1)
    _step(
        interface.contiguous(), memory, weights, memory, weights, reads, content,
        heads, joint_writes, False, reversed_shift, in_powers, sharpen_eps, clip, norm, eps,
    )  # fmt: skip


def ntm_step_backward(
    grad_memory: Tensor | None,
    grad_weights: Tensor | None,
    grad_reads: Tensor | None,
    new_weights: Tensor,
    tape: Tensor,
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    B, N, W = memory.shape
    upstream = (None if grad is None else grad.contiguous() for grad in (grad_memory, grad_weights, grad_reads))
    known = tuple(tensor.contiguous() for tensor in (new_weights, tape, interface, memory, weights))
    interface, weights = known[2], known[4]
    gradients = tuple(torch.empty_like(tensor) for tensor in known[2:])
    if B * N == 0:
        for gradient in gradients:
            gradient.zero_()
    else:
        with torch.cuda.device_of(memory):
            ntm_step_bwd_kernel[(B,)](
                *upstream, *known, *gradients,
                torch.empty_like(interface), torch.empty_like(interface),
                torch.empty_like(weights), torch.empty_like(weights), tape.shape[1], N,
                heads, joint_writes, -1 if reversed_shift else 1, in_powers, sharpen_eps, clip, norm, eps,
                W, _taps(interface, W, heads), BLOCK_HEADS, BLOCK_SLOTS_BACKWARD,
                min(WIDEST_BACKWARD, tile_size(memory)[1]), BLOCK,
                num_warps=8 if memory.dtype == torch.float32 and W % 16 == 0 else 4,
            )  # fmt: skip
    return tuple(grad if wants else memory.new_empty(0) for grad, wants in zip(gradients, output_mask, strict=True))
