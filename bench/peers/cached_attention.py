"""Additive attention over a small cache in eager PyTorch, with the projections made by the caller.

query [B,A], keys [B,L,A], cache [B,L,H], score_weights [A] -> attended [B,H], weights [B,L].
"""

import torch
from torch import Tensor


def textbook(query: Tensor, keys: Tensor, cache: Tensor, score_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The equations as public code writes them."""
    energies = torch.tanh(query.unsqueeze(1) + keys)
    weights = torch.softmax((energies * score_weights).sum(-1), dim=-1)
    return (weights.unsqueeze(-1) * cache).sum(1), weights


def fast_eager(query: Tensor, keys: Tensor, cache: Tensor, score_weights: Tensor) -> tuple[Tensor, Tensor]:
    """The tangents in place, the scores by one product for all samples, the sum of entries by a batched one."""
    energies = torch.add(query.unsqueeze(1), keys).tanh_()
    weights = torch.softmax(torch.mv(energies.view(-1, energies.shape[-1]), score_weights).view(keys.shape[:2]), -1)
    return torch.bmm(weights.unsqueeze(1), cache).squeeze(1), weights
