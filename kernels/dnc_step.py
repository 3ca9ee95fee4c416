"""One memory step of a DNC in Triton: one launch forward, three launches backward.

    u, retention = usage_update(u, w, r, free gates)             a = allocation(u, allocation gates * write gates)
    w = write gate (allocation gate a + (1 - allocation gate) content(M, write keys))
    M = memory_write(M, w, erase, values[, retention])           L, p, f, b = temporal_linkage(L, p, w, r)
    r = read modes . (b, content(M, read keys), f)               reads = weighted_read(M, r)

One program steps one sample: it runs the programs of the single ops' kernels that the sample would get, one after
another, on pointers that begin at the sample, so that to them it is sample 0 of one. Here are their order, the ranges
of the interface and the chain rule. What one phase stores for the next lies in global memory; a barrier ends each
phase, since a thread reads what others have stored. The backward in one launch would spill registers: its phases fall
into three, the reads, the writes and the search before the writes, and one kernel serves them all. The tape of the
forward is that of the reference.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._ranges import clamped, sigmoid, sigmoid_slope, softmax, softmax_backward, softplus, through_clamp
from ._similarity import BLOCK_HEADS, BLOCK_SLOTS, BLOCK_SLOTS_BACKWARD, block_width, similarity_bwd_kernel_fold
from ._tiles import block, sum_of_parts_kernel
from .allocation import (
    BLOCK_COUNT,
    allocation_bwd_kernel,
    allocation_bwd_kernel_later,
    allocation_fwd_kernel,
    allocation_kernel_order,
    left,
    left_backward,
)
from .content_addressing import (
    content_addressing_bwd_kernel,
    content_addressing_bwd_kernel_overlap,
    content_addressing_fwd_kernel_scores,
    content_addressing_fwd_kernel_softmax,
)
from .memory_write import memory_write_bwd_kernel_heads, memory_write_bwd_kernel_slots, memory_write_fwd_kernel
from .sharpen import sharpen_head, sharpen_head_backward
from .temporal_linkage import (
    temporal_linkage_bwd_kernel,
    temporal_linkage_bwd_kernel_fold,
    temporal_linkage_bwd_kernel_fold_reads,
    temporal_linkage_fwd_kernel,
    temporal_linkage_fwd_kernel_fold,
)
from .usage_update import usage_update_bwd_kernel, usage_update_fwd_kernel
from .weighted_read import weighted_read_bwd_kernel_memory, weighted_read_bwd_kernel_weights, weighted_read_fwd_kernel

SHARPENING_EPS: tl.constexpr = tl.constexpr(1e-6)
BLOCK = 256  # slots or numbers of a vector: one a thread
WARPS = 8
# Left alone, the assembler may spill to fit more blocks on a multiprocessor than there are samples.
MOST_REGISTERS = 255
PHASES = 3  # launches of the backward: in one, it would spill


@triton.jit
def fields_of(first, R, Q, W, MASKED: tl.constexpr):
    """Where each field of an interface vector begins, counted from `first`, a position or a pointer; where there are
    no masks or no sharpness, these begin where they would."""
    read_strengths = first + R * W
    write_keys = read_strengths + R
    write_strengths = write_keys + Q * W
    erase = write_strengths + Q
    values = erase + Q * W
    free_gates = values + Q * W
    allocation_gates = free_gates + R
    write_gates = allocation_gates + Q
    modes = write_gates + Q
    write_masks = modes + R * (2 * Q + 1)
    read_masks = write_masks + Q * W
    forward_sharpness = read_masks + R * W if MASKED else write_masks
    return (
        first, read_strengths, write_keys, write_strengths, erase, values, free_gates, allocation_gates, write_gates,
        modes, write_masks, read_masks, forward_sharpness, forward_sharpness + R,
    )  # fmt: skip


@triton.jit
def tape_of(p_tape, N, R, Q, SHARPENED: tl.constexpr):
    """Where each part of the tape begins; unsharpened, forward and backward stand for themselves sharpened."""
    p_allocated = p_tape + N
    p_found = p_allocated + Q * N
    p_forward = p_found + Q * N
    p_backward = p_forward + Q * R * N
    p_sharp_forward = p_backward + Q * R * N if SHARPENED else p_forward
    p_sharp_backward = p_sharp_forward + Q * R * N
    return (
        p_tape, p_allocated, p_found, p_forward, p_backward, p_sharp_forward, p_sharp_backward,
        p_sharp_backward + Q * R * N,
    )  # fmt: skip


@triton.jit
def scratch_of(p_scratch, S, N, R, Q, T, tiles):
    """Where each part of the scratch begins, and where it ends, from a pointer or, by `fn`, a position. The memory has
    so many tiles of slots, and the link T by T of its own."""
    p_seen = p_scratch + S  # [Q, N], the usage that each write head sees; before it the fields, [S]
    p_peaks = p_seen + Q * N  # [R or Q, tiles]
    p_masses = p_peaks + (R + Q) * tiles  # [R or Q, tiles]
    p_rows = p_masses + (R + Q) * tiles  # [Q, T, R, N]
    p_columns = p_rows + Q * T * R * N  # [Q, T, R, N]
    return p_scratch, p_seen, p_peaks, p_masses, p_rows, p_columns, p_columns + Q * T * R * N


@triton.jit
def scratch_of_backward(p_into_memory, S, N, R, Q, W, T, tiles, blocks):
    """As `scratch_of`. First comes the gradient of the new memory, [N, W]."""
    p_by_content = p_into_memory + N * W  # [N, W]
    p_into_read = p_by_content + N * W  # [R, N], of the new read weights
    p_into_content = p_into_read + R * N  # [R, N]
    p_by_usage = p_into_content + R * N  # [R, N]
    p_into_forward = p_by_usage + R * N  # [Q, R, N]
    p_into_backward = p_into_forward + Q * R * N  # [Q, R, N]
    p_into_write = p_into_backward + Q * R * N  # [Q, N], of the new write weights
    p_by_link = p_into_write + Q * N  # [Q, N]
    p_into_allocated = p_by_link + Q * N  # [Q, N]
    p_into_found = p_into_allocated + Q * N  # [Q, N]
    p_seen = p_into_found + Q * N  # [Q, N], the usage that each write head sees
    p_difference = p_seen + Q * N  # [N]
    p_into_usage = p_difference + N  # [N], of the new usage
    p_into_retention = p_into_usage + N  # [N]
    p_rows_read = p_into_retention + N  # [Q, T, R, N]
    p_columns_read = p_rows_read + Q * T * R * N  # [Q, T, R, N]
    p_rows_write = p_columns_read + Q * T * R * N  # [Q, T, N]
    p_columns_write = p_rows_write + Q * T * N  # [Q, T, N]
    p_columns_precedence = p_columns_write + Q * T * N  # [Q, T, N]
    p_erase_parts = p_columns_precedence + Q * T * N  # [tiles of slots, Q, W]
    p_value_parts = p_erase_parts + tiles * Q * W  # [tiles of slots, Q, W]
    p_pull = p_value_parts + tiles * Q * W  # [R or Q, W]
    p_pull_square = p_pull + (R + Q) * W  # [R or Q, W]
    p_sums = p_pull_square + (R + Q) * W  # [R or Q, 2]
    p_overlap = p_sums + (R + Q) * 2  # [R or Q]
    p_sharper = p_overlap + R + Q  # [2, Q, R]
    p_gate_sums = p_sharper + 2 * Q * R  # [R, blocks]
    p_fields = p_gate_sums + R * blocks  # [S]
    p_grads = p_fields + S  # [S]
    return (
        p_into_memory, p_by_content, p_into_read, p_into_content, p_by_usage, p_into_forward, p_into_backward,
        p_into_write, p_by_link, p_into_allocated, p_into_found, p_seen, p_difference, p_into_usage, p_into_retention,
        p_rows_read, p_columns_read, p_rows_write, p_columns_write, p_columns_precedence, p_erase_parts, p_value_parts,
        p_pull, p_pull_square, p_sums, p_overlap, p_sharper, p_gate_sums, p_fields, p_grads, p_grads + S,
    )  # fmt: skip


@triton.jit
def ranges(o_s, mask_floor, R, Q, W, MASKED: tl.constexpr, ONEPLUS: tl.constexpr):
    """Which numbers of an interface vector pass a sigmoid, which a softplus, and the least that either then gives."""
    (
        _, read_strengths, write_keys, write_strengths, erase, values, free_gates, _, _,
        modes, masks, _, sharpness, _,
    ) = fields_of(0, R, Q, W, MASKED)  # fmt: skip
    m_strength = ((o_s >= read_strengths) & (o_s < write_keys)) | ((o_s >= write_strengths) & (o_s < erase))
    m_gate = ((o_s >= erase) & (o_s < values)) | ((o_s >= free_gates) & (o_s < modes))
    m_mask = (o_s >= masks) & (o_s < sharpness)
    b_floor = tl.where(m_mask, mask_floor, 0.0)
    b_least = tl.where(m_strength, 1.0 if ONEPLUS else 0.0, 1.0)
    return m_gate | m_mask, m_strength | (o_s >= sharpness), b_floor, b_least


@triton.jit
def constrain(
    p_interface, p_fields, mask_floor, clip, S, R, Q, W, MASKED: tl.constexpr, ONEPLUS: tl.constexpr,
    BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Each field within its range, from the interface vector into `p_fields`."""
    for start in range(0, S, BS):
        o_s, m_s = block(start, S, BS)
        b_raw = clamped(tl.load(p_interface + o_s, mask=m_s, other=0.0), clip)
        m_sigmoid, m_softplus, b_floor, b_least = ranges(o_s, mask_floor, R, Q, W, MASKED, ONEPLUS)
        b_field = tl.where(m_softplus, b_least + softplus(b_raw), b_raw)
        b_field = tl.where(m_sigmoid, b_floor + (1.0 - b_floor) * sigmoid(b_raw), b_field)
        tl.store(p_fields + o_s, b_field, mask=m_s)
    tl.debug_barrier()
    p_modes = fields_of(p_fields, R, Q, W, MASKED)[9]
    o_m, m_m = block(0, 2 * Q + 1, BM)
    for i_r in range(R):
        p_mode = p_modes + i_r * (2 * Q + 1) + o_m
        tl.store(p_mode, softmax(tl.load(p_mode, mask=m_m, other=-float("inf"))), mask=m_m)
    tl.debug_barrier()


