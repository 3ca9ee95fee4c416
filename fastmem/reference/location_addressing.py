"""Location addressing: from where a head was, or from what it looks for, to slots a few steps away.

    gated = g content + (1 - g) previous
    shifted[i] = sum_j shift[j] gated[(i - j) mod N],   j = -S..S at index S + j, or at S - j when reversed
    weights = sharpen(shifted, sharpness)

content, previous [B,A,N], gate g [B,A], shift [B,A,2S+1], sharpness [B,A] -> weights [B,A,N]. Source: Graves et al.,
"Neural Turing Machines", equations 7 to 9; public code of it stores the shift reversed.
"""

import torch
from torch import Tensor

from fastmem.reference.sharpen import sharpen, sharpen_backward


def interpolated(content: Tensor, previous: Tensor, gate: Tensor) -> Tensor:
    gate = gate.unsqueeze(-1)
    return gate * content + (1 - gate) * previous


def _turned(weights: Tensor, taps: int, reversed_shift: bool) -> Tensor:
    """The weights moved j slots up, for the j of each tap: [B,A,2S+1,N]."""
    direction = -1 if reversed_shift else 1
    return torch.stack([weights.roll(direction * (tap - taps // 2), -1) for tap in range(taps)], -2)


def shifted(weights: Tensor, shift: Tensor, reversed_shift: bool) -> Tensor:
    return (shift.unsqueeze(-1) * _turned(weights, shift.shape[-1], reversed_shift)).sum(-2)


def location_addressing(
    content: Tensor,
    previous: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharpness: Tensor,
    reversed_shift: bool,
    in_powers: bool,
    eps: float,
) -> Tensor:
    gated = interpolated(content, previous, gate)
    return sharpen(shifted(gated, shift, reversed_shift), sharpness, in_powers, eps)


def location_addressing_backward(
    grad_weights: Tensor,
    weights: Tensor,
    content: Tensor,
    previous: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharpness: Tensor,
    reversed_shift: bool,
    in_powers: bool,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five tensors; an unwanted one is a size-0 tensor. With h that of shifted, by `sharpen_backward`

    grad shift[j] = sum_i h[i] gated[(i - j) mod N],   h'[i] = sum_j shift[j] h[(i + j) mod N]
    grad content = g h',   grad previous = (1 - g) h',   grad g = sum h' (content - previous)
    """
    gated = interpolated(content, previous, gate)
    into_shifted, grad_sharpness = sharpen_backward(
        grad_weights, weights, shifted(gated, shift, reversed_shift), sharpness, in_powers, eps, [True, output_mask[4]]
    )
    into_gated = shifted(into_shifted, shift, not reversed_shift)
    along = into_shifted.unsqueeze(-2) * _turned(gated, shift.shape[-1], reversed_shift)
    nothing = content.new_empty
    return (
        gate.unsqueeze(-1) * into_gated if output_mask[0] else nothing(0),
        (1 - gate.unsqueeze(-1)) * into_gated if output_mask[1] else nothing(0),
        (into_gated * (content - previous)).sum(-1) if output_mask[2] else nothing(0),
        along.sum(-1) if output_mask[3] else nothing(0),
        grad_sharpness,
    )
