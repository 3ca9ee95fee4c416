"""Sharpening in eager PyTorch: weights (w + 1e-6)^s, made to sum to 1. weights [B,A,N], sharpness [B,A]."""

import torch
from torch import Tensor

EPS = 1e-6


def textbook(weights: Tensor, sharpness: Tensor) -> Tensor:
    """The equation as papers and public code write it."""
    powers = (weights + EPS) ** sharpness.unsqueeze(-1)
    return powers / powers.sum(-1, keepdim=True)


def fast_eager(weights: Tensor, sharpness: Tensor) -> Tensor:
    """As a softmax, which is one pass; logarithm and product in place."""
    return torch.softmax((weights + EPS).log_().mul(sharpness.unsqueeze(-1)), -1)
