"""Allocation: write weights that prefer the least used slots.

    u = eps + (1 - eps) usage,   phi = stable ascending argsort of u
    weights[phi_j] = (1 - u[phi_j]) prod_{i<j} u[phi_i]

With several write heads a later head sees the usage that the earlier ones would leave, gates being allocation gate
times write gate:  usage <- usage + (1 - usage) gates[q] weights[q].

usage [B,N], gates [B,Q] or None (one head) -> weights [B,Q,N]. The order phi is a constant for the gradient. Source:
Graves et al., "Hybrid computing using a neural network with dynamic external memory"; several heads and an eps of 1e-6,
as in the code published with it. Other published code has no eps.
"""

import torch
from torch import Tensor

from fastmem.reference._products import product_before


def _in_order(usage: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """u in ascending order, the slots in that order, and the product of all u before each. NaN comes last."""
    used, order = torch.sort(eps + (1 - eps) * usage, dim=-1, stable=True)
    return used, order, product_before(used, -1)


def _one_head(usage: Tensor, eps: float) -> Tensor:
    used, order, earlier = _in_order(usage, eps)
    return torch.zeros_like(used).scatter(-1, order, (1 - used) * earlier)


def _left(usage: Tensor, gate: Tensor, weights: Tensor) -> Tensor:
    """The usage that a head leaves to the next."""
    return usage + (1 - usage) * gate * weights


def allocation(usage: Tensor, gates: Tensor | None, eps: float) -> Tensor:
    if gates is None:
        return _one_head(usage, eps).unsqueeze(1)
    weights = [usage.unsqueeze(1)[:, :0]]  # there may be no head
    for gate in gates.unbind(1):
        weights.append(_one_head(usage, eps).unsqueeze(1))
        usage = _left(usage, gate.unsqueeze(-1), weights[-1].squeeze(1))
    return torch.cat(weights, 1)


def _one_head_backward(grad_weights: Tensor, usage: Tensor, eps: float) -> Tensor:
    """In order of usage, with g = grad_weights, and no division: the least used slots have u near zero.

    later[j] = g[j+1] (1 - u[j+1]) + u[j+1] later[j+1],   0 for the last
    grad u[j] = (later[j] - g[j]) prod_{i<j} u[i]
    """
    used, order, earlier = _in_order(usage, eps)
    g = grad_weights.gather(-1, order)
    later, following = torch.empty_like(used), used.new_zeros(used.shape[0])
    for j in reversed(range(used.shape[-1])):
        later[:, j] = following
        following = g[:, j] * (1 - used[:, j]) + used[:, j] * following
    return torch.zeros_like(used).scatter(-1, order, (1 - eps) * (later - g) * earlier)


def allocation_backward(
    grad_weights: Tensor, weights: Tensor, usage: Tensor, gates: Tensor | None, eps: float, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of usage and gates; an unwanted one is a size-0 tensor. From the last head, which leaves to none,

    into_free = (1 - usage) grad_left,   grad gates[q] = sum_i into_free weights[q]
    grad weights[q] += gates[q] into_free
    grad usage = (1 - gates[q] weights[q]) grad_left + what the order of the slots gives
    """
    heads = weights.shape[1]
    gate = () if gates is None else gates.unsqueeze(-1).unbind(1)
    seen = [usage]
    grad_usage, grad_gates = torch.zeros_like(usage), usage.new_zeros(weights.shape[:2])
    for q in range(heads - 1):
        seen.append(_left(seen[q], gate[q], weights[:, q]))
    for q in reversed(range(heads)):
        into_weights = grad_weights[:, q]
        if q + 1 < heads:
            into_free = (1 - seen[q]) * grad_usage
            grad_gates[:, q] = (into_free * weights[:, q]).sum(-1)
            into_weights = into_weights + gate[q] * into_free
            grad_usage = (1 - gate[q] * weights[:, q]) * grad_usage
        grad_usage = grad_usage + _one_head_backward(into_weights, seen[q], eps)
    return (
        grad_usage if output_mask[0] else usage.new_empty(0),
        grad_gates if output_mask[1] and gates is not None else usage.new_empty(0),
    )
