"""Content read in eager PyTorch: the addressed words, reads = weights @ memory.

memory [B or 1,N,W], keys [B,A,W], strengths [B,A] -> reads [B,A,W].
"""

import torch
from torch import Tensor

from bench.peers import content_addressing
from bench.peers.content_addressing import EPS


def textbook(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    memory = memory.expand(keys.shape[0], -1, -1)
    weights = content_addressing.textbook(memory, keys, strengths)
    return torch.einsum("ban,bnw->baw", weights, memory)


def fast_eager(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """Fast addressing, then one batched product. A shared bank folds the batch into the heads: one large product."""
    batch = keys.shape[0]
    if memory.shape[0] != batch:
        keys, strengths = keys.reshape(1, -1, keys.shape[-1]), strengths.reshape(1, -1)
    reads = torch.bmm(content_addressing.fast_eager(memory, keys, strengths), memory)
    return reads.reshape(batch, -1, memory.shape[-1])


def attention(memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
    """As scaled_dot_product_attention over unit rows; leaves out the 1e-6 that the norm rule adds to the product."""
    length = torch.linalg.vector_norm(memory, dim=-1, keepdim=True)
    unit_memory = memory / torch.sqrt(length.square() + EPS)
    queries = keys * (strengths * torch.rsqrt(keys.square().sum(-1) + EPS)).unsqueeze(-1)
    if memory.shape[0] != keys.shape[0]:
        queries = queries.reshape(1, -1, keys.shape[-1])
    reads = torch.nn.functional.scaled_dot_product_attention(queries, unit_memory, memory, scale=1.0)
    return reads.reshape(keys.shape)
