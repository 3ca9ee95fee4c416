"""Temporal linkage in Triton.

    link'[i, j]   = (1 - w_i - w_j) link[i, j] + w_i p_j, zero on the diagonal
    precedence'   = (1 - sum(w)) p + w
    forward[r]    = link' read_r
    backward[r]   = link'^T read_r

One program owns one square tile of one link matrix, so the matrix is read once and written once. Row sums and column
sums leave the tile as partials; a second kernel folds them in tile order: every result is the same from run to run.
The backward rebuilds the tile of the new link from the inputs and never stores it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import unit_stride
from ._program import this_program

# A side of 64 keeps the partials near R / 64 of the matrix in size. The backward holds three tiles at once, hence its
# warps; the loop over the read heads stays a loop, because unrolled it spills.
BLOCK = 64
FORWARD_WARPS = 4
BACKWARD_WARPS = 8


@triton.jit
def temporal_linkage_fwd_kernel(
    p_link,  # [B, Q, N, N]
    p_precedence,  # [B, Q, N]
    p_write_weights,  # [B, Q, N]
    p_read_weights,  # [B, R, N]
    p_new_link,  # [B, Q, N, N], may be p_link
    p_rows,  # [B, Q, T, R, N], sums over the columns of each tile
    p_columns,  # [B, Q, T, R, N], sums over the rows of each tile
    stride_link_b,
    stride_link_q,
    stride_link_i,
    stride_new_b,
    stride_new_q,
    stride_new_i,
    Q,
    N,
    T,
    R,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_column = i_p % T
    i_row = i_p // T % T
    i_bq = (i_p // T // T).to(tl.int64)
    i_b = i_bq // Q
    i_q = i_bq % Q
    o_tile = tl.arange(0, BN)
    o_i = i_row * BN + o_tile
    o_j = i_column * BN + o_tile
    m_i = o_i < N
    m_j = o_j < N
    m_ij = m_i[:, None] & m_j[None, :]

    b_wi = tl.load(p_write_weights + i_bq * N + o_i, mask=m_i, other=0.0)
    b_wj = tl.load(p_write_weights + i_bq * N + o_j, mask=m_j, other=0.0)
    b_pj = tl.load(p_precedence + i_bq * N + o_j, mask=m_j, other=0.0)
    o_corner = i_b * stride_link_b + i_q * stride_link_q + i_row.to(tl.int64) * BN * stride_link_i + i_column * BN
    p_tile = p_link + o_corner + o_tile[:, None] * stride_link_i + o_tile[None, :]
    b_link = tl.load(p_tile, mask=m_ij, other=0.0)
    b_link = (1.0 - b_wi[:, None] - b_wj[None, :]) * b_link + b_wi[:, None] * b_pj[None, :]
    b_link = tl.where(o_i[:, None] == o_j[None, :], 0.0, b_link)
    o_corner = i_b * stride_new_b + i_q * stride_new_q + i_row.to(tl.int64) * BN * stride_new_i + i_column * BN
    p_tile = p_new_link + o_corner + o_tile[:, None] * stride_new_i + o_tile[None, :]
    tl.store(p_tile, b_link, mask=m_ij)

    for i_r in range(R):
        b_ri = tl.load(p_read_weights + (i_b * R + i_r) * N + o_i, mask=m_i, other=0.0)
        b_rj = tl.load(p_read_weights + (i_b * R + i_r) * N + o_j, mask=m_j, other=0.0)
        b_row = tl.sum(b_link * b_rj[None, :], 1)
        b_column = tl.sum(b_link * b_ri[:, None], 0)
        tl.store(p_rows + ((i_bq * T + i_column) * R + i_r) * N + o_i, b_row, mask=m_i)
        tl.store(p_columns + ((i_bq * T + i_row) * R + i_r) * N + o_j, b_column, mask=m_j)


@triton.jit
def temporal_linkage_fwd_kernel_fold(
    p_rows,  # [B, Q, T, R, N]
    p_columns,  # [B, Q, T, R, N]
    p_precedence,  # [B, Q, N]
    p_write_weights,  # [B, Q, N]
    p_new_precedence,  # [B, Q, N], may be p_precedence
    p_forward,  # [B, Q, R, N]
    p_backward,  # [B, Q, R, N]
    N,
    T,
    R,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_tile = i_p % T
    i_bq = (i_p // T).to(tl.int64)
    o_n = i_tile * BN + tl.arange(0, BN)
    m_n = o_n < N

    b_total = tl.zeros([BN], dtype=tl.float32)
    for i_t in range(T):
        o_t = i_t * BN + tl.arange(0, BN)
        b_total += tl.load(p_write_weights + i_bq * N + o_t, mask=o_t < N, other=0.0)
    b_w = tl.load(p_write_weights + i_bq * N + o_n, mask=m_n, other=0.0)
    b_p = tl.load(p_precedence + i_bq * N + o_n, mask=m_n, other=0.0)
    tl.store(p_new_precedence + i_bq * N + o_n, (1.0 - tl.sum(b_total, 0)) * b_p + b_w, mask=m_n)

    for i_r in range(R):
        b_forward = tl.zeros([BN], dtype=tl.float32)
        b_backward = tl.zeros([BN], dtype=tl.float32)
        for i_t in range(T):
            o_partial = ((i_bq * T + i_t) * R + i_r) * N + o_n
            b_forward += tl.load(p_rows + o_partial, mask=m_n, other=0.0)
            b_backward += tl.load(p_columns + o_partial, mask=m_n, other=0.0)
        tl.store(p_forward + (i_bq * R + i_r) * N + o_n, b_forward, mask=m_n)
        tl.store(p_backward + (i_bq * R + i_r) * N + o_n, b_backward, mask=m_n)


@triton.jit
def temporal_linkage_bwd_kernel(
    p_grad_link,  # [B, Q, N, N] or None
    p_grad_forward,  # [B, Q, R, N] or None
    p_grad_backward,  # [B, Q, R, N] or None
    p_link,  # [B, Q, N, N]
    p_precedence,  # [B, Q, N]
    p_write_weights,  # [B, Q, N]
    p_read_weights,  # [B, R, N]
    p_grad_old_link,  # [B, Q, N, N] or None
    p_columns_precedence,  # [B, Q, T, N] or None
    p_rows_write,  # [B, Q, T, N] or None
    p_columns_write,  # [B, Q, T, N] or None
    p_rows_read,  # [B, Q, T, R, N] or None
    p_columns_read,  # [B, Q, T, R, N] or None
    stride_grad_b,
    stride_grad_q,
    stride_grad_i,
    stride_link_b,
    stride_link_q,
    stride_link_i,
    Q,
    N,
    T,
    R,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_column = i_p % T
    i_row = i_p // T % T
    i_bq = (i_p // T // T).to(tl.int64)
    i_b = i_bq // Q
    i_q = i_bq % Q
    o_tile = tl.arange(0, BN)
    o_i = i_row * BN + o_tile
    o_j = i_column * BN + o_tile
    m_i = o_i < N
    m_j = o_j < N
    m_ij = m_i[:, None] & m_j[None, :]
    m_off = m_ij & (o_i[:, None] != o_j[None, :])

    b_wi = tl.load(p_write_weights + i_bq * N + o_i, mask=m_i, other=0.0)
    b_wj = tl.load(p_write_weights + i_bq * N + o_j, mask=m_j, other=0.0)
    b_pj = tl.load(p_precedence + i_bq * N + o_j, mask=m_j, other=0.0)
    o_corner = i_b * stride_link_b + i_q * stride_link_q + i_row.to(tl.int64) * BN * stride_link_i + i_column * BN
    p_tile = p_link + o_corner + o_tile[:, None] * stride_link_i + o_tile[None, :]
    b_link = tl.load(p_tile, mask=m_off, other=0.0)
    b_keep = 1.0 - b_wi[:, None] - b_wj[None, :]

    if (p_rows_read is not None) or (p_columns_read is not None):
        b_new = tl.where(m_off, b_keep * b_link + b_wi[:, None] * b_pj[None, :], 0.0)
        for i_r in range(R):
            if p_rows_read is not None:
                b_gb = tl.load(p_grad_backward + (i_bq * R + i_r) * N + o_j, mask=m_j, other=0.0)
                b_row = tl.sum(b_new * b_gb[None, :], 1)
                tl.store(p_rows_read + ((i_bq * T + i_column) * R + i_r) * N + o_i, b_row, mask=m_i)
            if p_columns_read is not None:
                b_gf = tl.load(p_grad_forward + (i_bq * R + i_r) * N + o_i, mask=m_i, other=0.0)
                b_column = tl.sum(b_new * b_gf[:, None], 0)
                tl.store(p_columns_read + ((i_bq * T + i_row) * R + i_r) * N + o_j, b_column, mask=m_j)

    # The gradient of the new link, direct and through both reads.
    if p_grad_link is not None:
        o_corner = i_b * stride_grad_b + i_q * stride_grad_q + i_row.to(tl.int64) * BN * stride_grad_i + i_column * BN
        p_tile = p_grad_link + o_corner + o_tile[:, None] * stride_grad_i + o_tile[None, :]
        b_grad = tl.load(p_tile, mask=m_off, other=0.0)
    else:
        b_grad = tl.zeros([BN, BN], dtype=tl.float32)
    for i_r in range(R):
        if p_grad_forward is not None:
            b_gf = tl.load(p_grad_forward + (i_bq * R + i_r) * N + o_i, mask=m_i, other=0.0)
            b_rj = tl.load(p_read_weights + (i_b * R + i_r) * N + o_j, mask=m_j, other=0.0)
            b_grad += b_gf[:, None] * b_rj[None, :]
        if p_grad_backward is not None:
            b_gb = tl.load(p_grad_backward + (i_bq * R + i_r) * N + o_j, mask=m_j, other=0.0)
            b_ri = tl.load(p_read_weights + (i_b * R + i_r) * N + o_i, mask=m_i, other=0.0)
            b_grad += b_ri[:, None] * b_gb[None, :]
    b_grad = tl.where(m_off, b_grad, 0.0)

    if p_grad_old_link is not None:
        p_tile = p_grad_old_link + (i_bq * N + i_row * BN) * N + i_column * BN + o_tile[:, None] * N + o_tile[None, :]
        tl.store(p_tile, b_keep * b_grad, mask=m_ij)
    if p_columns_precedence is not None:
        b_column = tl.sum(b_grad * b_wi[:, None], 0)
        tl.store(p_columns_precedence + (i_bq * T + i_row) * N + o_j, b_column, mask=m_j)
    if p_rows_write is not None:
        b_product = b_grad * b_link
        b_row = tl.sum(b_grad * b_pj[None, :] - b_product, 1)
        b_column = tl.sum(b_product, 0)
        tl.store(p_rows_write + (i_bq * T + i_column) * N + o_i, b_row, mask=m_i)
        tl.store(p_columns_write + (i_bq * T + i_row) * N + o_j, b_column, mask=m_j)


@triton.jit
def temporal_linkage_bwd_kernel_fold(
    p_columns_precedence,  # [B, Q, T, N] or None
    p_rows_write,  # [B, Q, T, N] or None
    p_columns_write,  # [B, Q, T, N] or None
    p_grad_precedence,  # [B, Q, N] or None
    p_precedence,  # [B, Q, N]
    p_write_weights,  # [B, Q, N]
    p_grad_old_precedence,  # [B, Q, N] or None
    p_grad_write_weights,  # [B, Q, N] or None
    N,
    T,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_tile = i_p % T
    i_bq = (i_p // T).to(tl.int64)
    o_n = i_tile * BN + tl.arange(0, BN)
    m_n = o_n < N

    b_total = tl.zeros([BN], dtype=tl.float32)
    b_overlap = tl.zeros([BN], dtype=tl.float32)
    b_gp = tl.zeros([BN], dtype=tl.float32)
    if p_grad_precedence is not None:
        b_gp = tl.load(p_grad_precedence + i_bq * N + o_n, mask=m_n, other=0.0)
        for i_t in range(T):
            o_t = i_t * BN + tl.arange(0, BN)
            b_w = tl.load(p_write_weights + i_bq * N + o_t, mask=o_t < N, other=0.0)
            b_p = tl.load(p_precedence + i_bq * N + o_t, mask=o_t < N, other=0.0)
            b_g = tl.load(p_grad_precedence + i_bq * N + o_t, mask=o_t < N, other=0.0)
            b_total += b_w
            b_overlap += b_g * b_p
    if p_grad_old_precedence is not None:
        b_column = tl.zeros([BN], dtype=tl.float32)
        for i_t in range(T):
            b_column += tl.load(p_columns_precedence + (i_bq * T + i_t) * N + o_n, mask=m_n, other=0.0)
        b_column += (1.0 - tl.sum(b_total, 0)) * b_gp
        tl.store(p_grad_old_precedence + i_bq * N + o_n, b_column, mask=m_n)
    if p_grad_write_weights is not None:
        b_sum = tl.zeros([BN], dtype=tl.float32)
        for i_t in range(T):
            b_row = tl.load(p_rows_write + (i_bq * T + i_t) * N + o_n, mask=m_n, other=0.0)
            b_column = tl.load(p_columns_write + (i_bq * T + i_t) * N + o_n, mask=m_n, other=0.0)
            b_sum += b_row - b_column
        b_sum += b_gp - tl.sum(b_overlap, 0)
        tl.store(p_grad_write_weights + i_bq * N + o_n, b_sum, mask=m_n)


@triton.jit
def temporal_linkage_bwd_kernel_fold_reads(
    p_rows_read,  # [B, Q, T, R, N] or None
    p_columns_read,  # [B, Q, T, R, N] or None
    p_grad_read_weights,  # [B, R, N]
    Q,
    R,
    N,
    T,
    BN: tl.constexpr,
    i_p=None,
):
    i_p = this_program(i_p)
    i_tile = i_p % T
    i_r = i_p // T % R
    i_b = (i_p // T // R).to(tl.int64)
    o_n = i_tile * BN + tl.arange(0, BN)
    m_n = o_n < N

    b_sum = tl.zeros([BN], dtype=tl.float32)
    # Write heads outside, tiles inside: one fixed order.
    for i_t in range(Q * T):
        o_partial = ((i_b * Q * T + i_t) * R + i_r) * N + o_n
        if p_rows_read is not None:
            b_sum += tl.load(p_rows_read + o_partial, mask=m_n, other=0.0)
        if p_columns_read is not None:
            b_sum += tl.load(p_columns_read + o_partial, mask=m_n, other=0.0)
    tl.store(p_grad_read_weights + (i_b * R + i_r) * N + o_n, b_sum, mask=m_n)


def _forward(
    link: Tensor,
    new_link: Tensor,
    precedence: Tensor,
    new_precedence: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
) -> tuple[Tensor, Tensor]:
    B, Q, N, _ = link.shape
    R = read_weights.shape[1]
    forward = link.new_empty(B, Q, R, N)
    backward = link.new_empty(B, Q, R, N)
    if precedence.numel() == 0:
        return forward, backward
    write_weights, read_weights = write_weights.contiguous(), read_weights.contiguous()
    T = triton.cdiv(N, BLOCK)
    rows = link.new_empty(B, Q, T, R, N)
    columns = torch.empty_like(rows)
    with torch.cuda.device_of(link):
        temporal_linkage_fwd_kernel[(B * Q * T * T,)](
            link, precedence, write_weights, read_weights, new_link, rows, columns,
            *link.stride()[:3], *new_link.stride()[:3], Q, N, T, R, BLOCK, num_warps=FORWARD_WARPS,
        )  # fmt: skip
        temporal_linkage_fwd_kernel_fold[(B * Q * T,)](
            rows, columns, precedence, write_weights, new_precedence, forward, backward, N, T, R, BLOCK, num_warps=1
        )
    return forward, backward


def temporal_linkage(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    link, precedence = unit_stride(link), precedence.contiguous()
    new_link = torch.empty_like(link, memory_format=torch.contiguous_format)
    new_precedence = torch.empty_like(precedence)
    reads = _forward(link, new_link, precedence, new_precedence, write_weights, read_weights)
    return new_link, new_precedence, *reads


def temporal_linkage_(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Overwrites `link` and `precedence`; a layout that the kernels cannot write goes through a copy."""
    new_link, new_precedence = unit_stride(link), precedence.contiguous()
    reads = _forward(new_link, new_link, new_precedence, new_precedence, write_weights, read_weights)
    if new_link is not link:
        link.copy_(new_link)
    if new_precedence is not precedence:
        precedence.copy_(new_precedence)
    return reads


