"""Sharpening: a weighting raised to a power and made to sum to 1, so that a blurred one becomes sharp again.

    w'[i] = (w[i] + eps)^s / sum_n (w[n] + eps)^s = softmax_i( s ln(w[i] + eps) )
    w'[i] = w[i]^s / (sum_n w[n]^s + eps)                                            in powers

weights w [B,A,N], sharpness s [B,A] -> weights [B,A,N]. Sources: Graves et al., "Neural Turing Machines", and public
code of it (in powers); Csordas and Schmidhuber, "Improving Differentiable Neural Computers Through Memory Masking,
De-allocation, and Link Distribution Sharpness Control".
"""

import torch
from torch import Tensor


def sharpen(weights: Tensor, sharpness: Tensor, in_powers: bool, eps: float) -> Tensor:
    sharpness = sharpness.unsqueeze(-1)
    if in_powers:
        powers = weights**sharpness
        return powers / (powers.sum(-1, keepdim=True) + eps)
    return torch.softmax(sharpness * (weights + eps).log(), -1)


def sharpen_backward(
    grad_new_weights: Tensor,
    new_weights: Tensor,
    weights: Tensor,
    sharpness: Tensor,
    in_powers: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor]:
    """Gradients of weights and sharpness; an unwanted one is a size-0 tensor. With g the upstream gradient

    z = w' (g - sum w' g),   grad w = s z / (w + eps),   grad s = sum z ln(w + eps)

    In powers eps is 0 here, and w' / w = w^(s-1) / (sum w^s + eps) also where w is 0. There 0^s does not change with s,
    and w^0 does not change with w.
    """
    s = sharpness.unsqueeze(-1)
    centred = grad_new_weights - (new_weights * grad_new_weights).sum(-1, keepdim=True)
    if in_powers:
        base = weights
        slope = weights ** (s - 1) / ((weights**s).sum(-1, keepdim=True) + eps)
    else:
        base = weights + eps
        slope = new_weights / base
    return (
        torch.where(s == 0, 0, s * slope * centred) if output_mask[0] else weights.new_empty(0),
        torch.where(base == 0, 0, torch.xlogy(new_weights * centred, base)).sum(-1)
        if output_mask[1]
        else weights.new_empty(0),
    )
