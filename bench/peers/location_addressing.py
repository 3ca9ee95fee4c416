"""Location addressing in eager PyTorch: interpolate, shift around the circle, sharpen.

content, previous [B,A,N], gate [B,A], shift [B,A,2S+1] with -S first, sharpness [B,A]. S must not exceed N.
"""

import torch
from torch import Tensor

from bench.peers import sharpen


def textbook(content: Tensor, previous: Tensor, gate: Tensor, shift: Tensor, sharpness: Tensor) -> Tensor:
    """The shift as public code has it, a convolution of the padded weights, here of all heads at once."""
    gated = gate.unsqueeze(-1) * content + (1 - gate.unsqueeze(-1)) * previous
    batch, heads, taps = shift.shape
    padded = torch.nn.functional.pad(gated, (taps // 2, taps // 2), mode="circular")
    shifted = torch.conv1d(
        padded.reshape(1, batch * heads, -1), shift.flip(-1).reshape(batch * heads, 1, taps), groups=batch * heads
    )
    return sharpen.textbook(shifted.view_as(gated), sharpness)


def fast_eager(content: Tensor, previous: Tensor, gate: Tensor, shift: Tensor, sharpness: Tensor) -> Tensor:
    """One interpolation, and slices of the closed circle instead of a convolution; sharpened as a softmax."""
    gated = torch.lerp(previous, content, gate.unsqueeze(-1))
    slots, reach = gated.shape[-1], shift.shape[-1] // 2
    circle = torch.cat([gated[..., slots - reach :], gated, gated[..., :reach]], -1)
    first, *others = shift.flip(-1).unsqueeze(-1).unbind(-2)
    shifted = first * circle[..., :slots]
    for start, tap in enumerate(others, 1):
        shifted = torch.addcmul(shifted, tap, circle[..., start : start + slots])
    return sharpen.fast_eager(shifted, sharpness)
