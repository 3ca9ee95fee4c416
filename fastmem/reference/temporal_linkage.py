"""Temporal linkage: which slot was written right after which, and the two reads along it.

    L'[i,j] = (1 - w[i] - w[j]) L[i,j] + w[i] p[j],   L'[i,i] = 0       (L[i,j]: i was written right after j)
    p' = (1 - sum_i w[i]) p + w                                          (L' uses the old p)
    forward[q,r] = L'[q] read_weights[r],   backward[q,r] = L'[q]^T read_weights[r]

link [B,Q,N,N], precedence [B,Q,N], write_weights w [B,Q,N], read_weights [B,R,N] -> link, precedence,
forward [B,Q,R,N], backward [B,Q,R,N]. Source: Graves et al., "Hybrid computing using a neural network with dynamic
external memory".
"""

import torch
from torch import Tensor


def _diagonal(link: Tensor) -> Tensor:
    return torch.eye(link.shape[-1], dtype=torch.bool, device=link.device)


def _decay(write_weights: Tensor) -> Tensor:
    """1 - w[i] - w[j], [B,Q,N,N]."""
    return 1 - write_weights.unsqueeze(-1) - write_weights.unsqueeze(-2)


def _outer(rows: Tensor, columns: Tensor) -> Tensor:
    return rows.unsqueeze(-1) * columns.unsqueeze(-2)


def linked(link: Tensor, precedence: Tensor, write_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The new link and precedence."""
    link = _decay(write_weights) * link + _outer(write_weights, precedence)
    precedence = (1 - write_weights.sum(-1, keepdim=True)) * precedence + write_weights
    return link.masked_fill(_diagonal(link), 0.0), precedence


def along(link: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    """Forward and backward, by a link as it is."""
    read_weights = read_weights.unsqueeze(1)  # [B,1,R,N]
    return read_weights @ link.mT, read_weights @ link


def temporal_linkage(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    link, precedence = linked(link, precedence, write_weights)
    return link, precedence, *along(link, read_weights)


def temporal_linkage_(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The same in place: link and precedence become the new ones. No autograd."""
    link.mul_(_decay(write_weights)).add_(_outer(write_weights, precedence))
    link.diagonal(dim1=-2, dim2=-1).zero_()
    precedence.mul_(1 - write_weights.sum(-1, keepdim=True)).add_(write_weights)
    return along(link, read_weights)


def linked_backward(
    grad_link: Tensor, grad_precedence: Tensor | None, link: Tensor, precedence: Tensor, write_weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of link, precedence and write weights. With E = grad_link, E[i,i] = 0

    grad L = (1 - w[i] - w[j]) E
    grad p = E^T w + (1 - sum w) grad_p'
    grad w = E p - rowsum(E L) - columnsum(E L) + grad_p' - sum(grad_p' p)
    """
    into_link = grad_link.masked_fill(_diagonal(link), 0.0)
    into_decay = into_link * link
    grad_before = (write_weights.unsqueeze(-2) @ into_link).squeeze(-2)
    grad_write = (into_link @ precedence.unsqueeze(-1)).squeeze(-1) - into_decay.sum(-1) - into_decay.sum(-2)
    if grad_precedence is not None:
        grad_before = grad_before + (1 - write_weights.sum(-1, keepdim=True)) * grad_precedence
        grad_write = grad_write + grad_precedence - (grad_precedence * precedence).sum(-1, keepdim=True)
    return _decay(write_weights) * into_link, grad_before, grad_write


def along_backward(
    grad_forward: Tensor, grad_backward: Tensor, link: Tensor, read_weights: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of link and read weights. With f, g the gradients of forward, backward

    grad L = sum_r f[r] (x) read_weights[r] + read_weights[r] (x) g[r]
    grad read_weights[r] = sum_q L^T f[q,r] + L g[q,r]
    """
    f, g = grad_forward, grad_backward
    reads = read_weights.unsqueeze(1).expand(-1, link.shape[1], -1, -1)
    return f.mT @ reads + reads.mT @ g, (f @ link + g @ link.mT).sum(1)


def temporal_linkage_backward(
    grad_link: Tensor | None,
    grad_precedence: Tensor | None,
    grad_forward: Tensor | None,
    grad_backward: Tensor | None,
    link: Tensor,
    precedence: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the four inputs; an unwanted one is a size-0 tensor. The new link is rebuilt from the inputs."""
    new_link, _ = linked(link, precedence, write_weights)
    zero = torch.zeros_like(read_weights).unsqueeze(1)
    f = zero if grad_forward is None else grad_forward
    g = zero if grad_backward is None else grad_backward
    into_link, into_read = along_backward(f, g, new_link, read_weights)
    if grad_link is not None:
        into_link = into_link + grad_link
    gradients = (*linked_backward(into_link, grad_precedence, link, precedence, write_weights), into_read)
    return tuple(grad if wants else link.new_empty(0) for grad, wants in zip(gradients, output_mask, strict=True))
