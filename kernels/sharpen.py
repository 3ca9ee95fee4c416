"""Sharpening in Triton.

    base   = weights + eps,                          in powers the weights alone
    power  = (base / peak)^sharpness,                peak = max base
    result = power / sum power,                      in powers eps / peak^sharpness joins the sum

One program owns one head and walks its slots three times: for the peak, the sum and the result. The powers are those of
ratios to the peak because the logarithm of a large ratio is small, and its rounding too. The arithmetic is that of the
tensors' dtype; eps is a constant, since a float argument would arrive as float32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Twice as many slots spill registers. No fewer than a program has threads: each slot is then one thread's own, and the
# result may overwrite the weights.
BLOCK = 512


@triton.jit
def load_base(p_weights, o_n, N, EPS: tl.constexpr, IN_POWERS: tl.constexpr):
    b_base = tl.load(p_weights + o_n, mask=o_n < N, other=0.0)
    if not IN_POWERS:
        b_base += EPS
    return b_base


@triton.jit
def power(b_base, peak, sharpness):
    """(base / peak)^sharpness. Zero to the power of zero is 1; to the power of infinity, all but the peak is 0."""
    b_ratio = b_base / peak
    b_log = tl.log(b_ratio)
    b_log = tl.where(sharpness == 0.0, tl.where(b_log == -float("inf"), 0.0, b_log), b_log)
    b_sharpest = tl.where(b_base < peak, 0.0, b_ratio)
    return tl.where(sharpness == float("inf"), b_sharpest, tl.exp(sharpness * b_log))


@triton.jit
def share_of_eps(peak, sharpness, EPS: tl.constexpr):
    """eps / peak^sharpness. In double, since a rounding of the exponent is an error of the result."""
    exponent = tl.where(peak == 1.0, 0.0, -sharpness.to(tl.float64) * tl.log(peak.to(tl.float64)))
    return (EPS * tl.exp(exponent)).to(peak.dtype)


@triton.jit
def sharpen_head(
    p_weights,  # [N]
    sharpness,
    p_new_weights,  # [N], may be p_weights
    N,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    peak = tl.full([], 0.0, sharpness.dtype)
    for i_n in range(0, N, BN):
        peak = tl.maximum(peak, tl.max(load_base(p_weights, i_n + tl.arange(0, BN), N, EPS, IN_POWERS), 0))
    peak = tl.where(peak == 0.0, 1.0, peak)
    total = tl.full([], 0.0, sharpness.dtype)
    if IN_POWERS:
        total += share_of_eps(peak, sharpness, EPS)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_power = power(load_base(p_weights, o_n, N, EPS, IN_POWERS), peak, sharpness)
        total += tl.sum(tl.where(o_n < N, b_power, 0.0), 0)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_power = power(load_base(p_weights, o_n, N, EPS, IN_POWERS), peak, sharpness)
        tl.store(p_new_weights + o_n, b_power / total, mask=o_n < N)


@triton.jit
def sharpen_head_backward(
    p_grad_new_weights,  # [N]
    p_new_weights,  # [N]
    p_weights,  # [N]
    sharpness,
    p_grad_weights,  # [N] or None; may be p_weights or p_grad_new_weights
    p_grad_sharpness,  # [1] or None
    N,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    """With z = result (gradient - <result, gradient>): sharpness z / base, and the sum of z ln base, where the base is
    not 0."""
    overlap = tl.full([], 0.0, sharpness.dtype)
    total = tl.full([], EPS, sharpness.dtype)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_new = tl.load(p_new_weights + o_n, mask=o_n < N, other=0.0)
        b_grad = tl.load(p_grad_new_weights + o_n, mask=o_n < N, other=0.0)
        overlap += tl.sum(b_new * b_grad, 0)
        if IN_POWERS:
            total += tl.sum(load_base(p_weights, o_n, N, EPS, IN_POWERS), 0)
    # result / base where the base is 0: weights^(sharpness - 1) over the sum of the powers; of a constant, nothing.
    at_zero = tl.where((sharpness > 1.0) | (sharpness == 0.0), 0.0, float("inf"))
    at_zero = tl.where(sharpness == 1.0, 1.0 / total, at_zero)
    grad_sharpness = tl.full([], 0.0, sharpness.dtype)
    for i_n in range(0, N, BN):
        o_n = i_n + tl.arange(0, BN)
        b_base = load_base(p_weights, o_n, N, EPS, IN_POWERS)
        b_new = tl.load(p_new_weights + o_n, mask=o_n < N, other=0.0)
        b_centred = tl.load(p_grad_new_weights + o_n, mask=o_n < N, other=0.0) - overlap
        grad_sharpness += tl.sum(b_new * b_centred * tl.log(tl.where(b_base == 0.0, 1.0, b_base)), 0)
        if p_grad_weights is not None:
            b_slope = b_new / b_base
            if IN_POWERS:
                b_slope = tl.where(b_base == 0.0, at_zero, b_slope)
            tl.store(p_grad_weights + o_n, sharpness * b_slope * b_centred, mask=o_n < N)
    if p_grad_sharpness is not None:
        tl.store(p_grad_sharpness, grad_sharpness)


@triton.jit
def sharpen_fwd_kernel(
    p_weights,  # [H, N]
    p_sharpness,  # [H]
    p_new_weights,  # [H, N]
    N,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    i_h = tl.program_id(0).to(tl.int64)
    sharpness = tl.load(p_sharpness + i_h)
    sharpen_head(p_weights + i_h * N, sharpness, p_new_weights + i_h * N, N, EPS, IN_POWERS, BN)


@triton.jit
def sharpen_bwd_kernel(
    p_grad_new_weights,  # [H, N]
    p_new_weights,  # [H, N]
    p_weights,  # [H, N]
    p_sharpness,  # [H]
    p_grad_weights,  # [H, N] or None
    p_grad_sharpness,  # [H] or None
    N,
    EPS: tl.constexpr,
    IN_POWERS: tl.constexpr,
    BN: tl.constexpr,
):
    i_h = tl.program_id(0).to(tl.int64)
    sharpness = tl.load(p_sharpness + i_h)
    if p_grad_weights is not None:
        p_grad_weights += i_h * N
    if p_grad_sharpness is not None:
        p_grad_sharpness += i_h
    sharpen_head_backward(
        p_grad_new_weights + i_h * N, p_new_weights + i_h * N, p_weights + i_h * N, sharpness,
        p_grad_weights, p_grad_sharpness, N, EPS, IN_POWERS, BN,
    )  # fmt: skip


def sharpen(weights: Tensor, sharpness: Tensor, in_powers: bool, eps: float) -> Tensor:
    B, A, N = weights.shape
    weights, sharpness = weights.contiguous(), sharpness.contiguous()
    new_weights = torch.empty_like(weights)
    if weights.numel():
        with torch.cuda.device_of(weights):
            sharpen_fwd_kernel[(B * A,)](weights, sharpness, new_weights, N, eps, in_powers, BLOCK)
    return new_weights


def sharpen_backward(
    grad_new_weights: Tensor,
    new_weights: Tensor,
    weights: Tensor,
    sharpness: Tensor,
    in_powers: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    B, A, N = weights.shape
    want_weights, want_sharpness = output_mask
    grad_weights = weights.new_empty(weights.shape if want_weights else 0)
    grad_sharpness = weights.new_empty(sharpness.shape if want_sharpness else 0)
    if weights.numel() == 0 or not any(output_mask):
        grad_sharpness.zero_()
        return grad_weights, grad_sharpness
    with torch.cuda.device_of(weights):
        sharpen_bwd_kernel[(B * A,)](
            *(tensor.contiguous() for tensor in (grad_new_weights, new_weights, weights, sharpness)),
            grad_weights if want_weights else None, grad_sharpness if want_sharpness else None,
            N, eps, in_powers, BLOCK,
        )  # fmt: skip
    return grad_weights, grad_sharpness
