"""Usage of the slots after the last write, less what the free gates release.

    retention[i] = prod_r (1 - free_gates[r] read_weights[r,i])
    usage'[i] = (1 - (1 - usage[i]) prod_q (1 - write_weights[q,i])) retention[i]

usage [B,N], write_weights [B,Q,N], read_weights [B,R,N] (both of the step before), free_gates [B,R] -> usage [B,N],
retention [B,N]. Source: Graves et al., "Hybrid computing using a neural network with dynamic external memory".
"""

import torch
from torch import Tensor

from fastmem.reference._products import product_of_others


def _used(usage: Tensor, write_weights: Tensor) -> Tensor:
    # Head by head: the same product, but a small weight on a free slot is not rounded against 1, and a full slot stays
    # exactly full, so that allocation finds full slots tied.
    for weights in write_weights.unbind(1):
        usage = usage + weights * (1 - usage)
    return usage


def _kept(read_weights: Tensor, free_gates: Tensor) -> Tensor:
    """What each read head leaves, [B,R,N]."""
    return 1 - free_gates.unsqueeze(-1) * read_weights


def usage_update(
    usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor
) -> tuple[Tensor, Tensor]:
    retention = _kept(read_weights, free_gates).prod(1)
    return _used(usage, write_weights) * retention, retention


def usage_update_backward(
    grad_usage: Tensor | None,
    grad_retention: Tensor | None,
    usage: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    free_gates: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the four inputs; an unwanted one is a size-0 tensor. With used = usage' / retention

    into_used = grad_usage retention,   into_retention = grad_usage used + grad_retention
    grad usage = into_used prod_q (1 - w[q])
    grad w[q] = into_used (1 - usage) prod_{p!=q} (1 - w[p])
    into_kept[r] = into_retention prod_{s!=r} (1 - free_gates[s] read_weights[s])
    grad read_weights[r] = -into_kept[r] free_gates[r],   grad free_gates[r] = -sum_i into_kept[r,i] read_weights[r,i]
    """
    kept, unwritten = _kept(read_weights, free_gates), 1 - write_weights
    zero = torch.zeros_like(usage)
    into_usage = zero if grad_usage is None else grad_usage
    into_used = into_usage * kept.prod(1)
    into_retention = into_usage * _used(usage, write_weights) + (zero if grad_retention is None else grad_retention)
    into_kept = into_retention.unsqueeze(1) * product_of_others(kept, 1)
    into_written = (into_used * (1 - usage)).unsqueeze(1)
    return (
        into_used * unwritten.prod(1) if output_mask[0] else usage.new_empty(0),
        into_written * product_of_others(unwritten, 1) if output_mask[1] else usage.new_empty(0),
        -into_kept * free_gates.unsqueeze(-1) if output_mask[2] else usage.new_empty(0),
        -(into_kept * read_weights).sum(-1) if output_mask[3] else usage.new_empty(0),
    )