@triton.jit
def constrain_backward(
    p_grads, p_fields, p_interface, p_grad_interface, mask_floor, clip, S, R, Q, W, MASKED: tl.constexpr,
    ONEPLUS: tl.constexpr, BM: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """The chain rule of `constrain`; `p_grads` holds the gradients of the fields. What was clipped has none."""
    p_modes = fields_of(p_fields, R, Q, W, MASKED)[9]
    p_grad_modes = fields_of(p_grads, R, Q, W, MASKED)[9]
    o_m, m_m = block(0, 2 * Q + 1, BM)
    for i_r in range(R):
        o_mode = i_r * (2 * Q + 1) + o_m
        b_mode = tl.load(p_modes + o_mode, mask=m_m, other=0.0)
        b_grad = tl.load(p_grad_modes + o_mode, mask=m_m, other=0.0)
        tl.store(p_grad_modes + o_mode, softmax_backward(b_mode, b_grad), mask=m_m)
    tl.debug_barrier()
    for start in range(0, S, BS):
        o_s, m_s = block(start, S, BS)
        b_raw = tl.load(p_interface + o_s, mask=m_s, other=0.0)
        b_inside = clamped(b_raw, clip)
        m_sigmoid, m_softplus, b_floor, _ = ranges(o_s, mask_floor, R, Q, W, MASKED, ONEPLUS)
        b_slope = tl.where(m_softplus, sigmoid(b_inside), 1.0)
        b_slope = tl.where(m_sigmoid, (1.0 - b_floor) * sigmoid_slope(b_inside), b_slope)
        b_grad = tl.load(p_grads + o_s, mask=m_s, other=0.0) * b_slope
        tl.store(p_grad_interface + o_s, through_clamp(b_grad, b_raw, clip), mask=m_s)


@triton.jit
def add(p_total, p_more, count, BLOCK: tl.constexpr):
    """Nothing, where there is nothing to add."""
    if p_more is not None:
        for start in range(0, count, BLOCK):
            o_x, m_x = block(start, count, BLOCK)
            b_total = tl.load(p_total + o_x, mask=m_x, other=0.0) + tl.load(p_more + o_x, mask=m_x, other=0.0)
            tl.store(p_total + o_x, b_total, mask=m_x)
        tl.debug_barrier()


@triton.jit
def add_number(p_total, more):
    tl.store(p_total, tl.load(p_total) + more)


@triton.jit
def zero(p_total, count, BLOCK: tl.constexpr):
    for start in range(0, count, BLOCK):
        o_x, m_x = block(start, count, BLOCK)
        tl.store(p_total + o_x, tl.zeros([BLOCK], dtype=tl.float32), mask=m_x)
    tl.debug_barrier()


@triton.jit
def write_gates_of(p_allocation_gates, p_write_gates, i_q):
    """The gates of allocation and of content: how much of each a write head takes."""
    allocation_gate = tl.load(p_allocation_gates + i_q)
    write_gate = tl.load(p_write_gates + i_q)
    return write_gate * allocation_gate, write_gate * (1.0 - allocation_gate)


@triton.jit
def rank(p_usage, p_order, N, AE: tl.constexpr, BC: tl.constexpr):
    T = tl.cdiv(N, BC)
    for i_p in range(T):
        allocation_kernel_order(p_usage, p_order, N, T, AE, BC, i_p=i_p)
    tl.debug_barrier()


@triton.jit
def store_left(p_seen, p_allocated, gate, i_q, Q, N, BLOCK: tl.constexpr):
    """The usage that a write head leaves to the next, if there is one."""
    for start in range(0, N, BLOCK):
        o_n, m_n = block(start, N, BLOCK)
        b_used = tl.load(p_seen + i_q * N + o_n, mask=m_n, other=0.0)
        b_weight = tl.load(p_allocated + i_q * N + o_n, mask=m_n, other=0.0)
        tl.store(p_seen + (i_q + 1) * N + o_n, left(b_used, gate, b_weight), mask=m_n & (i_q + 1 < Q))
    tl.debug_barrier()


@triton.jit
def allocate(
    p_usage, p_allocation_gates, p_write_gates, p_seen, p_order, p_allocated, N, Q,
    AE: tl.constexpr, BC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    zero(p_seen, N, BLOCK)
    add(p_seen, p_usage, N, BLOCK)
    for i_q in range(Q):
        rank(p_seen + i_q * N, p_order, N, AE, BC)
        allocation_fwd_kernel(p_seen + i_q * N, p_order, p_allocated + i_q * N, 0, N, AE, BLOCK, i_p=0)
        tl.debug_barrier()
        gate, _ = write_gates_of(p_allocation_gates, p_write_gates, i_q)
        store_left(p_seen, p_allocated, gate, i_q, Q, N, BLOCK)


@triton.jit
def allocate_backward(
    p_grad_allocated,  # [Q, N], becomes that of each head's allocation alone
    p_allocated, p_usage, p_allocation_gates, p_write_gates, p_seen, p_order, p_difference,
    p_grad_usage, p_grad_allocation_gates, p_grad_write_gates, N, Q, AE: tl.constexpr, BC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """From the last write head to the first; adds to the gradients of the gates."""
    zero(p_grad_usage, N, BLOCK)
    zero(p_seen, N, BLOCK)
    add(p_seen, p_usage, N, BLOCK)
    for i_q in range(Q):
        gate, _ = write_gates_of(p_allocation_gates, p_write_gates, i_q)
        store_left(p_seen, p_allocated, gate, i_q, Q, N, BLOCK)
    for i_later in range(Q):
        i_q = Q - 1 - i_later
        gate, _ = write_gates_of(p_allocation_gates, p_write_gates, i_q)
        grad_gate = 0.0
        # What the usage left to the later heads says; nothing, for the last.
        for start in range(0, N, BLOCK):
            o_n, m_n = block(start, N, BLOCK)
            b_used = tl.load(p_seen + i_q * N + o_n, mask=m_n, other=0.0)
            b_weight = tl.load(p_allocated + i_q * N + o_n, mask=m_n, other=0.0)
            b_grad_usage = tl.load(p_grad_usage + o_n, mask=m_n, other=0.0)
            b_grad = tl.load(p_grad_allocated + i_q * N + o_n, mask=m_n, other=0.0)
            b_grad_usage, b_more, b_by_slot = left_backward(b_grad_usage, b_used, gate, b_weight)
            grad_gate += tl.sum(b_by_slot, 0)
            tl.store(p_grad_allocated + i_q * N + o_n, b_grad + b_more, mask=m_n)
            tl.store(p_grad_usage + o_n, b_grad_usage, mask=m_n)
        add_number(p_grad_allocation_gates + i_q, tl.load(p_write_gates + i_q) * grad_gate)
        add_number(p_grad_write_gates + i_q, tl.load(p_allocation_gates + i_q) * grad_gate)
        tl.debug_barrier()
        rank(p_seen + i_q * N, p_order, N, AE, BC)
        allocation_bwd_kernel_later(
            p_grad_allocated + i_q * N, p_seen + i_q * N, p_order, p_difference, 0, N, AE, BLOCK, i_p=0
        )  # fmt: skip
        tl.debug_barrier()
        allocation_bwd_kernel(p_seen + i_q * N, p_order, p_difference, p_grad_usage, N, AE, BLOCK, i_p=0)
        tl.debug_barrier()


@triton.jit
def look_up(
    p_memory, p_keys, p_strengths, p_key_mask, p_weights, p_peaks, p_masses, eps, A, N,
    W: tl.constexpr, BA: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    T = tl.cdiv(N, BN)
    for i_p in range(tl.cdiv(A, BA) * T):
        content_addressing_fwd_kernel_scores(
            p_memory, p_keys, p_strengths, p_key_mask, None, p_weights, p_peaks, p_masses, 0, W, eps,
            A, N, T, W, BA, BN, BW, NORM, i_p=i_p,
        )  # fmt: skip
    tl.debug_barrier()
    for i_p in range(A * tl.cdiv(N, BLOCK)):
        content_addressing_fwd_kernel_softmax(p_weights, p_peaks, p_masses, N, T, BLOCK, BLOCK, i_p=i_p)
    tl.debug_barrier()


@triton.jit
def look_up_backward(
    p_grad_weights, p_weights, p_memory, p_keys, p_strengths, p_key_mask,
    p_grad_memory, p_grad_keys, p_grad_strengths, p_grad_key_mask, p_overlap, p_pull, p_pull_square, p_sums,
    eps, A, N, W: tl.constexpr, BA: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    NORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for i_p in range(A):
        content_addressing_bwd_kernel_overlap(
            p_grad_weights, p_weights, p_overlap, 0, N, 0, N, A, N, BLOCK, i_p=i_p
        )  # fmt: skip
    tl.debug_barrier()
    for i_p in range(tl.cdiv(W, BW)):
        content_addressing_bwd_kernel(
            p_grad_weights, p_weights, p_overlap, 0, N, 0, N, p_memory, p_keys, p_strengths, p_key_mask, None,
            p_grad_memory, p_pull, p_pull_square, p_sums, 0, W, eps,
            1, A, N, 1, tl.cdiv(N, BN), W, BA, BN, BW, NORM, i_p=i_p,
        )  # fmt: skip
    tl.debug_barrier()
    splits: tl.constexpr = 1 if W > 0 else 0  # without words nothing was summed
    for i_p in range(A):
        similarity_bwd_kernel_fold(
            p_pull, p_pull_square, p_sums, p_keys, p_key_mask, p_grad_keys, p_grad_strengths, p_grad_key_mask,
            eps, splits, A, W, BW, NORM, i_p=i_p,
        )  # fmt: skip
    tl.debug_barrier()


@triton.jit
def dnc_step_fwd_kernel(
    p_interface,  # [B, S]
    p_memory,  # [B, N, W]
    p_usage,  # [B, N]
    p_precedence,  # [B, Q, N]
    p_link,  # [B, Q, N, N]
    p_write_weights,  # [B, Q, N]
    p_read_weights,  # [B, R, N]
    p_new_memory,  # as `p_memory`, which it may be; so also the others
    p_new_usage,
    p_new_precedence,
    p_new_link,
    p_new_write_weights,
    p_new_read_weights,
    p_reads,  # [B, R, W]
    p_tape,  # [B, K]
    p_order,  # [B, N]
    p_scratch,  # [B, C]
    mask_floor,
    clip,
    eps,
    S,
    K,
    C,
    N,
    R,
    Q,
    W: tl.constexpr,
    MASKED: tl.constexpr,
    DEALLOCATES: tl.constexpr,
    SHARPENED: tl.constexpr,
    ONEPLUS: tl.constexpr,
    NORM: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    SIDE: tl.constexpr,
    AE: tl.constexpr,  # eps of the allocation
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    slots = tl.cast(N, tl.int64)  # for products that may pass an int32
    p_interface += i_b * S
    p_memory += i_b * N * W
    p_usage += i_b * N
    p_precedence += i_b * Q * N
    p_link += i_b * Q * N * N
    p_write_weights += i_b * Q * N
    p_read_weights += i_b * R * N
    p_new_memory += i_b * N * W
    p_new_usage += i_b * N
    p_new_precedence += i_b * Q * N
    p_new_link += i_b * Q * N * N
    p_new_write_weights += i_b * Q * N
    p_new_read_weights += i_b * R * N
    p_reads += i_b * R * W
    p_order += i_b * N
    (
        p_retention, p_allocated, p_found, p_forward, p_backward, p_sharp_forward, p_sharp_backward, p_content,
    ) = tape_of(p_tape + i_b * K, slots, R, Q, SHARPENED)  # fmt: skip

    T = tl.cdiv(N, SIDE)
    p_fields, p_seen, p_peaks, p_masses, p_rows, p_columns, _ = scratch_of(
        p_scratch + i_b * C, S, slots, R, Q, T, tl.cdiv(N, BN)
    )  # fmt: skip

    constrain(p_interface, p_fields, mask_floor, clip, S, R, Q, W, MASKED, ONEPLUS, BM, BLOCK)
    (
        p_read_keys, p_read_strengths, p_write_keys, p_write_strengths, p_erase, p_values, p_free_gates,
        p_allocation_gates, p_write_gates, p_modes, p_write_masks, p_read_masks, p_forward_sharpness,
        p_backward_sharpness,
    ) = fields_of(p_fields, R, Q, W, MASKED)  # fmt: skip

    for i_p in range(tl.cdiv(N, BLOCK)):
        usage_update_fwd_kernel(
            p_usage, p_write_weights, p_read_weights, p_free_gates, p_new_usage, p_retention,
            N, Q, R, tl.cdiv(N, BLOCK), BLOCK, i_p=i_p,
        )  # fmt: skip
    tl.debug_barrier()
    allocate(
        p_new_usage, p_allocation_gates, p_write_gates, p_seen, p_order, p_allocated, N, Q, AE, BC, BLOCK
    )  # fmt: skip
    look_up(
        p_memory, p_write_keys, p_write_strengths, p_write_masks if MASKED else None, p_found, p_peaks, p_masses,
        eps, Q, N, W, BA, BN, BW, NORM, BLOCK,
    )  # fmt: skip

    for i_q in range(Q):
        allocated, found = write_gates_of(p_allocation_gates, p_write_gates, i_q)
        for start in range(0, N, BLOCK):
            o_n, m_n = block(start, N, BLOCK)
            b_allocated = tl.load(p_allocated + i_q * N + o_n, mask=m_n, other=0.0)
            b_found = tl.load(p_found + i_q * N + o_n, mask=m_n, other=0.0)
            tl.store(p_new_write_weights + i_q * N + o_n, allocated * b_allocated + found * b_found, mask=m_n)
    tl.debug_barrier()

    for i_p in range(tl.cdiv(N, BN) * tl.cdiv(W, BW)):
        memory_write_fwd_kernel(
            p_memory, p_new_write_weights, p_erase, p_values, p_retention if DEALLOCATES else None, p_new_memory,
            0, W, 0, W, Q, N, W, BN, BW, i_p=i_p,
        )  # fmt: skip
    for i_p in range(Q * T * T):
        temporal_linkage_fwd_kernel(
            p_link, p_precedence, p_new_write_weights, p_read_weights, p_new_link, p_rows, p_columns,
            0, slots * N, N, 0, slots * N, N, Q, N, T, R, SIDE, i_p=i_p,
        )  # fmt: skip
    tl.debug_barrier()
    for i_p in range(Q * T):
        temporal_linkage_fwd_kernel_fold(
            p_rows, p_columns, p_precedence, p_new_write_weights, p_new_precedence, p_forward, p_backward,
            N, T, R, SIDE, i_p=i_p,
        )  # fmt: skip
    tl.debug_barrier()
    if SHARPENED:
        for i_way in range(Q * R):
            sharpness = tl.load(p_forward_sharpness + i_way % R)
            o_way = i_way * N
            sharpen_head(p_forward + o_way, sharpness, p_sharp_forward + o_way, N, SHARPENING_EPS, False, BLOCK)
            sharpness = tl.load(p_backward_sharpness + i_way % R)
            sharpen_head(p_backward + o_way, sharpness, p_sharp_backward + o_way, N, SHARPENING_EPS, False, BLOCK)
    look_up(
        p_new_memory, p_read_keys, p_read_strengths, p_read_masks if MASKED else None, p_content, p_peaks, p_masses,
        eps, R, N, W, BA, BN, BW, NORM, BLOCK,
    )  # fmt: skip

    for i_r in range(R):
        p_mode = p_modes + i_r * (2 * Q + 1)
        for start in range(0, N, BLOCK):
            o_n, m_n = block(start, N, BLOCK)
            b_weight = tl.load(p_mode + Q) * tl.load(p_content + i_r * N + o_n, mask=m_n, other=0.0)
            for i_q in range(Q):
                o_way = (i_q * R + i_r) * N + o_n
                b_weight += tl.load(p_mode + i_q) * tl.load(p_sharp_backward + o_way, mask=m_n, other=0.0)
                b_weight += tl.load(p_mode + Q + 1 + i_q) * tl.load(p_sharp_forward + o_way, mask=m_n, other=0.0)
            tl.store(p_new_read_weights + i_r * N + o_n, b_weight, mask=m_n)
    tl.debug_barrier()
    for i_p in range(tl.cdiv(R, BA) * tl.cdiv(W, BW)):
        weighted_read_fwd_kernel(
            p_new_memory, p_new_read_weights, p_reads, 0, W, 1, R, N, W, 1, tl.cdiv(N, BN), BA, BN, BW, i_p=i_p
        )  # fmt: skip


@triton.jit
def mix_backward(p_grad_mix, p_way, p_mode, p_grad_way, p_grad_mode, N, BLOCK: tl.constexpr):
    """One way to read, which enters the read weights times its mode."""
    mode = tl.load(p_mode)
    grad_mode = 0.0
    for start in range(0, N, BLOCK):
        o_n, m_n = block(start, N, BLOCK)
        b_grad = tl.load(p_grad_mix + o_n, mask=m_n, other=0.0)
        grad_mode += tl.sum(b_grad * tl.load(p_way + o_n, mask=m_n, other=0.0), 0)
        tl.store(p_grad_way + o_n, mode * b_grad, mask=m_n)
    tl.store(p_grad_mode, grad_mode)


@triton.jit
def store_sum(p_parts, stride, count, p_total):
    total = 0.0
    for i in range(count):
        total += tl.load(p_parts + i * stride)
    tl.store(p_total, total)


@triton.jit
def dnc_step_bwd_kernel(
    p_grad_new_memory,  # [B, N, W] or None
    p_grad_new_usage,  # [B, N] or None
    p_grad_new_precedence,  # [B, Q, N] or None
    p_grad_new_link,  # [B, Q, N, N] or None
    p_grad_new_write_weights,  # [B, Q, N] or None
    p_grad_new_read_weights,  # [B, R, N] or None
    p_grad_reads,  # [B, R, W]
    p_new_memory,  # [B, N, W]
    p_new_usage,  # [B, N]
    p_new_write_weights,  # [B, Q, N]
    p_new_read_weights,  # [B, R, N]
    p_tape,  # [B, K]
    p_interface,  # [B, S]
    p_memory,  # [B, N, W]
    p_usage,  # [B, N]
    p_precedence,  # [B, Q, N]
    p_link,  # [B, Q, N, N]
    p_write_weights,  # [B, Q, N]
    p_read_weights,  # [B, R, N]
    p_grad_interface,  # [B, S]
    p_grad_memory,  # [B, N, W]
    p_grad_usage,  # [B, N]
    p_grad_precedence,  # [B, Q, N]
    p_grad_link,  # [B, Q, N, N] or None
    p_grad_write_weights,  # [B, Q, N] or None
    p_grad_read_weights,  # [B, R, N]
    p_order,  # [B, N]
    p_scratch,  # [B, C]
    mask_floor,
    clip,
    eps,
    S,
    K,
    C,
    N,
    R,
    Q,
    W: tl.constexpr,
    MASKED: tl.constexpr,
    DEALLOCATES: tl.constexpr,
    SHARPENED: tl.constexpr,
    ONEPLUS: tl.constexpr,
    NORM: tl.constexpr,
    PHASE: tl.constexpr,
    BM: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    SIDE: tl.constexpr,
    AE: tl.constexpr,  # eps of the allocation
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_b = tl.program_id(0).to(tl.int64)
    slots = tl.cast(N, tl.int64)  # for products that may pass an int32
    if p_grad_new_memory is not None:
        p_grad_new_memory += i_b * N * W
    if p_grad_new_usage is not None:
        p_grad_new_usage += i_b * N
    if p_grad_new_precedence is not None:
        p_grad_new_precedence += i_b * Q * N
    if p_grad_new_link is not None:
        p_grad_new_link += i_b * Q * N * N
    if p_grad_new_write_weights is not None:
        p_grad_new_write_weights += i_b * Q * N
    if p_grad_new_read_weights is not None:
        p_grad_new_read_weights += i_b * R * N
    p_grad_reads += i_b * R * W
    p_new_memory += i_b * N * W
    p_new_usage += i_b * N
    p_new_write_weights += i_b * Q * N
    p_new_read_weights += i_b * R * N
    p_interface += i_b * S
    p_memory += i_b * N * W
    p_usage += i_b * N
    p_precedence += i_b * Q * N
    p_link += i_b * Q * N * N
    p_write_weights += i_b * Q * N
    p_read_weights += i_b * R * N
    p_grad_interface += i_b * S
    p_grad_memory += i_b * N * W
    p_grad_usage += i_b * N
    p_grad_precedence += i_b * Q * N
    if p_grad_link is not None:
        p_grad_link += i_b * Q * N * N
    if p_grad_write_weights is not None:
        p_grad_write_weights += i_b * Q * N
    p_grad_read_weights += i_b * R * N
    p_order += i_b * N
    (
        p_retention, p_allocated, p_found, p_forward, p_backward, p_sharp_forward, p_sharp_backward, p_content,
    ) = tape_of(p_tape + i_b * K, slots, R, Q, SHARPENED)  # fmt: skip

    T = tl.cdiv(N, SIDE)
    (
        p_into_memory, p_by_content, p_into_read, p_into_content, p_by_usage, p_into_forward, p_into_backward,
        p_into_write, p_by_link, p_into_allocated, p_into_found, p_seen, p_difference, p_into_usage, p_into_retention,
        p_rows_read, p_columns_read, p_rows_write, p_columns_write, p_columns_precedence, p_erase_parts, p_value_parts,
        p_pull, p_pull_square, p_sums, p_overlap, p_sharper, p_gate_sums, p_fields, p_grads, _,
    ) = scratch_of_backward(p_scratch + i_b * C, S, slots, R, Q, W, T, tl.cdiv(N, BN), tl.cdiv(N, BLOCK))  # fmt: skip

    (
        p_read_keys, p_read_strengths, p_write_keys, p_write_strengths, p_erase, p_values, p_free_gates,
        p_allocation_gates, p_write_gates, p_modes, p_write_masks, p_read_masks, p_forward_sharpness,
        p_backward_sharpness,
    ) = fields_of(p_fields, R, Q, W, MASKED)  # fmt: skip
    (
        p_grad_read_keys, p_grad_read_strengths, p_grad_write_keys, p_grad_write_strengths, p_grad_erase,
        p_grad_values, p_grad_free_gates, p_grad_allocation_gates, p_grad_write_gates, p_grad_modes,
        p_grad_write_masks, p_grad_read_masks, p_grad_forward_sharpness, p_grad_backward_sharpness,
    ) = fields_of(p_grads, R, Q, W, MASKED)  # fmt: skip

    if PHASE == 0:
        constrain(p_interface, p_fields, mask_floor, clip, S, R, Q, W, MASKED, ONEPLUS, BM, BLOCK)

        # reads = weighted_read(M', r)
        for i_p in range(tl.cdiv(N, BN) * tl.cdiv(W, BW)):
            weighted_read_bwd_kernel_memory(
                p_grad_reads, p_new_read_weights, p_into_memory, R, N, W, BA, BN, BW, i_p=i_p
            )  # fmt: skip
        for i_p in range(tl.cdiv(N, BN) * tl.cdiv(R, BA)):
            weighted_read_bwd_kernel_weights(
                p_grad_reads, p_new_memory, p_into_read, 0, W, R, N, W, BA, BN, BW, i_p=i_p
            )  # fmt: skip
        tl.debug_barrier()
        add(p_into_memory, p_grad_new_memory, slots * W, BLOCK)
        add(p_into_read, p_grad_new_read_weights, R * N, BLOCK)

        # r = read modes . (b, c, f)
        for i_r in range(R):
            p_above = p_into_read + i_r * N
            o_mode = i_r * (2 * Q + 1) + Q
            mix_backward(
                p_above, p_content + i_r * N, p_modes + o_mode, p_into_content + i_r * N, p_grad_modes + o_mode,
                N, BLOCK,
            )  # fmt: skip
            for i_q in range(Q):
                o_way = (i_q * R + i_r) * N
                o_mode = i_r * (2 * Q + 1) + i_q
                mix_backward(
                    p_above, p_sharp_backward + o_way, p_modes + o_mode, p_into_backward + o_way, p_grad_modes + o_mode,
                    N, BLOCK,
                )  # fmt: skip
                o_mode += Q + 1
                mix_backward(
                    p_above, p_sharp_forward + o_way, p_modes + o_mode, p_into_forward + o_way, p_grad_modes + o_mode,
                    N, BLOCK,
                )  # fmt: skip
        tl.debug_barrier()
        if SHARPENED:
            for i_way in range(Q * R):
                o_way = i_way * N
                sharpen_head_backward(
                    p_into_forward + o_way, p_sharp_forward + o_way, p_forward + o_way,
                    tl.load(p_forward_sharpness + i_way % R), p_into_forward + o_way, p_sharper + i_way,
                    N, SHARPENING_EPS, False, BLOCK,
                )  # fmt: skip
                sharpen_head_backward(
                    p_into_backward + o_way, p_sharp_backward + o_way, p_backward + o_way,
                    tl.load(p_backward_sharpness + i_way % R), p_into_backward + o_way, p_sharper + Q * R + i_way,
                    N, SHARPENING_EPS, False, BLOCK,
                )  # fmt: skip
            tl.debug_barrier()
            for i_r in range(R):
                store_sum(p_sharper + i_r, R, Q, p_grad_forward_sharpness + i_r)
                store_sum(p_sharper + Q * R + i_r, R, Q, p_grad_backward_sharpness + i_r)
        look_up_backward(
            p_into_content, p_content, p_new_memory, p_read_keys, p_read_strengths, p_read_masks if MASKED else None,
            p_by_content, p_grad_read_keys, p_grad_read_strengths, p_grad_read_masks if MASKED else None,
            p_overlap, p_pull, p_pull_square if MASKED else None, p_sums, eps, R, N, W, BA, BN, BW, NORM, BLOCK,
        )  # fmt: skip
        add(p_into_memory, p_by_content, slots * W, BLOCK)
    elif PHASE == 1:
        # L', p', f, b = temporal_linkage(L, p, w, r of the step before)
        for i_p in range(Q * T * T):
            temporal_linkage_bwd_kernel(
                p_grad_new_link, p_into_forward, p_into_backward, p_link, p_precedence, p_new_write_weights,
                p_read_weights, p_grad_link, p_columns_precedence, p_rows_write, p_columns_write, p_rows_read,
                p_columns_read, 0, slots * N, N, 0, slots * N, N, Q, N, T, R, SIDE, i_p=i_p,
            )  # fmt: skip
        tl.debug_barrier()
        for i_p in range(Q * T):
            temporal_linkage_bwd_kernel_fold(
                p_columns_precedence, p_rows_write, p_columns_write, p_grad_new_precedence, p_precedence,
                p_new_write_weights, p_grad_precedence, p_by_link, N, T, SIDE, i_p=i_p,
            )  # fmt: skip
        for i_p in range(R * T):
            temporal_linkage_bwd_kernel_fold_reads(
                p_rows_read, p_columns_read, p_grad_read_weights, Q, R, N, T, SIDE, i_p=i_p
            )  # fmt: skip

        # M' = memory_write(M, w, erase, values, retention)
        for i_p in range(tl.cdiv(N, BN)):
            memory_write_bwd_kernel_slots(
                p_into_memory, p_memory, p_new_write_weights, p_erase, p_retention if DEALLOCATES else None,
                p_grad_memory, p_into_retention if DEALLOCATES else None, 0, W, 0, W, Q, N, W, BN, BW,
                i_p=i_p,
            )  # fmt: skip
        for i_p in range(tl.cdiv(N, BN) * Q):
            memory_write_bwd_kernel_heads(
                p_into_memory, p_memory, p_new_write_weights, p_erase, p_values, p_retention if DEALLOCATES else None,
                p_into_write, p_erase_parts, p_value_parts, 0, W, 0, W, 1, Q, N, W, BN, BW, i_p=i_p,
            )  # fmt: skip
        tl.debug_barrier()
        for i_p in range(tl.cdiv(Q * W, BLOCK)):
            sum_of_parts_kernel(p_erase_parts, p_grad_erase, tl.cdiv(N, BN), Q * W, BLOCK, i_p=i_p)
            sum_of_parts_kernel(p_value_parts, p_grad_values, tl.cdiv(N, BN), Q * W, BLOCK, i_p=i_p)
        add(p_into_write, p_by_link, Q * N, BLOCK)
        add(p_into_write, p_grad_new_write_weights, Q * N, BLOCK)

        # w = write gate (allocation gate a + (1 - allocation gate) c)
        for i_q in range(Q):
            allocated, found = write_gates_of(p_allocation_gates, p_write_gates, i_q)
            along_allocated = 0.0
            along_found = 0.0
            for start in range(0, N, BLOCK):
                o_n, m_n = block(start, N, BLOCK)
                b_grad = tl.load(p_into_write + i_q * N + o_n, mask=m_n, other=0.0)
                along_allocated += tl.sum(b_grad * tl.load(p_allocated + i_q * N + o_n, mask=m_n, other=0.0), 0)
                along_found += tl.sum(b_grad * tl.load(p_found + i_q * N + o_n, mask=m_n, other=0.0), 0)
                tl.store(p_into_allocated + i_q * N + o_n, allocated * b_grad, mask=m_n)
                tl.store(p_into_found + i_q * N + o_n, found * b_grad, mask=m_n)
            allocation_gate = tl.load(p_allocation_gates + i_q)
            write_gate = tl.load(p_write_gates + i_q)
            tl.store(p_grad_allocation_gates + i_q, write_gate * (along_allocated - along_found))
            tl.store(
                p_grad_write_gates + i_q, allocation_gate * along_allocated + (1.0 - allocation_gate) * along_found
            )  # fmt: skip
        tl.debug_barrier()

        # a = allocation(u', gates), u' = usage_update(u, w and r of the step before, free gates)
        allocate_backward(
            p_into_allocated, p_allocated, p_new_usage, p_allocation_gates, p_write_gates, p_seen, p_order,
            p_difference, p_into_usage, p_grad_allocation_gates, p_grad_write_gates, N, Q, AE, BC, BLOCK,
        )  # fmt: skip
        add(p_into_usage, p_grad_new_usage, N, BLOCK)
        for i_p in range(tl.cdiv(N, BLOCK)):
            usage_update_bwd_kernel(
                p_into_usage, p_into_retention if DEALLOCATES else None, p_usage, p_write_weights, p_read_weights,
                p_free_gates, p_grad_usage, p_grad_write_weights, p_by_usage, p_gate_sums,
                N, Q, R, tl.cdiv(N, BLOCK), BLOCK, i_p=i_p,
            )  # fmt: skip
        tl.debug_barrier()
        for i_r in range(R):
            store_sum(p_gate_sums + i_r * tl.cdiv(N, BLOCK), 1, tl.cdiv(N, BLOCK), p_grad_free_gates + i_r)
        add(p_grad_read_weights, p_by_usage, R * N, BLOCK)
    else:
        look_up_backward(
            p_into_found, p_found, p_memory, p_write_keys, p_write_strengths, p_write_masks if MASKED else None,
            p_by_content, p_grad_write_keys, p_grad_write_strengths, p_grad_write_masks if MASKED else None,
            p_overlap, p_pull, p_pull_square if MASKED else None, p_sums, eps, Q, N,
            W, BA, BN, BW, NORM, BLOCK,
        )  # fmt: skip
        add(p_grad_memory, p_by_content, slots * W, BLOCK)
        constrain_backward(
            p_grads, p_fields, p_interface, p_grad_interface, mask_floor, clip, S, R, Q, W, MASKED, ONEPLUS, BM, BLOCK
        )  # fmt: skip


def _width(word: int, masked: bool) -> int:
    """The piece of a word in a tile of the memory; as for the link, a larger one would spill, and with masks too."""
    return 16 if masked or word % 16 != 0 else block_width(word, masked)


def _side(slots: int) -> int:
    """The side of a square tile of the link; where rows load number by number, a larger one would spill."""
    return 64 if slots % 16 == 0 else 32


def _step(
    interface: Tensor,
    state: tuple[Tensor, ...],
    new_state: tuple[Tensor, ...],
    reads: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    mask_floor: float,
    clip: float,
    norm: str,
    eps: float,
    allocation_eps: float,
) -> Tensor:
    """Steps `state` into `new_state`, which it may be, and `reads`; the tape."""
    memory, _, _, _, write_weights, read_weights = state
    B, N, W = memory.shape
    R, Q = read_weights.shape[1], write_weights.shape[1]
    S = interface.shape[1]
    K = N * (1 + 2 * Q + (4 if sharpened else 2) * Q * R + R)
    tape = interface.new_empty(B, K)
    if B * N == 0:
        reads.zero_()
        return tape
    SIDE = _side(N)
    T = triton.cdiv(N, SIDE)
    C = scratch_of.fn(0, S, N, R, Q, T, triton.cdiv(N, BLOCK_SLOTS))[-1]
    with torch.cuda.device_of(memory):
        dnc_step_fwd_kernel[(B,)](
            interface, *state, *new_state, reads, tape,
            interface.new_empty(B, N, dtype=torch.int32), interface.new_empty(B, C),
            mask_floor, clip, eps, S, K, C, N, R, Q, W,
            masked, deallocates, sharpened, oneplus, norm,
            triton.next_power_of_2(2 * Q + 1), BLOCK_HEADS, BLOCK_SLOTS, _width(W, masked), SIDE, allocation_eps,
            BLOCK_COUNT, BLOCK,
            num_warps=WARPS, maxnreg=MOST_REGISTERS,
        )  # fmt: skip
    return tape


def dnc_step(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float,
    norm: str,
    eps: float,
    allocation_eps: float,
) -> tuple[Tensor, ...]:
    given = (memory, usage, precedence, link, write_weights, read_weights)
    state = tuple(tensor.contiguous() for tensor in given)
    new_state = tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in state)
    reads = memory.new_empty(memory.shape[0], read_weights.shape[1], memory.shape[2])
    options = (masked, deallocates, sharpened, oneplus, mask_floor, clip, norm, eps, allocation_eps)
    tape = _step(interface.contiguous(), state, new_state, reads, *options)
    return *new_state, reads, tape


def dnc_step_(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    reads: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float,
    norm: str,
    eps: float,
    allocation_eps: float,
) -> None:
    """Overwrites the state and `reads`, which are contiguous."""
    state = (memory, usage, precedence, link, write_weights, read_weights)
    options = (masked, deallocates, sharpened, oneplus, mask_floor, clip, norm, eps, allocation_eps)
    _step(interface.contiguous(), state, state, reads, *options)


def dnc_step_backward(
    grad_memory: Tensor | None,
    grad_usage: Tensor | None,
    grad_precedence: Tensor | None,
    grad_link: Tensor | None,
    grad_write_weights: Tensor | None,
    grad_read_weights: Tensor | None,
    grad_reads: Tensor | None,
    new_memory: Tensor,
    new_usage: Tensor,
    new_write_weights: Tensor,
    new_read_weights: Tensor,
    tape: Tensor,
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float,
    norm: str,
    eps: float,
    allocation_eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """An unwanted link is not made; the rest is, since it costs little, and let go."""
    arguments = (interface, memory, usage, precedence, link, write_weights, read_weights)
    inputs = [tensor.contiguous() for tensor in arguments]
    want_link = output_mask[4]
    gradients = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in inputs]
    if not want_link:
        gradients[4] = link.new_empty(0)
    B, N, W = memory.shape
    if B * N == 0:
        for gradient in gradients:
            gradient.zero_()
    else:
        R, Q = read_weights.shape[1], write_weights.shape[1]
        S, K = interface.shape[1], tape.shape[1]
        SIDE = _side(N)
        T = triton.cdiv(N, SIDE)
        tiles, blocks = triton.cdiv(N, BLOCK_SLOTS_BACKWARD), triton.cdiv(N, BLOCK)
        C = scratch_of_backward.fn(0, S, N, R, Q, W, T, tiles, blocks)[-1]
        upstream = (grad_memory, grad_usage, grad_precedence, grad_link, grad_write_weights, grad_read_weights)
        made = (new_memory, new_usage, new_write_weights, new_read_weights, tape)
        outputs: list[Tensor | None] = [*gradients]
        if not want_link:
            outputs[4] = None
        if detach_usage_write:
            gradients[5].zero_()
            outputs[5] = None
        given = [None if grad is None else grad.contiguous() for grad in upstream]
        into_reads = memory.new_zeros(B, R, W) if grad_reads is None else grad_reads.contiguous()
        kept = [tensor.contiguous() for tensor in made]
        order, scratch = interface.new_empty(B, N, dtype=torch.int32), interface.new_empty(B, C)
        with torch.cuda.device_of(memory):
            for phase in range(PHASES):
                dnc_step_bwd_kernel[(B,)](
                    *given, into_reads, *kept, *inputs, *outputs, order, scratch,
                    mask_floor, clip, eps, S, K, C, N, R, Q, W,
                    masked, deallocates, sharpened, oneplus, norm, phase,
                    triton.next_power_of_2(2 * Q + 1), BLOCK_HEADS, BLOCK_SLOTS_BACKWARD, _width(W, masked),
                    SIDE, allocation_eps, BLOCK_COUNT, BLOCK, num_warps=WARPS, maxnreg=MOST_REGISTERS,
                )  # fmt: skip
    return tuple(
        gradient if wants else gradient.new_empty(0) for gradient, wants in zip(gradients, output_mask, strict=True)
    )
