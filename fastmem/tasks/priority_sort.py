"""Priority sort: show vectors of random bits with a priority each, ask for the highest in descending order.

`items` steps show a vector and its priority, uniform in [-1, 1], on channel bits; then `outputs` steps of 0 ask for the
vectors of highest priority, highest first (Graves et al., "Neural Turing Machines").
"""

from dataclasses import dataclass, replace
from typing import Self

import torch

from fastmem.tasks._task import Batch, Task, check_level, fair_bits


@dataclass(frozen=True)
class PrioritySort(Task):
    """A source of batches."""

    bits: int = 8
    items: int = 20
    outputs: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.outputs > self.items:
            raise ValueError(f"outputs: expected 1 to {self.items} of the items, got {self.outputs}")

    @property
    def input_size(self) -> int:
        return self.bits + 1

    @property
    def output_size(self) -> int:
        return self.bits

    @property
    def levels(self) -> int:
        return self.items

    def lesson(self, level: int) -> Self:
        """As many items as the level, and the same part of them, rounded up, is asked for."""
        check_level(level, self.levels)
        return replace(self, items=level, outputs=-(-self.outputs * level // self.items))

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        vectors = fair_bits(self.items, batch_size, self.bits, generator=generator)
        priority = 2 * torch.rand(self.items, batch_size, 1, generator=generator) - 1
        order = priority.argsort(0, descending=True)[: self.outputs].expand(-1, -1, self.bits)
        quiet, unasked = (torch.zeros(steps, batch_size, self.bits) for steps in (self.outputs, self.items))
        return Batch(
            input=torch.cat([torch.cat([vectors, priority], -1), torch.cat([quiet, quiet[..., :1]], -1)]),
            target=torch.cat([unasked, vectors.gather(0, order)]),
            mask=torch.cat([unasked[..., 0], torch.ones(self.outputs, batch_size)]),
        )
