"""Additive attention over a small cache of vectors.

    scores[b,j] = sum_a score_weights[a] tanh(query[b,a] + keys[b,j,a])
    weights[b,:] = softmax_j(scores[b,j])                                  [B,L]
    attended[b,:] = sum_j weights[b,j] cache[b,j,:]                        [B,H]

query [B,A], keys [B,L,A], cache [B,L,H], score_weights [A], mask [B,L] bool or None. An entry whose mask is False takes
no part, whatever it holds. A sample without a score above -inf is "dead": its weights, what it attends to and its
gradients are 0. Source: Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and Translate", as
used over the last hidden states by Le et al., "Learning to Remember More with Less Memorization", where query is
W h + V r, keys are U d and the cache is d.
"""

import torch
from torch import Tensor

from fastmem.reference._similarity import INFINITY, softmax, visible


def activations(query: Tensor, keys: Tensor, mask: Tensor | None) -> Tensor:
    """tanh(query + keys), [B,L,A], that of nothing but zeros where no entry takes part."""
    if mask is not None:
        query = query.masked_fill(~mask.any(-1, keepdim=True), 0.0)
    return torch.tanh(query.unsqueeze(1) + visible(keys, mask))


def scores(active: Tensor, score_weights: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scores [B,L], 0 in dead samples, and which samples are dead [B,1]."""
    products = active @ score_weights
    blocked = products == -INFINITY if mask is None else ~mask | (products == -INFINITY)
    dead = blocked.all(-1, keepdim=True)
    # Infinite score weights can leave a sample dead: there they count as 0, so that gradients are 0 and not 0 * inf.
    products = (active @ score_weights.masked_fill(dead, 0.0).unsqueeze(-1)).squeeze(-1)
    return (products if mask is None else products.masked_fill(~mask & ~dead, -INFINITY)), dead


def cached_attention(
    query: Tensor, keys: Tensor, cache: Tensor, score_weights: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    weights = softmax(*scores(activations(query, keys, mask), score_weights, mask))
    return (weights.unsqueeze(1) @ visible(cache, mask)).squeeze(1), weights


def cached_attention_backward(
    grad_attended: Tensor | None,
    grad_weights: Tensor | None,
    weights: Tensor,
    query: Tensor,
    keys: Tensor,
    cache: Tensor,
    score_weights: Tensor,
    mask: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, keys, cache and score_weights; an unwanted one is a size-0 tensor.

    With t_j = tanh(query + keys_j), g_j = cache_j . grad_attended + grad_weights_j and
    z_j = weights_j (g_j - sum_i weights_i g_i), the gradient of the scores:

    grad keys_j = z_j score_weights (1 - t_j^2),   grad query = sum_j grad keys_j
    grad score_weights = sum_bj z_j t_j,           grad cache_j = weights_j grad_attended
    """
    dead = (weights == 0).all(-1, keepdim=True)
    if grad_attended is None:
        grad_attended = cache.new_zeros(cache.shape[0], cache.shape[2])
    grad_attended = grad_attended.masked_fill(dead, 0.0)
    into_weights = (visible(cache, mask) @ grad_attended.unsqueeze(-1)).squeeze(-1)
    if grad_weights is not None:
        into_weights = into_weights + grad_weights
    z = weights * (into_weights - (weights * into_weights).sum(-1, keepdim=True))
    z = z.masked_fill(dead, 0.0).unsqueeze(-1)

    active = activations(query, keys, mask)
    through = z * score_weights.masked_fill(dead, 0.0).unsqueeze(1) * (1 - active.square())
    grad_query, grad_keys, grad_cache, grad_score_weights = (query.new_empty(0) for _ in range(4))
    if output_mask[0]:
        grad_query = through.sum(1)
    if output_mask[1]:
        grad_keys = visible(through, mask)
    if output_mask[2]:
        grad_cache = visible(weights.unsqueeze(-1) * grad_attended.unsqueeze(1), mask)
    if output_mask[3]:
        grad_score_weights = (z * active).sum((0, 1))
    return grad_query, grad_keys, grad_cache, grad_score_weights
