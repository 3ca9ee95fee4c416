"""Dynamic N-grams: predict each next bit of a source whose probabilities depend on the last `context` bits.

Each sample has its own table of 2^context probabilities, drawn from Beta(1/2, 1/2). The first `context` bits are fair,
the others come from the table. At every step the input is a bit and the target the next one; the mask is 1 where the
next one comes from the table (Graves et al., "Neural Turing Machines").

No output is right for sure, so the count of wrong bits says little. The paper reports the loss in bits per sequence
beside that of the best predictor, which counts what came after each context::

    task = DynamicNGrams()
    batch = task.sample(1000)
    costs = task.costs(model(batch.input)[0], batch)
    costs.model, costs.optimal
"""

from dataclasses import dataclass
from math import log, pi
from typing import NamedTuple

import torch
from torch import Tensor

from fastmem.tasks._task import Batch, Task, masked_loss


class Costs(NamedTuple):
    """Losses in bits per sequence, means over the samples of one batch, each of no dimension."""

    model: Tensor
    optimal: Tensor  # of the best predictor that does not know the table; on average no model is below


@dataclass(frozen=True)
class DynamicNGrams(Task):
    """A source of batches of `length` bits, hence length - 1 steps."""

    context: int = 5
    length: int = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.length <= self.context:
            raise ValueError(f"length: expected more than the context of {self.context}, got {self.length}")

    @property
    def input_size(self) -> int:
        return 1

    @property
    def output_size(self) -> int:
        return 1

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        # Beta(1/2, 1/2) is the arcsine distribution.
        table = torch.sin(torch.rand(2**self.context, batch_size, generator=generator) * pi / 2) ** 2
        chance = torch.rand(self.length, batch_size, generator=generator)
        sample = torch.arange(batch_size)
        bits: list[Tensor] = []
        for step in range(self.length):
            one = 0.5 if step < self.context else table[self._index(bits[-self.context :]), sample]
            bits.append(chance[step] < one)
        sequence = torch.stack(bits).float().unsqueeze(-1)
        known = (torch.arange(1, self.length) >= self.context).float().unsqueeze(1)
        return Batch(sequence[:-1], sequence[1:], known.expand(-1, batch_size))

    @staticmethod
    def _index(context: list[Tensor]) -> Tensor:
        index = torch.zeros_like(context[0], dtype=torch.long)
        for bit in context:
            index = 2 * index + bit
        return index

    def optimal_loss(self, batch: Batch) -> Tensor:
        """The loss of the best predictor that does not know the table, p(1) = (N1 + 1/2) / (N0 + N1 + 1), in nats."""
        bits = torch.cat([batch.input[:1], batch.target])[..., 0] > 0.5
        sample = torch.arange(bits.shape[1], device=bits.device)
        counts = torch.zeros(2, 2**self.context, bits.shape[1], device=bits.device)
        loss = torch.zeros(bits.shape[1], device=bits.device)
        for step in range(self.context, len(bits)):
            index, bit = self._index([*bits[step - self.context : step]]), bits[step].long()
            seen = counts[:, index, sample]
            loss -= torch.log((seen[bit, sample] + 0.5) / (seen.sum(0) + 1))
            counts[bit, index, sample] += 1
        return loss.mean()

    def costs(self, output: Tensor, batch: Batch) -> Costs:
        """The loss of the logits `output` [T,B,1] beside that of the best predictor, as the paper reports them."""
        return Costs(masked_loss(output, batch) / log(2), self.optimal_loss(batch) / log(2))
