"""Content addressing in eager PyTorch: softmax over slots of strength x cosine, "inner" norm.

memory [B,N,W], keys [B,A,W], strengths [B,A] -> weights [B,A,N].
"""

import torch
from torch import Tensor

EPS = 1e-6


def textbook(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """The equation as papers and public code write it."""
    dot = torch.einsum("bnw,baw->ban", memory, keys)
    key_norm = torch.sqrt(keys.square().sum(-1) + EPS)
    memory_norm = torch.sqrt(memory.square().sum(-1) + EPS)
    similarity = dot / (key_norm.unsqueeze(-1) * memory_norm.unsqueeze(1) + EPS)
    return torch.softmax(strengths.unsqueeze(-1) * similarity, dim=-1)


def fast_eager(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """No temporary of the memory's size, strengths folded into the keys, the product in the order that suits the job.

    Measured: keys x memory is the faster product forward, memory x keys the faster one when its gradient follows.
    """
    length = torch.linalg.vector_norm(memory, dim=-1)
    memory_norm = torch.addcmul(length.new_tensor(EPS), length, length).sqrt_()
    key_norm = torch.sqrt(keys.square().sum(-1) + EPS)
    denominator = torch.mul(key_norm.unsqueeze(-1), memory_norm.unsqueeze(1)).add_(EPS)
    scaled_keys = keys * strengths.unsqueeze(-1)
    if memory.requires_grad or keys.requires_grad:
        return torch.softmax(torch.bmm(memory, scaled_keys.mT).mT / denominator, dim=-1)
    return torch.softmax(torch.bmm(scaled_keys, memory.mT).div_(denominator), dim=-1)
