"""Allocation: write weights that prefer the least used slots.

    u = eps + (1 - eps) usage,   phi = stable ascending argsort of u
    weights[phi_j] = (1 - u[phi_j]) prod_{i<j} u[phi_i]

With several write heads a later head sees the usage that the earlier ones would leave, gates being allocation gate
times write gate:  usage <- usage + (1 - usage) gates[q] weights[q].

usage [B,N], gates [B,Q] or None (one head) -> weights [B,Q,N]. The order phi is a constant for the gradient. Source:
Graves et al., "Hybrid computing using a neural network with dynamic external memory"; several heads as in the code
published with it.
"""

import torch
from torch import Tensor

EPS = 1e-6


def _allocate(usage: Tensor) -> Tensor:
    used, order = torch.sort(EPS + (1 - EPS) * usage, dim=-1, stable=True)
    earlier = torch.cat([torch.ones_like(used[:, :1]), used[:, :-1]], -1).cumprod(-1)
    return torch.zeros_like(used).scatter(-1, order, (1 - used) * earlier)


def allocation(usage: Tensor, gates: Tensor | None) -> Tensor:
    if gates is None:
        return _allocate(usage).unsqueeze(1)
    weights = []
    for gate in gates.unsqueeze(-1).unbind(1):
        weights.append(_allocate(usage))
        usage = usage + (1 - usage) * gate * weights[-1]
    return torch.stack(weights, 1)
