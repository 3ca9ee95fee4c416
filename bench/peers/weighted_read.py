"""Weighted read in eager PyTorch: reads[a] = sum over i of weights[a, i] memory[i].

memory [B,N,W], weights [B,A,N].
"""

import torch
from torch import Tensor


def textbook(memory: Tensor, weights: Tensor) -> Tensor:
    """The equation as public code writes it."""
    return torch.einsum("ban,bnw->baw", weights, memory)


def fast_eager(memory: Tensor, weights: Tensor) -> Tensor:
    """The batched product itself."""
    return torch.bmm(weights, memory)
