"""Scores of content addressing and their gradient, shared by the references that look things up by content.

For a key k, a memory row m_i and a strength s (B batch, A heads, N slots, W word):

    score_i = s * D_i,    D_i = (k . m_i) / (c * a * b_i + delta),    a = length(k), b_i = length(m_i)

    norm   length of x             its gradient                   delta  c
    inner  sqrt(sum x^2 + eps)     x / length                     eps    1
    outer  |x|                     x / length, 0 where x is 0     eps    1
    rsqrt  sqrt(max(sum x^2, eps)) x / length, 0 where the floor  0      1
    clamp  max(|x|, eps)           is reached                     0      1
    width  |x| + eps               x / |x|, 0 where x is 0        eps    W

A key mask multiplies the key and every row. A slot mask that is False makes a score -inf, whatever the row holds.
A row of scores without a finite score is "dead": its weights, reads and gradients are 0.
"""

from typing import NamedTuple

import torch
from torch import Tensor

INFINITY = float("inf")


def _floor(norm: str, eps: float) -> float:
    """The smallest sum of squares that still counts."""
    return {"outer": 0.0, "rsqrt": eps, "clamp": eps * eps, "width": 0.0}[norm]


def _roots(squares: Tensor, norm: str, eps: float) -> Tensor:
    if norm == "inner":
        return (squares + eps).sqrt()
    floor = _floor(norm, eps)
    return torch.where(squares <= floor, floor, squares).sqrt()


def lengths(squares: Tensor, norm: str, eps: float) -> Tensor:
    """Length of a vector from its sum of squares. Autograd gives the table's gradient, at zero too."""
    roots = _roots(squares, norm, eps)
    return roots + eps if norm == "width" else roots


def slopes(squares: Tensor, norm: str, eps: float) -> Tensor:
    """d length / d x = slope * x."""
    slope = _roots(squares, norm, eps).reciprocal()
    return slope if norm == "inner" else torch.where(squares <= _floor(norm, eps), 0.0, slope)


def _count(keys: Tensor, norm: str) -> int:
    """How often the product of two lengths counts."""
    return keys.shape[-1] if norm == "width" else 1


class Comparison(NamedTuple):
    cosine: Tensor  # [B,A,N]
    denominator: Tensor  # [B,A,N]
    key_squares: Tensor  # [B,A,1]
    row_squares: Tensor  # [B or 1,1,N], with a key mask [B,A,N]


def compare(memory: Tensor, keys: Tensor, key_mask: Tensor | None, norm: str, eps: float) -> Comparison:
    """D between every key and every row. The masked lengths come from one product, never from [B,A,N,W]."""
    if key_mask is None:
        product = keys @ memory.mT
        key_squares = keys.square().sum(-1, keepdim=True)
        row_squares = memory.square().sum(-1).unsqueeze(-2)
    else:
        mask = key_mask.square()
        product = (keys * mask) @ memory.mT
        key_squares = (keys.square() * mask).sum(-1, keepdim=True)
        row_squares = mask @ memory.square().mT
    delta = eps if norm in ("inner", "outer", "width") else 0.0
    denominator = _count(keys, norm) * lengths(key_squares, norm, eps) * lengths(row_squares, norm, eps) + delta
    return Comparison(product / denominator, denominator, key_squares, row_squares)


def visible(memory: Tensor, slot_mask: Tensor | None) -> Tensor:
    """Memory with masked rows read as 0, so that nothing they hold reaches a value or a gradient."""
    return memory if slot_mask is None else torch.where(slot_mask.unsqueeze(-1), memory, 0.0)


def silence(
    dead: Tensor, keys: Tensor, strengths: Tensor, key_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys, strengths and key mask with dead rows [B,A or 1,1] set to 0: their gradient is 0, not 0 * inf or NaN."""
    masked = None if key_mask is None else key_mask.masked_fill(dead, 0.0)
    return keys.masked_fill(dead, 0.0), strengths.masked_fill(dead.squeeze(-1), 0.0), masked


def scores(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """Scores [B,A,N], 0 in dead rows, and which rows are dead [B,A,1]. `memory` is visible() already."""
    hidden = None if slot_mask is None else ~slot_mask.unsqueeze(-2)
    if hidden is not None:
        keys, strengths, key_mask = silence(hidden.all(-1, keepdim=True), keys, strengths, key_mask)
    cosine = compare(memory, keys, key_mask, norm, eps).cosine
    products = strengths.unsqueeze(-1) * cosine
    blocked = products == -INFINITY if hidden is None else hidden | (products == -INFINITY)
    dead = blocked.all(-1, keepdim=True)
    # An infinite strength can leave a row dead: there it counts as 0, so that its gradient is 0 and not 0 * inf.
    products = strengths.masked_fill(dead.squeeze(-1), 0.0).unsqueeze(-1) * cosine
    return (products if hidden is None else products.masked_fill(hidden & ~dead, -INFINITY)), dead


def softmax(scores: Tensor, dead: Tensor) -> Tensor:
    return torch.softmax(scores, -1).masked_fill(dead, 0.0)


def sum_over_heads(weights: Tensor, words: Tensor, memory: Tensor) -> Tensor:
    """sum_h weights[b,h,i] words[b,h,:]: [B,N,W], or [1,N,W] summed over the batch too where the memory is shared."""
    if memory.shape[0] == weights.shape[0]:
        return weights.mT @ words
    return (weights.flatten(0, 1).mT @ words.flatten(0, 1)).unsqueeze(0)


def scores_backward(
    grad_scores: Tensor,
    dead: Tensor,
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    norm: str,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of memory, keys, strengths and key mask. With q_i = s * grad_score_i / (c a b_i + delta):

    grad k = m^2 (sum_i q_i m_i - A k),             A = sum_i c q_i D_i b_i slope(k)
    grad m_i = sum_heads q_i k m^2 - B_i m^2 m_i,   B_i = c q_i D_i a slope(m_i)
    grad s = sum_i grad_score_i D_i
    grad m = 2 k m sum_i q_i m_i - A m k^2 - m sum_i B_i m_i^2     (m the key mask, m_i the rows)
    """
    keys, strengths, key_mask = silence(dead, keys, strengths, key_mask)
    grad_scores = grad_scores.masked_fill(dead, 0.0)
    cosine, denominator, key_squares, row_squares = compare(memory, keys, key_mask, norm, eps)
    q = strengths.unsqueeze(-1) * grad_scores / denominator
    turned = _count(keys, norm) * q * cosine
    along_row = turned * lengths(key_squares, norm, eps) * slopes(row_squares, norm, eps)
    along_key = (turned * lengths(row_squares, norm, eps)).sum(-1, keepdim=True) * slopes(key_squares, norm, eps)
    mask = strengths.new_ones(*strengths.shape, 1) if key_mask is None else key_mask.square()

    grad_memory, grad_keys, grad_strengths, grad_key_mask = (keys.new_empty(0) for _ in range(4))
    pulled = q @ memory
    if output_mask[0]:
        grad_memory = sum_over_heads(q, keys * mask, memory) - sum_over_heads(along_row, mask, memory) * memory
    if output_mask[1]:
        grad_keys = mask * (pulled - along_key * keys)
    if output_mask[2]:
        grad_strengths = (grad_scores * cosine).sum(-1)
    if output_mask[3] and key_mask is not None:
        grad_key_mask = key_mask * (2 * keys * pulled - along_key * keys.square() - along_row @ memory.square())
    return grad_memory, grad_keys, grad_strengths, grad_key_mask
