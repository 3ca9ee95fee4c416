"""Allocation in eager PyTorch: weights (1 - u_j) prod_{i<j} u_i along the slots in ascending order of usage.

usage [B,N], gates [B,Q] or none for one head -> weights [B,Q,N]; a later head sees usage + (1 - usage) gate weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6


def _heads(one_head: Callable[[Tensor], Tensor], usage: Tensor, gates: Tensor | None) -> Tensor:
    if gates is None:
        return one_head(usage).unsqueeze(1)
    weights = []
    for gate in gates.unsqueeze(-1).unbind(1):
        weights.append(one_head(usage))
        usage = usage + (1 - usage) * gate * weights[-1]
    return torch.stack(weights, 1)


def _textbook(usage: Tensor) -> Tensor:
    used, order = torch.sort(EPS + (1 - EPS) * usage, dim=-1)
    earlier = torch.cumprod(torch.cat([torch.ones_like(used[:, :1]), used], dim=-1), dim=-1)[:, :-1]
    return ((1 - used) * earlier).gather(-1, torch.argsort(order, dim=-1))


def _fast_eager(usage: Tensor) -> Tensor:
    used, order = torch.sort((usage * (1 - EPS)).add_(EPS), dim=-1)
    earlier = torch.nn.functional.pad(used[:, :-1], (1, 0), value=1.0).cumprod(-1)
    return torch.empty_like(used).scatter(-1, order, torch.addcmul(earlier, used, earlier, value=-1))


def textbook(usage: Tensor, gates: Tensor | None = None) -> Tensor:
    """As public code writes it: the weights in order, back to the slots by the inverse permutation, a second sort."""
    return _heads(_textbook, usage, gates)


def fast_eager(usage: Tensor, gates: Tensor | None = None) -> Tensor:
    """A scatter instead of the second sort, and fused multiply-adds."""
    return _heads(_fast_eager, usage, gates)
