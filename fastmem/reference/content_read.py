"""Content read: the mean of the memory rows under content addressing, and the log of its normaliser.

    weights[b,a,i] = softmax_i(score[b,a,i]),   score[b,a,i] = strengths[b,a] * D(keys[b,a], memory[b,i])
    reads[b,a,:] = sum_i weights[b,a,i] memory[b,i,:]      [B,A,W]
    logsumexp[b,a] = log sum_i exp(score[b,a,i])           [B,A], not differentiable

memory [B or 1,N,W] (1: a bank shared by the batch), keys [B,A,W], strengths [B,A], key_mask [B,A,W] or None, slot_mask
[B or 1,N] bool or None. The bank may be bfloat16 or float16 when the rest is float32; its gradient has its dtype.
D, the norms and the special scores are those of `_similarity`. Source: Graves et al., "Neural Turing Machines" and
"Hybrid computing using a neural network with dynamic external memory". The weights are formed here, for clarity.
"""

import torch
from torch import Tensor

from fastmem.reference._similarity import INFINITY, scores, scores_backward, softmax, sum_over_heads, visible


def content_read(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rows = visible(memory.to(keys.dtype), slot_mask)
    score, dead = scores(rows, keys, strengths, key_mask, slot_mask, norm, eps)
    logsumexp = score.detach().logsumexp(-1).masked_fill(dead.squeeze(-1), -INFINITY)
    # A +inf score makes its row NaN, here as in the weights.
    return softmax(score, dead) @ rows, logsumexp.masked_fill(logsumexp == INFINITY, float("nan"))


def content_read_backward(
    grad_reads: Tensor,
    reads: Tensor,
    logsumexp: Tensor,
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of memory, keys, strengths and key_mask; an unwanted or absent one is a size-0 tensor.

    With grad_weights_i = grad_reads . m_i the softmax's mean sum_i weights_i grad_weights_i is grad_reads . reads.
    """
    rows = visible(memory.to(keys.dtype), slot_mask)
    score, dead = scores(rows, keys, strengths, key_mask, slot_mask, norm, eps)
    weights = (score - logsumexp.unsqueeze(-1)).exp().masked_fill(dead, 0.0)
    grad_reads = grad_reads.masked_fill(dead, 0.0)
    grad_scores = weights * (grad_reads @ rows.mT - (grad_reads * reads).sum(-1, keepdim=True))
    grad_memory, grad_keys, grad_strengths, grad_key_mask = scores_backward(
        grad_scores, dead, rows, keys, strengths, key_mask, norm, eps, output_mask
    )
    if output_mask[0]:
        grad_memory = visible(grad_memory + sum_over_heads(weights, grad_reads, rows), slot_mask)
        shared = memory.shape[0] == 1
        grad_memory = (grad_memory.sum(0, keepdim=True) if shared else grad_memory).to(memory.dtype)
    else:
        grad_memory = torch.empty(0, dtype=memory.dtype, device=memory.device)
    return grad_memory, grad_keys, grad_strengths, grad_key_mask
