"""Masked tiles of a matrix in its own dtype, and sums of partial results: shared by the kernels that walk a memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._program import this_program

BLOCK = 1024


def tile_size(memory: Tensor) -> tuple[int, int]:
    """Slots and words of the tile that one program holds, 16 at least, the least size of `tl.dot`; longer words are
    walked. Larger tiles would spill: in float64, and wider ones where rows load word by word."""
    if memory.dtype == torch.float64:
        return 16, 16
    W = memory.shape[-1]
    return 32, min(64 if W % 16 == 0 else 32, max(16, triton.next_power_of_2(W)))


@triton.jit
def block(start, LENGTH, SIZE: tl.constexpr):
    """The indices of one block of a dimension, and which of them are within it."""
    o_block = start + tl.arange(0, SIZE)
    return o_block, o_block < LENGTH


@triton.jit
def block_of_rows(start, LENGTH, SIZE: tl.constexpr):
    """The same in int64: an index times the stride of the rows may pass an int32."""
    return block(tl.cast(start, tl.int64), LENGTH, SIZE)


@triton.jit
def load_tile(p_matrix, stride, o_row, m_row, o_column, m_column):
    p_tile = p_matrix + o_row[:, None] * stride + o_column[None, :]
    return tl.load(p_tile, mask=m_row[:, None] & m_column[None, :], other=0.0)


@triton.jit
def store_tile(p_matrix, b_tile, stride, o_row, m_row, o_column, m_column):
    p_tile = p_matrix + o_row[:, None] * stride + o_column[None, :]
    tl.store(p_tile, b_tile, mask=m_row[:, None] & m_column[None, :])


@triton.jit
def multiply_add(b_left, b_right, b_sum):
    """left right + sum, in the dtype of all three."""
    return tl.dot(b_left, b_right, b_sum, input_precision="ieee", out_dtype=b_sum.dtype)


@triton.jit
def sum_of_parts_kernel(p_parts, p_total, S, H, BH: tl.constexpr, i_p=None):
    o_h, m_h = block(this_program(i_p).to(tl.int64) * BH, H, BH)
    b_total = tl.zeros([BH], dtype=p_total.dtype.element_ty)
    for i_s in range(S):
        b_total += tl.load(p_parts + i_s * H + o_h, mask=m_h, other=0.0)
    tl.store(p_total + o_h, b_total, mask=m_h)


def sum_of_parts(parts: Tensor, total: Tensor) -> None:
    """Adds parts[0], parts[1], ... into total, in that order."""
    H = total.numel()
    sum_of_parts_kernel[(triton.cdiv(H, BLOCK),)](parts, total, parts.shape[0], H, BLOCK)
