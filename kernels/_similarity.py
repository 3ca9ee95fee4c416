"""Content scores on tiles, and their gradient: shared by the kernels that compare keys with rows.

    score[a, n] = strength_a D[a, n],   D = (k . m) / (|k| |m| + delta),   k = key_a mask_a,   m = row_n mask_a

`norm` names the five conventions: inner sqrt(sum + eps), outer sqrt(sum), rsqrt sqrt(max(sum, eps)),
clamp max(sqrt(sum), eps) and width sqrt(sum) + eps, of a key times W; delta is 0 for rsqrt and clamp and eps for the
others. Nothing here decides which slot takes part: callers do, by `where`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import KernelInterface

from ._launch import splits, unit_stride
from ._program import this_program
from ._tiles import multiply_add

# Heads of one program: the least inner size of `tl.dot`.
BLOCK_HEADS = 16
BLOCK_SLOTS = 32
# The backward holds more tiles at once: fewer slots each, and more warps for wide words, keep them in registers.
BLOCK_SLOTS_BACKWARD = 16
WIDEST = 64


def block_width(width: int, masked: bool) -> int:
    """The piece of a word that one program holds; longer words are walked, and their reads and gradients split. Where
    rows load word by word, or masks take registers too, a wide piece would spill."""
    narrow = width % 16 != 0 or (masked and width > WIDEST)
    return min(32 if narrow else WIDEST, max(16, triton.next_power_of_2(width)))


@triton.jit
def square_root(b_square):
    """Rounded to nearest, which tl.sqrt is in float64 alone."""
    return tl.sqrt(b_square) if b_square.dtype == tl.float64 else tl.sqrt_rn(b_square)


@triton.jit
def vector_norm(b_square, eps, NORM: tl.constexpr):
    if NORM == "inner":
        b_norm = square_root(b_square + eps)
    elif NORM == "outer":
        b_norm = square_root(b_square)
    elif NORM == "rsqrt":
        b_norm = square_root(tl.maximum(b_square, eps))
    elif NORM == "clamp":
        b_norm = tl.maximum(square_root(b_square), eps)
    else:
        b_norm = square_root(b_square) + eps
    return b_norm


@triton.jit
def norm_slope(b_square, b_norm, eps, NORM: tl.constexpr):
    """The gradient of the norm is this number times the vector."""
    if NORM == "inner":
        b_slope = 1.0 / b_norm
    else:
        if (NORM == "outer") or (NORM == "width"):
            b_moves = b_square > 0.0
        elif NORM == "rsqrt":
            b_moves = b_square > eps
        else:
            b_moves = square_root(b_square) > eps
        if NORM == "width":
            b_norm = square_root(b_square)
        b_slope = tl.where(b_moves, 1.0 / tl.where(b_moves, b_norm, 1.0), 0.0)
    return b_slope


@triton.jit
def key_norm(b_square, eps, W, NORM: tl.constexpr):
    b_norm = vector_norm(b_square, eps, NORM)
    if NORM == "width":
        b_norm *= W
    return b_norm


@triton.jit
def key_slope(b_square, eps, W, NORM: tl.constexpr):
    """The gradient of a key's norm is this number times the key."""
    b_slope = norm_slope(b_square, vector_norm(b_square, eps, NORM), eps, NORM)
    if NORM == "width":
        b_slope *= W
    return b_slope


@triton.jit
def slots_taking_part(p_slot_mask, i_mask, o_n, N):
    """[BN], from row i_mask of a contiguous [., N] or None."""
    m_n = o_n < N
    if p_slot_mask is not None:
        m_n = m_n & (tl.load(p_slot_mask + i_mask * N + o_n, mask=m_n, other=0) != 0)
    return m_n


@triton.jit
def load_rows(p_rows, o_n, m_n, stride_n, o_w, W):
    """[BN, BW], in float32 or float64; rows out of the mask, whatever they hold, are zero."""
    p_tile = p_rows + o_n[:, None] * stride_n + o_w[None, :]
    b_rows = tl.load(p_tile, mask=m_n[:, None] & (o_w < W)[None, :], other=0.0)
    if p_rows.dtype.element_ty != tl.float64:
        b_rows = b_rows.to(tl.float32)
    return b_rows


