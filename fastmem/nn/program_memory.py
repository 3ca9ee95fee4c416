"""Stored programs in place of a linear layer, and what keeps them apart in training."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, gumbel_softmax, one_hot

from fastmem import _check, ops
from fastmem.reference._interface import merged, softplus
from fastmem.reference._programs import asked

GAIN = 1.4  # of Xavier's bound, as in the published code
META_BIAS = 0.01  # deviation of the biases of the meta network


class ProgramMemory(nn.Module):
    r"""A linear map that changes with its input: a mixture of P stored programs for each control head, found by key.

    .. math::
        [q_1..q_n; \beta_1..\beta_n] &= W_m h + b_m &
        w_n &= \mathrm{softmax}_p\big(\mathrm{softplus}(\beta_n)\, D(q_n, k_{np})\big) &
        \xi_n &= \sum_p w_{np} (h V_{np} + c_{np})

    The heads are independent: each has keys, programs and a part of the meta network of its own, and makes its own part
    of the output (:func:`fastmem.program_lookup`). In place of the interface of an :class:`NTM`, :class:`DNC` or
    :class:`LRUA` it makes a :class:`NUTM` of it. Source: Le et al. 2020, "Neural Stored-program Memory".

    Args:
        input_size (int): width H of the input.
        output_size (int): width S of the output.
        num_programs (int): P, of each head.
        key_size (int, optional): width K of queries and keys. Default: None, P.
        runs (sequence of pairs, optional): head and width of each run of the output, in its order; heads count from 0.
            Default: None, one head for all.
        direct_attention (bool): a query is a score for each program, :math:`w_n = \mathrm{softmax}(\beta_n q_n)`; K is
            P, and there are no keys. Default: False.
        hard (bool): one program at a time. In training it is drawn by :math:`w_n`, and the gradient goes through the
            draw (straight-through Gumbel-softmax, its noise on the scores; the published code adds it to the weights);
            in evaluation the one of largest weight. Default: False.
        temperature (float): of the draw. Default: 1.
        tanh_keys (bool): queries and keys are compared after a tanh, as in the published code; without effect where
            there are no keys. Default: False.
        norm (str), eps (float, optional): the cosine, see :func:`fastmem.content_addressing`; that of the published
            code is "width", by which scores are K times smaller. Default: "inner".
        author_init (bool): initialised as in the published code, see `reset_parameters`. Default: False.
        device, dtype: of the parameters. float32 or float64.

    Attributes:
        meta (Linear): the meta network, from H to the queries of all heads, then their strengths. keys `[n, P, K]`,
            None with direct attention.
        weights `[P, H, S]` and biases `[P, S]`: the programs, their columns head by head. They are parameters like
        others: the same for all samples and steps.

    Shape: input `[B, H]`, output `[B, S]`.

    Cost: that of P linear layers; the mixed map of a sample is never formed.

    Raises:
        TypeError: for a dtype other than float32 and float64, or options of another type.
        ValueError: for sizes or options that do not fit.

    Example::

        net = fastmem.nn.NTM(10, 100, num_slots=128, word_size=20)
        net.interface = fastmem.nn.ProgramMemory(100, net.interface.out_features, 2, runs=net.interface_runs())
    """

    _shares: list[Tensor] | None = None  # of the calls while somebody watches

    def __init__(
        self,
        input_size: int,
        output_size: int,
        num_programs: int,
        key_size: int | None = None,
        runs: Sequence[tuple[int, int]] | None = None,
        direct_attention: bool = False,
        hard: bool = False,
        temperature: float = 1.0,
        tanh_keys: bool = False,
        norm: str = "inner",
        eps: float | None = None,
        author_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        input_size, output_size = _check.integer("input_size", input_size), _check.integer("output_size", output_size)
        _check.flags(hard=hard, author_init=author_init)
        if not (_check.is_number(temperature) and temperature > 0):
            raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
        self.config = ops.ProgramConfig(num_programs, key_size, direct_attention, tanh_keys, norm, eps)
        self.in_features, self.out_features = input_size, output_size
        self.hard, self.temperature, self.author_init = hard, float(temperature), author_init
        self._programs = self.config.of(_checked_runs(runs, output_size))
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        shapes = self._programs.parameter_shapes(input_size)
        self.meta = nn.Linear(input_size, shapes["meta_bias"][0], **kind)
        keys = None if direct_attention else nn.Parameter(torch.empty(shapes["program_keys"], **kind))
        self.keys: Any  # a Parameter or None
        self.register_parameter("keys", keys)
        self.weights = nn.Parameter(torch.empty(shapes["program_weights"], **kind))
        self.biases = nn.Parameter(torch.empty(shapes["program_biases"], **kind))
        self.reset_parameters()

    @property
    def num_heads(self) -> int:
        """Control heads n, each with programs of its own."""
        return len(self._programs.widths())

    @property
    def is_watched(self) -> bool:
        """Whether somebody watches its calls."""
        return self._shares is not None

    def reset_parameters(self) -> None:
        """Draws the parameters anew.

        The programs uniformly within Xavier's bound, gain 1.4, each head's part of a program by itself; biases are 0;
        keys are orthonormal, or of length 1 where there are more than K. With `author_init` the bound is that of one
        matrix of all that belongs to a head, [P, K + (H + 1) S_n], for keys and biases too.
        """
        nn.init.xavier_uniform_(self.meta.weight, GAIN)
        nn.init.normal_(self.meta.bias, std=META_BIAS)
        count, key_size = self.config.num_programs, self._programs.key_size
        with torch.no_grad():
            parts = zip(*(part.split(self._programs.widths(), -1) for part in (self.weights, self.biases)), strict=True)
            for head, (weights, biases) in enumerate(parts):
                size = weights.shape[-1]
                if self.author_init:
                    bound = GAIN * sqrt(6 / (count + key_size + (self.in_features + 1) * size))
                    for part in (weights, biases, self._keys()[head]):
                        part.uniform_(-bound, bound)
                    continue
                bound = GAIN * sqrt(6 / (self.in_features + size))
                weights.uniform_(-bound, bound)
                biases.zero_()
                if self.keys is None:
                    continue
                if count <= key_size:
                    nn.init.orthogonal_(self.keys[head])
                else:
                    self.keys[head] = nn.functional.normalize(torch.randn_like(self.keys[head]), dim=-1)

    def parameters_in_order(self) -> list[Tensor]:
        """As the ops on whole sequences take them."""
        return [self.meta.weight, self.meta.bias, self._keys(), self.weights, self.biases]

    def _keys(self) -> Tensor:
        """The keys `[n, P, K]`, or with direct attention, which has none, what stands for them in the ops."""
        if self.keys is not None:
            return self.keys
        return self.weights.new_empty(self._programs.parameter_shapes(self.in_features)["program_keys"])

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: not that somebody watches, nor what was seen."""
        return {name: value for name, value in self.__dict__.items() if name != "_shares"}

    def forward(self, input: Tensor) -> Tensor:
        """Applies to every sample its own mixture of programs."""
        if input.dim() != 2 or input.shape[1] != self.in_features:
            raise ValueError(f"input: expected shape [B, {self.in_features}], got {list(input.shape)}")
        output, shares = self.mixed(input)
        if self._shares is not None:
            self._shares.append(torch.stack(shares, 1).detach())
        return output

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Every call inside appends the weights of its programs to the list, `[B, n, P]`."""
        before, self._shares = self._shares, []
        try:
            yield self._shares
        finally:
            if before is not None:
                before += self._shares
            self._shares = before

    def mixed(self, input: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The output `[B, S]`, and the weights of the programs of each head `[B, P]`."""
        queries, raw = asked(self._programs, self.meta(input))
        strengths = softplus(raw)
        widths, outputs, shares, all_keys = self._programs.widths(), [], [], self._keys()
        heads = zip(self.weights.split(widths, -1), self.biases.split(widths, -1), strict=True)
        for head, (weights, biases) in enumerate(heads):
            query, strength, keys = queries[:, head], strengths[:, head], all_keys[head]
            if self.config.tanh_keys:
                query, keys = query.tanh(), keys.tanh()
            if self.hard or self.config.direct_attention:
                share = self._share(query, strength, keys)
                output = ops.program_mix(input, share, weights, biases)
            else:
                output, share = ops.program_lookup(
                    input, query, strength, keys, weights, biases, self.config.norm, self.config.eps
                )
            outputs.append(output)
            shares.append(share)
        # Cut without an index tensor: one would have to survive that a module is built on meta and filled later.
        parts = [
            iter(output.split([width for owner, width in self.runs if owner == head], -1))
            for head, output in enumerate(outputs)
        ]
        return torch.cat([next(parts[head]) for head, _ in self.runs], -1), shares

    def _share(self, query: Tensor, strength: Tensor, keys: Tensor) -> Tensor:
        """The weights of the programs of a head, [B,P]."""
        if self.config.direct_attention:
            share = torch.softmax(strength.unsqueeze(-1) * query, -1)
        else:
            share = ops.content_addressing(
                keys.expand(len(query), -1, -1), query.unsqueeze(1), strength.unsqueeze(1), norm=self.config.norm,
                eps=self.config.eps,
            ).squeeze(1)  # fmt: skip
        if not self.hard:
            return share
        if not self.training:
            return one_hot(share.argmax(-1), share.shape[-1]).to(share.dtype)
        scores = share.clamp_min(torch.finfo(share.dtype).tiny).log()
        return gumbel_softmax(scores, self.temperature, hard=True)

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Head and width of each run of the output, in its order."""
        return self._programs.runs

    def extra_repr(self) -> str:
        return (
            f"{self.in_features}, {self.out_features}, num_programs={self.config.num_programs}, "
            f"key_size={self._programs.key_size}, {self.num_heads} heads"
        )


def _checked_runs(runs: Any, output_size: int) -> tuple[tuple[int, int], ...]:
    if runs is None:
        return ((0, output_size),)
    try:
        pairs = tuple((_check.integer("runs", head, least=0), _check.integer("runs", width)) for head, width in runs)
    except (TypeError, ValueError):
        raise ValueError(f"runs: expected pairs of a head and a width, got {runs!r}") from None
    heads = {head for head, _ in pairs}
    if not pairs or heads != set(range(len(heads))) or sum(width for _, width in pairs) != output_size:
        raise ValueError(
            f"runs: expected heads 0, 1, ... and widths that add up to output_size, {output_size}, got {runs!r}"
        )
    return merged(pairs)


def _mean_over_heads(module: nn.Module, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Of a loss of the keys [P,K], over the heads of each program memory in a module that have two or more; else 0."""
    memories = [part for part in module.modules() if isinstance(part, ProgramMemory)]
    if not memories:
        raise ValueError(f"module: expected one with a ProgramMemory in it, got {type(module).__name__}")
    losses = [loss(keys) for memory in memories if memory.keys is not None for keys in memory.keys if len(keys) > 1]
    return torch.stack(losses).mean() if losses else memories[0].weights.new_zeros(())


