"""Temporal linkage in eager PyTorch: the textbook form, and the fastest forms that PyTorch's operators allow.

L' = (1 - w_i - w_j) L + w_i p_j with a zero diagonal; p' = (1 - sum w) p + w; forward = L' r, backward = L'^T r.
link [B,Q,N,N], precedence [B,Q,N], write_weights [B,Q,N], read_weights [B,R,N].
"""

from functools import lru_cache

import torch
from torch import Tensor

State = tuple[Tensor, Tensor, Tensor, Tensor]


@lru_cache
def off_diagonal(num_slots: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return 1 - torch.eye(num_slots, dtype=dtype, device=device)


def textbook(link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> State:
    """The equation as papers and public code write it."""
    w_i, w_j = write_weights.unsqueeze(-1), write_weights.unsqueeze(-2)
    mask = off_diagonal(link.shape[-1], link.dtype, link.device)
    new_link = ((1 - w_i - w_j) * link + w_i * precedence.unsqueeze(-2)) * mask
    new_precedence = (1 - write_weights.sum(-1, keepdim=True)) * precedence + write_weights
    forward = torch.einsum("bqij,brj->bqri", new_link, read_weights)
    backward = torch.einsum("bqij,bri->bqrj", new_link, read_weights)
    return new_link, new_precedence, forward, backward


def _reads(link: Tensor, read_weights: Tensor) -> tuple[Tensor, Tensor]:
    if link.shape[1] == 1:
        square = link.squeeze(1)
        return (torch.bmm(read_weights, square.mT).unsqueeze(1), torch.bmm(read_weights, square).unsqueeze(1))
    reads = read_weights.unsqueeze(1)
    return reads @ link.mT, reads @ link


def fast_eager(link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> State:
    """The same formula with one N x N temporary (two where autograd needs the factor), the rest in place."""
    w_i, w_j = write_weights.unsqueeze(-1), write_weights.unsqueeze(-2)
    factor = (1 - w_i) - w_j
    new_link = factor * link if factor.requires_grad or link.requires_grad else factor.mul_(link)
    new_link.addcmul_(w_i, precedence.unsqueeze(-2))
    new_link.diagonal(dim1=-2, dim2=-1).zero_()
    new_precedence = torch.addcmul(write_weights, 1 - write_weights.sum(-1, keepdim=True), precedence)
    return new_link, new_precedence, *_reads(new_link, read_weights)


def lerp_eager(link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor) -> State:
    """Rearranged as lerp(L, p_j, w_i) - w_j L: no temporary at all. The fastest eager form that we found."""
    w_i, w_j = write_weights.unsqueeze(-1), write_weights.unsqueeze(-2)
    new_link = torch.lerp(link, precedence.unsqueeze(-2), w_i).addcmul_(link, w_j, value=-1)
    new_link.diagonal(dim1=-2, dim2=-1).zero_()
    new_precedence = torch.addcmul(write_weights, 1 - write_weights.sum(-1, keepdim=True), precedence)
    return new_link, new_precedence, *_reads(new_link, read_weights)


def fast_eager_(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor, workspace: Tensor
) -> tuple[Tensor, Tensor]:
    """In place, for inference: the factor goes into a workspace that the caller keeps."""
    w_i, w_j = write_weights.unsqueeze(-1), write_weights.unsqueeze(-2)
    torch.sub(1 - w_i, w_j, out=workspace)
    link.mul_(workspace).addcmul_(w_i, precedence.unsqueeze(-2))
    link.diagonal(dim1=-2, dim2=-1).zero_()
    precedence.mul_(1 - write_weights.sum(-1, keepdim=True)).add_(write_weights)
    return _reads(link, read_weights)


def lerp_eager_(
    link: Tensor, precedence: Tensor, write_weights: Tensor, read_weights: Tensor, new_link: Tensor
) -> tuple[Tensor, Tensor]:
    """For inference between two buffers that the caller swaps: nothing is allocated and two passes are enough."""
    w_i, w_j = write_weights.unsqueeze(-1), write_weights.unsqueeze(-2)
    torch.lerp(link, precedence.unsqueeze(-2), w_i, out=new_link).addcmul_(link, w_j, value=-1)
    new_link.diagonal(dim1=-2, dim2=-1).zero_()
    precedence.mul_(1 - write_weights.sum(-1, keepdim=True)).add_(write_weights)
    return _reads(new_link, read_weights)
