"""An interface vector made by stored programs, in place of a linear layer: for each head n of P programs

    query_n, strength_n = W_m h + b_m                                   the meta network of all heads: [B,K], [B]
    w_n = softmax_p( softplus(strength_n) D(f(query_n), f(K_np)) )      [B,P], f: the identity or tanh
    xi_n = sum_p w_np (h V_np + c_np)                                   head n's part of the interface vector

Direct attention has no keys: K is P, and w_n = softmax(softplus(strength_n) query_n). The numbers that the meta network
gives are the queries of all heads, then their strengths. Columns of the programs lie head by head; a vector whose heads
are not one run each is put in order by `Programs.order`. Source: Le et al., "Neural Stored-program Memory".
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastmem.reference._interface import softplus, through_softmax, through_softplus
from fastmem.reference.program_lookup import program_lookup, program_lookup_backward
from fastmem.reference.program_mix import program_mix, program_mix_backward

FLAGS = ("direct_attention", "tanh_keys")


class Programs(NamedTuple):
    """How many there are, and how they are found."""

    num_programs: int  # P, of each head
    key_size: int  # K
    runs: tuple[tuple[int, int], ...]  # head and width of each run of the interface vector, in its order
    direct_attention: bool
    tanh_keys: bool
    norm: str
    eps: float

    def encoded(self) -> tuple[list[int], str, list[str], float]:
        """Sizes, norm, names of flags and eps, as a sequence op has them among its options."""
        flags = [name for name in FLAGS if getattr(self, name)]
        return (
            [self.num_programs, self.key_size, *(number for run in self.runs for number in run)],
            self.norm,
            flags,
            self.eps,
        )

    @classmethod
    def decoded(cls, sizes: Sequence[int], norm: str, flags: Sequence[str], eps: float) -> "Programs | None":
        """`encoded` undone; None where there are none."""
        if not sizes:
            return None
        num_programs, key_size, *numbers = sizes
        runs = tuple(zip(numbers[::2], numbers[1::2], strict=True))
        return cls(num_programs, key_size, runs, "direct_attention" in flags, "tanh_keys" in flags, norm, eps)

    def widths(self) -> list[int]:
        """Of each head's part of the interface vector."""
        widths = [0] * (1 + max(head for head, _ in self.runs))
        for head, width in self.runs:
            widths[head] += width
        return widths

    def order(self) -> list[int]:
        """Which column of the programs each number of the interface vector comes from."""
        widths = self.widths()
        following = [end - width for end, width in zip(accumulate(widths), widths, strict=True)]
        columns: list[int] = []
        for head, width in self.runs:
            columns += range(following[head], following[head] + width)
            following[head] += width
        return columns

    def parameter_shapes(self, hidden: int) -> dict[str, tuple[int, ...]]:
        heads, size = len(self.widths()), sum(self.widths())
        return {
            "meta_weight": (heads * (self.key_size + 1), hidden),
            "meta_bias": (heads * (self.key_size + 1),),
            "program_keys": (heads, 0 if self.direct_attention else self.num_programs, self.key_size),
            "program_weights": (self.num_programs, hidden, size),
            "program_biases": (self.num_programs, size),
        }

    def record_shapes(self) -> dict[str, tuple[int, ...]]:
        heads = len(self.widths())
        return {"meta": (heads * (self.key_size + 1),), "attention": (heads, self.num_programs)}


def asked(programs: Programs, meta: Tensor) -> tuple[Tensor, Tensor]:
    """Queries [B,n,K] and strengths [B,n] as the meta network gives them."""
    heads = len(programs.widths())
    queries, strengths = meta.split([heads * programs.key_size, heads], -1)
    return queries.unflatten(-1, (heads, programs.key_size)), strengths


def interface_of(programs: Programs, parameters: Sequence[Tensor], top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The interface vector [B,S], what the meta network gave, and the weights of the programs [B,n,P]."""
    meta_weight, meta_bias, keys, weights, biases = parameters
    meta = linear(top, meta_weight, meta_bias)
    queries, strengths = asked(programs, meta)
    squash = torch.tanh if programs.tanh_keys else torch.nn.Identity()
    parts, attention = [], []
    heads = zip(weights.split(programs.widths(), -1), biases.split(programs.widths(), -1), strict=True)
    for n, stored in enumerate(heads):
        query, strength = queries[:, n], softplus(strengths[:, n])
        if programs.direct_attention:
            attended = torch.softmax(strength.unsqueeze(-1) * query, -1)
            part = program_mix(top, attended, *stored)
        else:
            part, attended = program_lookup(
                top, squash(query), strength, squash(keys[n]), *stored, programs.norm, programs.eps
            )
        parts.append(part)
        attention.append(attended)
    return torch.cat(parts, -1)[:, programs.order()], meta, torch.stack(attention, 1)


def interface_backward(
    grad: Tensor, meta: Tensor, attention: Tensor, programs: Programs, parameters: Sequence[Tensor], top: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the top, and of each parameter."""
    meta_weight, _, keys, weights, biases = parameters
    queries, strengths = asked(programs, meta)
    by_column = torch.empty_like(grad)
    by_column[:, programs.order()] = grad
    grad_top = torch.zeros_like(top)
    grad_queries, grad_strengths, grad_keys = (torch.zeros_like(part) for part in (queries, strengths, keys))
    grad_weights, grad_biases = [], []
    heads = zip(*(part.split(programs.widths(), -1) for part in (by_column, weights, biases)), strict=True)
    for n, (upstream, *of_head) in enumerate(heads):
        query, strength, attended = queries[:, n], softplus(strengths[:, n]), attention[:, n]
        if programs.direct_attention:
            into_top, into_attended, into_weights, into_biases = program_mix_backward(
                upstream, top, attended, of_head[0], of_head[1], [True] * 4
            )
            into_scores = through_softmax(into_attended, attended)
            grad_queries[:, n] = strength.unsqueeze(-1) * into_scores
            into_strength = (into_scores * query).sum(-1)
        else:
            key = keys[n]
            seen = (query.tanh(), key.tanh()) if programs.tanh_keys else (query, key)
            into_top, *into_seen, into_weights, into_biases = program_lookup_backward(
                upstream, None, attended, top, seen[0], strength, seen[1], of_head[0], of_head[1], programs.norm,
                programs.eps, [True] * 6,
            )  # fmt: skip
            into_query, into_strength, into_key = into_seen
            if programs.tanh_keys:
                into_query, into_key = into_query * (1 - seen[0].square()), into_key * (1 - seen[1].square())
            grad_queries[:, n], grad_keys[n] = into_query, into_key
        grad_strengths[:, n] = through_softplus(into_strength, strengths[:, n])
        grad_top = grad_top + into_top
        grad_weights.append(into_weights)
        grad_biases.append(into_biases)
    grad_meta = torch.cat([grad_queries.flatten(1), grad_strengths], -1)
    gradients = [
        grad_meta.mT @ top,
        grad_meta.sum(0),
        grad_keys,
        torch.cat(grad_weights, -1),
        torch.cat(grad_biases, -1),
    ]
    return grad_top + grad_meta @ meta_weight, gradients
