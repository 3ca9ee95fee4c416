"""Which samples take part in what: a step mask [T,B] cut into steps, and results chosen sample by sample."""

from typing import NamedTuple

import torch
from torch import Tensor


class Acting(NamedTuple):
    """The samples [B] of which a part of the network acts in a step; None: all of them."""

    control: Tensor | None = None
    write: Tensor | None = None
    read: Tensor | None = None
    access: Tensor | None = None  # writes or reads


ALL = Acting()


def acting(step_mask: Tensor | None, steps: int) -> list[Acting]:
    """Of each step. Bits of the mask: 1 controller, 2 write, 4 read."""
    if step_mask is None:
        return [ALL] * steps
    parts = ((step_mask & bits).bool().unbind() for bits in (1, 2, 4, 2 | 4))
    return [Acting(*step) for step in zip(*parts, strict=True)]


def chosen(samples: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """`new` of the samples, `old` of the others: a choice and no product, so that a NaN not chosen leaves no trace."""
    if samples is None:
        return new
    return torch.where(samples.view(-1, *[1] * (new.dim() - 1)), new, old)