def temporal_linkage_backward(
    grad_link: Tensor | None,
    grad_precedence: Tensor | None,
    grad_forward: Tensor | None,
    grad_backward: Tensor | None,
    link: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, Q, N, _ = link.shape
    R = read_weights.shape[1]
    want_link, want_precedence, want_write, want_read = output_mask
    grad_old_link = link.new_empty(link.shape if want_link else 0)
    grad_old_precedence = link.new_empty(precedence.shape if want_precedence else 0)
    grad_write_weights = link.new_empty(write_weights.shape if want_write else 0)
    grad_read_weights = link.new_empty(read_weights.shape if want_read else 0)
    results = grad_old_link, grad_old_precedence, grad_write_weights, grad_read_weights
    if precedence.numel() == 0 or not any(output_mask):
        grad_read_weights.zero_()
        return results

    link, precedence = unit_stride(link), precedence.contiguous()
    write_weights, read_weights = write_weights.contiguous(), read_weights.contiguous()
    grad_link = None if grad_link is None else unit_stride(grad_link)
    grad_precedence, grad_forward, grad_backward = (
        None if grad is None else grad.contiguous() for grad in (grad_precedence, grad_forward, grad_backward)
    )
    T = triton.cdiv(N, BLOCK)
    columns_precedence = link.new_empty(B, Q, T, N) if want_precedence else None
    rows_write = link.new_empty(B, Q, T, N) if want_write else None
    columns_write = link.new_empty(B, Q, T, N) if want_write else None
    rows_read = link.new_empty(B, Q, T, R, N) if want_read and grad_backward is not None else None
    columns_read = link.new_empty(B, Q, T, R, N) if want_read and grad_forward is not None else None
    with torch.cuda.device_of(link):
        temporal_linkage_bwd_kernel[(B * Q * T * T,)](
            grad_link, grad_forward, grad_backward, link, precedence, write_weights, read_weights,
            grad_old_link if want_link else None, columns_precedence, rows_write, columns_write,
            rows_read, columns_read,
            *((0, 0, 0) if grad_link is None else grad_link.stride()[:3]), *link.stride()[:3],
            Q, N, T, R, BLOCK, num_warps=BACKWARD_WARPS,
        )  # fmt: skip
        if want_precedence or want_write:
            temporal_linkage_bwd_kernel_fold[(B * Q * T,)](
                columns_precedence, rows_write, columns_write, grad_precedence, precedence, write_weights,
                grad_old_precedence if want_precedence else None, grad_write_weights if want_write else None,
                N, T, BLOCK, num_warps=1,
            )  # fmt: skip
        if want_read and R > 0:
            temporal_linkage_bwd_kernel_fold_reads[(B * R * T,)](
                rows_read, columns_read, grad_read_weights, Q, R, N, T, BLOCK, num_warps=1
            )
    return results