def program_diversity_loss(module: nn.Module, mean_over_pairs: bool = False) -> Tensor:
    r"""How alike the keys of stored programs are: :math:`\sum_{i<j} \cos(k_i, k_j)`, the mean over heads.

    Added to the loss with a weight that falls (:func:`program_diversity_weight`), it keeps programs from becoming one:
    equal keys give equal weights, and equal gradients. At its least, -P/2, the keys point away from each other.
    Source: Le et al. 2020, "Neural Stored-program Memory".

    Args:
        module (Module): any with one or more :class:`ProgramMemory` in it.
        mean_over_pairs (bool): the mean over pairs in place of their sum, as in the published code. Default: False.

    Returns:
        A scalar; 0 where no head has two keys.

    Raises:
        ValueError: for a module without a program memory.
    """

    def likeness(keys: Tensor) -> Tensor:
        first, second = torch.tensor(list(combinations(range(len(keys)), 2)), device=keys.device).T
        similar = cosine_similarity(keys[first], keys[second])
        return similar.mean() if mean_over_pairs else similar.sum()

    return _mean_over_heads(module, likeness)


def program_diversity_weight(iteration: int, first: float = 0.1, decay: float = 0.9, every: int = 100) -> float:
    """The weight of :func:`program_diversity_loss` in an iteration, from 0: first * decay ** (iteration / every).

    The published code multiplies before it uses the weight, at every iteration:
    `program_diversity_weight(iteration + 1, every=1)`.
    """
    return first * decay ** (iteration / every)


def program_orthogonality_loss(module: nn.Module) -> Tensor:
    r"""How far the keys of stored programs are from orthonormal: :math:`\|K K^T - 1\|_F`, the mean over heads.

    The second regulariser of the code published with Le et al. 2020, where its weight is 0 by default. Keys that are
    orthonormal up to roundings have a loss and a gradient of 0.

    Args:
        module (Module): any with one or more :class:`ProgramMemory` in it.

    Returns:
        A scalar; 0 where no head has two keys.

    Raises:
        ValueError: for a module without a program memory.
    """

    def distance(keys: Tensor) -> Tensor:
        apart = (keys @ keys.mT - torch.eye(len(keys)).to(keys)).square().sum()
        least = (keys.numel() * torch.finfo(keys.dtype).eps) ** 2
        return torch.where(apart > least, apart.clamp_min(least).sqrt(), 0.0)

    return _mean_over_heads(module, distance)