@triton.jit
def load_heads(p_heads, o_h, m_a, o_w, W):
    """[BA, BW] of a contiguous [., W]; o_h counts heads over the batch."""
    return tl.load(p_heads + o_h[:, None] * W + o_w[None, :], mask=m_a[:, None] & (o_w < W)[None, :], other=0.0)


@triton.jit
def similarity(
    p_rows,  # [N, W] of one bank
    p_keys,  # [H, W]
    p_key_mask,  # [H, W] or None
    o_n,
    m_n,
    stride_n,
    o_h,
    m_a,
    eps,
    W: tl.constexpr,
    BA: tl.constexpr,
    BN: tl.constexpr,
    BW: tl.constexpr,
    NORM: tl.constexpr,
):
    """D [BA, BN], and what its gradient needs besides: its denominator, |k| [BA], m . m and |m| [BA or 1, BN]."""
    DTYPE: tl.constexpr = p_keys.dtype.element_ty
    b_dot = tl.zeros([BA, BN], dtype=DTYPE)
    b_key_square = tl.zeros([BA], dtype=DTYPE)
    b_row_square = tl.zeros([1 if p_key_mask is None else BA, BN], dtype=DTYPE)
    for i_w in range(0, W, BW):
        o_w = i_w + tl.arange(0, BW)
        b_rows = load_rows(p_rows, o_n, m_n, stride_n, o_w, W)
        b_keys = load_heads(p_keys, o_h, m_a, o_w, W)
        if p_key_mask is not None:
            b_mask = load_heads(p_key_mask, o_h, m_a, o_w, W)
            b_mask = b_mask * b_mask
            b_key_square += tl.sum(b_keys * b_keys * b_mask, 1)
            b_row_square = multiply_add(b_mask, tl.trans(b_rows * b_rows), b_row_square)
            b_keys = b_keys * b_mask
        else:
            b_key_square += tl.sum(b_keys * b_keys, 1)
            b_row_square += tl.sum(b_rows * b_rows, 1)[None, :]
        b_dot = multiply_add(b_keys, tl.trans(b_rows), b_dot)
    b_key_norm = key_norm(b_key_square, eps, W, NORM)
    b_row_norm = vector_norm(b_row_square, eps, NORM)
    b_den = b_key_norm[:, None] * b_row_norm
    if (NORM == "inner") or (NORM == "outer") or (NORM == "width"):
        b_den += eps
    return b_dot / b_den, (b_den, b_key_norm, b_row_square, b_row_norm)


@triton.jit
def finite_peak(b_peak):
    """A peak to subtract: of a row without a finite score it is 0, so that exp gives 0 and not NaN."""
    return tl.where(b_peak == -float("inf"), 0.0, b_peak)


@triton.jit
def score_gradient(b_dscore, b_live, b_strength, b_similarity, norms, eps, NORM: tl.constexpr):
    """The gradient of D over the denominator ("pull"), pull D |k| times the slope of |m| ("shrink"), and the sums of
    pull D |m| and dscore D over the slots. All are 0 where the weight is, though D or the strength may be infinite."""
    b_den, b_key_norm, b_row_square, b_row_norm = norms
    b_similarity = tl.where(b_live, b_similarity, 0.0)
    b_pull = tl.where(b_live, b_strength[:, None] * b_dscore / b_den, 0.0)
    b_turn = b_pull * b_similarity
    b_shrink = b_turn * b_key_norm[:, None] * norm_slope(b_row_square, b_row_norm, eps, NORM)
    return b_pull, b_shrink, tl.sum(b_turn * b_row_norm, 1), tl.sum(b_dscore * b_similarity, 1)


