"""Memory write: all write heads erase, then all add.

    M'[i] = M[i] retention[i] prod_q (1 - w[q,i] erase[q]) + sum_q w[q,i] values[q]

memory [B,N,W], write_weights w [B,Q,N], erase [B,Q,W], values [B,Q,W], retention [B,N] or None (1) -> memory [B,N,W].
Source: Graves et al., "Neural Turing Machines"; retention: Csordas and Schmidhuber, "Improving Differentiable Neural
Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control".
"""

from torch import Tensor

from fastmem.reference._products import product_of_others


def _kept(write_weights: Tensor, erase: Tensor) -> Tensor:
    """What each head keeps, 1 - w[q,i] erase[q], [B,Q,N,W]."""
    return 1 - write_weights.unsqueeze(-1) * erase.unsqueeze(-2)


def memory_write(
    memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, retention: Tensor | None
) -> Tensor:
    for kept in _kept(write_weights, erase).unbind(1):
        memory = memory * kept
    if retention is not None:
        memory = memory * retention.unsqueeze(-1)
    return memory + write_weights.mT @ values


def memory_write_(
    memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, retention: Tensor | None
) -> None:
    """The same in place: memory becomes the new one. No autograd."""
    for kept in _kept(write_weights, erase).unbind(1):
        memory.mul_(kept)
    if retention is not None:
        memory.mul_(retention.unsqueeze(-1))
    memory.add_(write_weights.mT @ values)


def memory_write_backward(
    grad_memory: Tensor,
    memory: Tensor,
    write_weights: Tensor,
    erase: Tensor,
    values: Tensor,
    retention: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the five inputs; an unwanted or absent one is a size-0 tensor. With G the gradient of M'

    K[q] = 1 - w[q] (x) erase[q],   E[q] = G M retention prod_{p != q} K[p]
    grad M = G retention prod_q K[q]
    grad w[q,i] = sum_k G[i,k] values[q,k] - E[q,i,k] erase[q,k]
    grad erase[q] = -sum_i w[q,i] E[q,i],   grad values[q] = sum_i w[q,i] G[i]
    grad retention[i] = sum_k (G M prod_q K[q])[i,k]
    """
    kept = _kept(write_weights, erase)
    kept_by_all = kept.prod(1)
    grad_kept_memory = grad_memory if retention is None else grad_memory * retention.unsqueeze(-1)
    erased = (grad_kept_memory * memory).unsqueeze(1) * product_of_others(kept, 1)  # [B,Q,N,W]
    grad_write = values @ grad_memory.mT - (erased @ erase.unsqueeze(-1)).squeeze(-1)
    grad_erase = -(write_weights.unsqueeze(-2) @ erased).squeeze(-2)
    wants_retention = output_mask[4] and retention is not None
    return (
        grad_kept_memory * kept_by_all if output_mask[0] else memory.new_empty(0),
        grad_write if output_mask[1] else memory.new_empty(0),
        grad_erase if output_mask[2] else memory.new_empty(0),
        write_weights @ grad_memory if output_mask[3] else memory.new_empty(0),
        (grad_memory * memory * kept_by_all).sum(-1) if wants_retention else memory.new_empty(0),
    )
