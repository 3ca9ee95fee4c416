"""Memory write in eager PyTorch: the textbook form, and the fastest forms that PyTorch's operators allow.

M' = M prod over q of (1 - w_q erase_q) + sum over q of w_q values_q.
memory [B,N,W], write_weights [B,Q,N], erase [B,Q,W], values [B,Q,W].
"""

import torch
from torch import Tensor


def textbook(memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """The equation as papers and public code write it."""
    kept = torch.prod(1 - write_weights.unsqueeze(-1) * erase.unsqueeze(-2), 1)
    return memory * kept + write_weights.mT @ values


def fast_eager(memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """Head by head, and the sum of all heads as one product."""
    for weights, erased in zip(write_weights.unbind(1), erase.unbind(1), strict=True):
        memory = torch.addcmul(memory, weights.unsqueeze(-1), erased.unsqueeze(-2) * memory, value=-1)
    return torch.baddbmm(memory, write_weights.mT, values)


def one_head_eager(memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor) -> Tensor:
    """Rearranged for one write head as M + w (values - erase M): two passes, no other eager form has fewer."""
    return torch.addcmul(memory, write_weights.mT, torch.addcmul(values, erase, memory, value=-1))


def one_head_eager_(memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, workspace: Tensor) -> None:
    """In place, for inference: the change goes into a workspace that the caller keeps."""
    torch.addcmul(values, erase, memory, value=-1, out=workspace)
    memory.addcmul_(write_weights.mT, workspace)