@triton.jit
def row_gradient(
    b_pull,  # [BA, BN]
    b_shrink,  # [BA, BN]
    b_rows,  # [BN, BW]
    m_n,  # [BN]
    p_keys,  # [H, W]
    p_key_mask,  # [H, W] or None
    o_h,
    m_a,
    o_w,
    W,
):
    """[BN, BW], summed over the heads of the block."""
    # A head without a weight in this tile has nothing to give, though its key may not be a number.
    # Counted as integers: a maximum of floats may skip what is not a number.
    m_a = m_a & (tl.max((b_pull != 0.0).to(tl.int32), 1) != 0)
    b_keys = load_heads(p_keys, o_h, m_a, o_w, W)
    b_grad = tl.zeros_like(b_rows)
    if p_key_mask is not None:
        b_mask = load_heads(p_key_mask, o_h, m_a, o_w, W)
        b_mask = b_mask * b_mask
        b_keys = b_keys * b_mask
        b_grad = multiply_add(tl.trans(b_pull), b_keys, b_grad)
        b_grad -= multiply_add(tl.trans(b_shrink), b_mask, tl.zeros_like(b_rows)) * b_rows
    else:
        b_grad = multiply_add(tl.trans(b_pull), b_keys, b_grad)
        b_grad -= tl.sum(b_shrink, 0)[:, None] * b_rows
    # A key that is not a number reaches no row that the mask leaves out.
    return tl.where(m_n[:, None], b_grad, 0.0)


@triton.jit
def key_gradient(b_pull, b_turn, b_key):
    """From the sums over the slots of pull m and of pull D |m|, the latter times the slope of |k|."""
    return b_pull - tl.where(b_turn == 0.0, 0.0, b_turn * b_key)


@triton.jit
def add_head_partials(
    p_pull,  # [H, W] of one split
    p_pull_square,  # [H, W] of one split, or None
    p_sums,  # [H, 2] of one split
    b_pull,
    b_shrink,
    b_turned,
    b_scored,
    b_rows,
    o_h,
    m_a,
    o_w,
    later_tile,
    first_piece,
    W,
):
    """Adds one tile to the partial sums of its heads. Only this program touches them; its first tile starts them."""
    m_aw = m_a[:, None] & (o_w < W)[None, :]
    o_aw = o_h[:, None] * W + o_w[None, :]
    b_old = tl.load(p_pull + o_aw, mask=m_aw & later_tile, other=0.0)
    tl.store(p_pull + o_aw, multiply_add(b_pull, b_rows, b_old), mask=m_aw)
    if p_pull_square is not None:
        b_old = tl.load(p_pull_square + o_aw, mask=m_aw & later_tile, other=0.0)
        tl.store(p_pull_square + o_aw, multiply_add(b_shrink, b_rows * b_rows, b_old), mask=m_aw)
    # Every piece of a word has the same sums; the first writes them.
    m_sum = m_a & first_piece
    p_sum = p_sums + o_h * 2
    tl.store(p_sum, tl.load(p_sum, mask=m_sum & later_tile, other=0.0) + b_turned, mask=m_sum)
    tl.store(p_sum + 1, tl.load(p_sum + 1, mask=m_sum & later_tile, other=0.0) + b_scored, mask=m_sum)
    # A later tile of this program reads what other threads of it have stored.
    tl.debug_barrier()


@triton.jit
def similarity_bwd_kernel_fold(
    p_pull,  # [S, H, W], sums over the slots of a split of pull m
    p_pull_square,  # [S, H, W] of shrink m^2, or None
    p_sums,  # [S, H, 2]: pull D |m|, and dscore D
    p_keys,  # [H, W]
    p_key_mask,  # [H, W] or None
    p_grad_keys,  # [H, W] or None
    p_grad_strengths,  # [H] or None
    p_grad_key_mask,  # [H, W] or None
    eps,
    S,
    H,
    W: tl.constexpr,
    BW: tl.constexpr,
    NORM: tl.constexpr,
    i_p=None,
):
    """Folds the splits in order and ends the gradients of one head: those of its key, its strength and its mask."""
    i_h = this_program(i_p).to(tl.int64)
    turn = tl.full([], 0.0, tl.float32)
    grad_strength = tl.full([], 0.0, tl.float32)
    for i_s in range(S):
        turn += tl.load(p_sums + (i_s * H + i_h) * 2)
        grad_strength += tl.load(p_sums + (i_s * H + i_h) * 2 + 1)
    if p_grad_strengths is not None:
        tl.store(p_grad_strengths + i_h, grad_strength)

    if (p_grad_keys is not None) or (p_grad_key_mask is not None):
        key_square = tl.full([], 0.0, tl.float32)
        for i_w in range(0, W, BW):
            o_w = i_w + tl.arange(0, BW)
            b_key = tl.load(p_keys + i_h * W + o_w, mask=o_w < W, other=0.0)
            if p_key_mask is not None:
                b_key *= tl.load(p_key_mask + i_h * W + o_w, mask=o_w < W, other=0.0)
            key_square += tl.sum(b_key * b_key, 0)
        turn *= key_slope(key_square, eps, W, NORM)
        for i_w in range(0, W, BW):
            o_w = i_w + tl.arange(0, BW)
            m_w = o_w < W
            b_key = tl.load(p_keys + i_h * W + o_w, mask=m_w, other=0.0)
            b_pull = tl.zeros([BW], dtype=tl.float32)
            for i_s in range(S):
                b_pull += tl.load(p_pull + (i_s * H + i_h) * W + o_w, mask=m_w, other=0.0)
            b_grad = key_gradient(b_pull, turn, b_key)
            if p_key_mask is not None:
                b_mask = tl.load(p_key_mask + i_h * W + o_w, mask=m_w, other=0.0)
                b_grad *= b_mask * b_mask
            if p_grad_keys is not None:
                tl.store(p_grad_keys + i_h * W + o_w, b_grad, mask=m_w)
            if p_grad_key_mask is not None:
                b_square = tl.zeros([BW], dtype=tl.float32)
                for i_s in range(S):
                    b_square += tl.load(p_pull_square + (i_s * H + i_h) * W + o_w, mask=m_w, other=0.0)
                b_grad = b_mask * (b_key * (2.0 * b_pull - turn * b_key) - b_square)
                tl.store(p_grad_key_mask + i_h * W + o_w, b_grad, mask=m_w)


