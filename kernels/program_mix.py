"""Program mix in Triton: outputs = sum over p of a_p (inputs @ weights_p + biases_p).

One matrix product with a Khatri-Rao operand, (a_p x_i)[B, P IN] times weights[P IN, OUT]: the operand is scaled tile
by tile, and neither it nor a [B, IN, OUT] matrix is ever formed. The inner dimension may be split; a second kernel adds
the splits in order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import splits, unit_stride
from ._tiles import block, load_tile, store_tile

BLOCK_BATCH = 16
BLOCK_INPUTS = 32
BLOCK_OUTPUTS = 64
# Outputs of one step where they are the inner dimension: a wider step spills on half-precision weights.
BLOCK_OUTPUTS_INNER = 16
# Programs of a launch beyond which the inner dimension is not split further.
MOST_PROGRAMS = 512


@triton.jit
def load_single(p_matrix, stride, o_row, m_row, o_column, m_column):
    """A masked tile in float32."""
    return load_tile(p_matrix, stride, o_row, m_row, o_column, m_column).to(tl.float32)


@triton.jit
def scaled_tile(p_matrix, p_program_weights, i_q, P, o_b, m_b, o_column, m_column, stride):
    """a_p x: a tile whose rows are samples, each times its weight of program i_q."""
    b_a = tl.load(p_program_weights + o_b * P + i_q, mask=m_b, other=0.0)
    return load_single(p_matrix, stride, o_b, m_b, o_column, m_column) * b_a[:, None]


@triton.jit
def program_mix_fwd_kernel(
    p_inputs,  # [B, IN]
    p_program_weights,  # [B, P]
    p_weights,  # [P, IN, OUT]
    p_sums,  # [S, B, OUT]
    stride_weights_p,
    stride_weights_i,
    B,
    IN,
    OUT,
    P,
    tiles,
    BB: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_o = i_p % tl.cdiv(OUT, BO)
    i_p = i_p // tl.cdiv(OUT, BO)
    i_b = (i_p % tl.cdiv(B, BB)).to(tl.int64)
    i_s = (i_p // tl.cdiv(B, BB)).to(tl.int64)
    o_b, m_b = block(i_b * BB, B, BB)
    o_o, m_o = block(i_o * BO, OUT, BO)
    b_sum = tl.zeros([BB, BO], dtype=tl.float32)
    for i_t in range(i_s * tiles, min((i_s + 1) * tiles, P * tl.cdiv(IN, BI))):
        i_q = i_t // tl.cdiv(IN, BI)
        o_i, m_i = block(i_t % tl.cdiv(IN, BI) * BI, IN, BI)
        b_inputs = scaled_tile(p_inputs, p_program_weights, i_q, P, o_b, m_b, o_i, m_i, IN)
        b_weights = load_single(p_weights + i_q * stride_weights_p, stride_weights_i, o_i, m_i, o_o, m_o)
        b_sum = tl.dot(b_inputs, b_weights, b_sum, input_precision="ieee")
    store_tile(p_sums, b_sum, OUT, i_s * B + o_b, m_b, o_o, m_o)


@triton.jit
def program_mix_kernel_fold(
    p_sums,  # [S, B, N]
    p_program_weights,  # [B, P]
    p_biases,  # [P, N] or None
    p_results,  # [B, N]
    B,
    N,
    P,
    S,
    BB: tl.constexpr,
    BN: tl.constexpr,
):
    """Adds the splits in order, then the mixture of the biases."""
    i_p = tl.program_id(0)
    o_n, m_n = block(i_p % tl.cdiv(N, BN) * BN, N, BN)
    o_b, m_b = block((i_p // tl.cdiv(N, BN)).to(tl.int64) * BB, B, BB)
    b_result = tl.zeros([BB, BN], dtype=tl.float32)
    for i_s in range(S):
        b_result += load_single(p_sums, N, i_s * B + o_b, m_b, o_n, m_n)
    if p_biases is not None:
        for i_q in range(P):
            b_a = tl.load(p_program_weights + o_b * P + i_q, mask=m_b, other=0.0)
            b_bias = tl.load(p_biases + tl.cast(i_q, tl.int64) * N + o_n, mask=m_n, other=0.0).to(tl.float32)
            b_result += b_a[:, None] * b_bias[None, :]
    store_tile(p_results, b_result, N, o_b, m_b, o_n, m_n)


@triton.jit
def program_mix_bwd_kernel_inputs(
    p_grad_outputs,  # [B, OUT]
    p_inputs,  # [B, IN]
    p_program_weights,  # [B, P]
    p_weights,  # [P, IN, OUT]
    p_sums,  # [S, B, IN] or None, the gradient of the inputs from a split of the programs
    p_partials,  # [T, B, P] or None, the gradient of the program weights from a tile of the inputs
    stride_weights_p,
    stride_weights_i,
    B,
    IN,
    OUT,
    P,
    programs,
    BB: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_i = (i_p % tl.cdiv(IN, BI)).to(tl.int64)
    i_p = i_p // tl.cdiv(IN, BI)
    i_b = (i_p % tl.cdiv(B, BB)).to(tl.int64)
    i_s = (i_p // tl.cdiv(B, BB)).to(tl.int64)
    o_b, m_b = block(i_b * BB, B, BB)
    o_i, m_i = block(i_i * BI, IN, BI)
    b_sum = tl.zeros([BB, BI], dtype=tl.float32)
    for i_q in range(i_s * programs, min((i_s + 1) * programs, P)):
        b_pulled = tl.zeros([BB, BI], dtype=tl.float32)
        for i_o in range(0, OUT, BO):
            o_o, m_o = block(i_o, OUT, BO)
            b_grad = load_single(p_grad_outputs, OUT, o_b, m_b, o_o, m_o)
            b_weights = load_single(p_weights + i_q * stride_weights_p, stride_weights_i, o_i, m_i, o_o, m_o)
            b_pulled = tl.dot(b_grad, tl.trans(b_weights), b_pulled, input_precision="ieee")
        if p_sums is not None:
            b_a = tl.load(p_program_weights + o_b * P + i_q, mask=m_b, other=0.0)
            b_sum += b_a[:, None] * b_pulled
        if p_partials is not None:
            b_partial = tl.sum(load_single(p_inputs, IN, o_b, m_b, o_i, m_i) * b_pulled, 1)
            tl.store(p_partials + (i_i * B + o_b) * P + i_q, b_partial, mask=m_b)
    if p_sums is not None:
        store_tile(p_sums, b_sum, IN, i_s * B + o_b, m_b, o_i, m_i)


@triton.jit
def program_mix_bwd_kernel_fold_program_weights(
    p_partials,  # [T, B, P]
    p_grad_outputs,  # [B, OUT]
    p_biases,  # [P, OUT] or None
    p_upstream,  # [B, P] or None
    p_grad_program_weights,  # [B, P]
    B,
    OUT,
    P,
    T,
    BB: tl.constexpr,
    BO: tl.constexpr,
):
    i_p = tl.program_id(0)
    i_q = (i_p % P).to(tl.int64)
    o_b, m_b = block((i_p // P).to(tl.int64) * BB, B, BB)
    b_grad = tl.zeros([BB], dtype=tl.float32)
    for i_t in range(T):
        b_grad += tl.load(p_partials + (i_t * B + o_b) * P + i_q, mask=m_b, other=0.0)
    if p_biases is not None:
        for i_o in range(0, OUT, BO):
            o_o, m_o = block(i_o, OUT, BO)
            b_bias = tl.load(p_biases + i_q * OUT + o_o, mask=m_o, other=0.0).to(tl.float32)
            b_grad += tl.sum(load_single(p_grad_outputs, OUT, o_b, m_b, o_o, m_o) * b_bias[None, :], 1)
    if p_upstream is not None:
        b_grad += tl.load(p_upstream + o_b * P + i_q, mask=m_b, other=0.0)
    tl.store(p_grad_program_weights + o_b * P + i_q, b_grad, mask=m_b)


@triton.jit
def program_mix_bwd_kernel_weights(
    p_grad_outputs,  # [B, OUT]
    p_inputs,  # [B, IN]
    p_program_weights,  # [B, P]
    p_grad_weights,  # [P, IN, OUT]
    B,
    IN,
    OUT,
    P,
    BB: tl.constexpr,
    BI: tl.constexpr,
    BO: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_o, m_o = block(i_p % tl.cdiv(OUT, BO) * BO, OUT, BO)
    i_p = i_p // tl.cdiv(OUT, BO)
    o_i, m_i = block(i_p % tl.cdiv(IN, BI) * BI, IN, BI)
    i_q = (i_p // tl.cdiv(IN, BI)).to(tl.int64)
    b_sum = tl.zeros([BI, BO], dtype=tl.float32)
    for i_b in range(0, B, BB):
        o_b, m_b = block(tl.cast(i_b, tl.int64), B, BB)
        b_inputs = scaled_tile(p_inputs, p_program_weights, i_q, P, o_b, m_b, o_i, m_i, IN)
        b_grad = load_single(p_grad_outputs, OUT, o_b, m_b, o_o, m_o)
        b_sum = tl.dot(tl.trans(b_inputs), b_grad, b_sum, input_precision="ieee")
    store_tile(p_grad_weights, b_sum, OUT, i_q * IN + o_i, m_i, o_o, m_o)


@triton.jit
def program_mix_bwd_kernel_biases(
    p_grad_outputs,  # [B, OUT]
    p_program_weights,  # [B, P]
    p_grad_biases,  # [P, OUT]
    B,
    OUT,
    P,
    BB: tl.constexpr,
    BO: tl.constexpr,
):
    i_p = tl.program_id(0)
    o_o, m_o = block(i_p % tl.cdiv(OUT, BO) * BO, OUT, BO)
    i_q = (i_p // tl.cdiv(OUT, BO)).to(tl.int64)
    b_sum = tl.zeros([BO], dtype=tl.float32)
    for i_b in range(0, B, BB):
        o_b, m_b = block(tl.cast(i_b, tl.int64), B, BB)
        b_sum += tl.sum(scaled_tile(p_grad_outputs, p_program_weights, i_q, P, o_b, m_b, o_o, m_o, OUT), 0)
    tl.store(p_grad_biases + i_q * OUT + o_o, b_sum, mask=m_o)


def program_mix(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
    B = inputs.shape[0]
    P, IN, OUT = weights.shape
    outputs = inputs.new_empty(B, OUT)
    if outputs.numel() == 0:
        return outputs
    inputs, program_weights, weights = inputs.contiguous(), program_weights.contiguous(), unit_stride(weights)
    biases = None if biases is None else biases.contiguous()
    blocks = triton.cdiv(B, BLOCK_BATCH) * triton.cdiv(OUT, BLOCK_OUTPUTS)
    tiles, S = splits(P * triton.cdiv(IN, BLOCK_INPUTS), blocks, MOST_PROGRAMS)
    sums = inputs.new_empty(S, B, OUT)
    with torch.cuda.device_of(inputs):
        if S:
            program_mix_fwd_kernel[(S * blocks,)](
                inputs, program_weights, weights, sums, *weights.stride()[:2], B, IN, OUT, P, tiles,
                BLOCK_BATCH, BLOCK_INPUTS, BLOCK_OUTPUTS,
            )  # fmt: skip
        program_mix_kernel_fold[(blocks,)](
            sums, program_weights, biases, outputs, B, OUT, P, S, BLOCK_BATCH, BLOCK_OUTPUTS
        )
    return outputs


def program_mix_backward(
    grad_outputs: Tensor,
    inputs: Tensor,
    program_weights: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return mix_gradients(grad_outputs, None, inputs, program_weights, weights, biases, output_mask)


def mix_gradients(
    grad_outputs: Tensor | None,
    upstream: Tensor | None,
    inputs: Tensor,
    program_weights: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of program_mix, and `upstream` added to that of the program weights."""
    B = inputs.shape[0]
    P, IN, OUT = weights.shape
    want_inputs, want_program_weights, want_weights, want_biases = output_mask
    want_biases = want_biases and biases is not None
    grad_inputs = inputs.new_zeros(inputs.shape if want_inputs else 0)
    grad_program_weights = inputs.new_empty((B, P) if want_program_weights else 0)
    grad_weights = weights.new_zeros(weights.shape if want_weights else 0)
    grad_biases = inputs.new_empty(0) if biases is None else biases.new_zeros(biases.shape if want_biases else 0)
    upstream = None if upstream is None else upstream.contiguous()
    if grad_outputs is None or grad_outputs.numel() == 0 or P == 0:
        if want_program_weights:
            grad_program_weights = grad_program_weights.zero_() if upstream is None else upstream
        return grad_inputs, grad_program_weights, grad_weights, grad_biases
    grad_outputs, inputs, weights = grad_outputs.contiguous(), inputs.contiguous(), unit_stride(weights)
    program_weights = program_weights.contiguous()
    biases = None if biases is None else biases.contiguous()
    batches, columns = triton.cdiv(B, BLOCK_BATCH), triton.cdiv(OUT, BLOCK_OUTPUTS)
    T = triton.cdiv(IN, BLOCK_INPUTS)
    with torch.cuda.device_of(inputs):
        if want_inputs or want_program_weights:
            programs, S = splits(P, max(1, batches * T), MOST_PROGRAMS)
            sums = inputs.new_empty(S, B, IN) if want_inputs else None
            partials = inputs.new_empty(T, B, P) if want_program_weights else None
            if T:
                program_mix_bwd_kernel_inputs[(S * batches * T,)](
                    grad_outputs, inputs, program_weights, weights, sums, partials, *weights.stride()[:2],
                    B, IN, OUT, P, programs, BLOCK_BATCH, BLOCK_INPUTS, BLOCK_OUTPUTS_INNER,
                )  # fmt: skip
        if want_inputs and T:
            program_mix_kernel_fold[(batches * T,)](
                sums, program_weights, None, grad_inputs, B, IN, P, S, BLOCK_BATCH, BLOCK_INPUTS
            )
        if want_program_weights:
            program_mix_bwd_kernel_fold_program_weights[(batches * P,)](
                partials, grad_outputs, biases, upstream, grad_program_weights,
                B, OUT, P, T, BLOCK_BATCH, BLOCK_OUTPUTS,
            )  # fmt: skip
        if want_weights and T:
            program_mix_bwd_kernel_weights[(P * T * columns,)](
                grad_outputs, inputs, program_weights, grad_weights,
                B, IN, OUT, P, BLOCK_BATCH, BLOCK_INPUTS, BLOCK_OUTPUTS,
            )  # fmt: skip
        if want_biases:
            program_mix_bwd_kernel_biases[(P * columns,)](
                grad_outputs, program_weights, grad_biases, B, OUT, P, BLOCK_BATCH, BLOCK_OUTPUTS
            )
    return grad_inputs, grad_program_weights, grad_weights, grad_biases