def prepared(
    memory: Tensor, keys: Tensor, strengths: Tensor, key_mask: Tensor | None, slot_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """The tensors as the kernels take them."""
    key_mask = None if key_mask is None else key_mask.contiguous()
    slot_mask = None if slot_mask is None else slot_mask.contiguous().view(torch.uint8)
    return unit_stride(memory), keys.contiguous(), strengths.contiguous(), key_mask, slot_mask


def empty_gradients(
    memory: Tensor, keys: Tensor, strengths: Tensor, key_mask: Tensor | None, output_mask: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those not wanted have no elements."""
    want_memory, want_keys, want_strengths, want_mask = output_mask
    return (
        memory.new_empty(memory.shape if want_memory else 0),
        keys.new_empty(keys.shape if want_keys else 0),
        keys.new_empty(strengths.shape if want_strengths else 0),
        keys.new_empty(keys.shape if want_mask and key_mask is not None else 0),
    )


def launch_backward(
    kernel: KernelInterface,
    own: tuple[object, ...],  # the first arguments of the kernel; the others are common
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
    gradients: tuple[Tensor, ...],
    most_programs: int,
) -> None:
    """Fills the gradients: `kernel` writes that of the rows and the partial sums of the heads; the fold ends these."""
    banks, N, W = memory.shape
    B, A = strengths.shape
    BW = block_width(W, key_mask is not None)
    blocks = banks * triton.cdiv(W, BW)
    # Without words there is nothing to sum: no split.
    tiles, S = splits(triton.cdiv(N, BLOCK_SLOTS_BACKWARD) if W else 0, max(1, blocks), most_programs)
    grad_memory, *grad_heads = (gradient if gradient.numel() else None for gradient in gradients)
    grad_keys, grad_strengths, grad_key_mask = grad_heads
    want_heads = any(gradient is not None for gradient in grad_heads)
    pull = keys.new_empty(S, B, A, W) if want_heads else None
    pull_square = None if grad_key_mask is None else keys.new_empty(S, B, A, W)
    sums = keys.new_empty(S, B, A, 2) if want_heads else None
    if S:
        kernel[(blocks * S,)](
            *own, memory, keys, strengths, key_mask, slot_mask, grad_memory, pull, pull_square, sums,
            *memory.stride()[:2], eps, B, A, N, S, tiles, W, BLOCK_HEADS, BLOCK_SLOTS_BACKWARD, BW, norm,
            num_warps=8 if BW == WIDEST else 4,
        )  # fmt: skip
    if want_heads:
        similarity_bwd_kernel_fold[(B * A,)](
            pull, pull_square, sums, keys, key_mask, grad_keys, grad_strengths, grad_key_mask,
            eps, S, B * A, W, BW, norm, num_warps=1,
        )  # fmt: skip
