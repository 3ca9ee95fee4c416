"""Repeat copy: show a pattern of random bits and a count, then ask for the pattern that many times and an end flag.

For a pattern of `length` bit vectors and `repeats`, with `bits` channels of bits:

    step                        input (bits + 2 channels)            target (bits + 1 channels)   mask
    0                           start flag, channel bits             0                            0
    1 .. length                 the pattern                          0                            0
    length + 1                  the count, channel bits + 1          0                            0
    next length * repeats       0                                    the pattern, repeats times   1
    the one after               0                                    end flag, channel bits       1

The count is repeats / 10 in the code published with Graves et al., "Hybrid computing using a neural network with
dynamic external memory" (`count="tenths"`), and (repeats - mean) / deviation of its uniform distribution in Graves et
al., "Neural Turing Machines" (`count="normalised"`). `count_range` is the range of that distribution where it is not
that of the repeats: a trained network that is tested with more of them counts as it did in training.
"""

from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fastmem import _check
from fastmem.tasks._task import Batch, Task, at, check_choice, check_range, fair_bits, flags, integers


@dataclass(frozen=True)
class RepeatCopy(Task):
    """A source of batches. Lengths and repeats are drawn uniformly, limits included."""

    graded = ("length", "repeats")

    bits: int = 4
    min_length: int = 1
    max_length: int = 2
    min_repeats: int = 1
    max_repeats: int = 2
    count: str = "tenths"
    count_range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("length", self.min_length, self.max_length)
        check_range("repeats", self.min_repeats, self.max_repeats)
        check_choice("count", self.count, ("tenths", "normalised"))
        if self.count_range is not None:
            object.__setattr__(self, "count_range", _check_count_range(self.count_range))

    @property
    def input_size(self) -> int:
        return self.bits + 2

    @property
    def output_size(self) -> int:
        return self.bits + 1

    def lesson(self, level: int) -> Self:
        """See `Task.lesson`; the count means the same at every level."""
        return replace(super().lesson(level), count_range=self.count_range or (self.min_repeats, self.max_repeats))

    def _counted(self, repeats: Tensor) -> Tensor:
        if self.count == "tenths":
            return repeats / 10
        low, high = self.count_range or (self.min_repeats, self.max_repeats)
        deviation = (((high - low + 1) ** 2 - 1) / 12) ** 0.5 or 1.0  # of one choice it is 0
        return (repeats - (high + low) / 2) / deviation

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        return self.of_lengths(integers(self.min_length, self.max_length, batch_size, generator), generator)

    def of_lengths(self, length: Tensor, generator: torch.Generator | None) -> Batch:
        """A batch of samples of given lengths [B], none above `max_length`."""
        repeats = integers(self.min_repeats, self.max_repeats, len(length), generator)
        pattern = fair_bits(self.max_length, len(length), self.bits, generator=generator)
        start = length + 2
        end = start + length * repeats
        step = torch.arange(int(end.max()) + 1).unsqueeze(1)
        shown = (step >= 1) & (step <= length)
        asked = (step >= start) & (step < end)
        count = (step == length + 1) * self._counted(repeats)
        return Batch(
            input=torch.cat([at(pattern, step - 1, shown), flags((step == 0).expand_as(shown), count)], -1),
            target=torch.cat([at(pattern, (step - start) % length, asked), flags(step == end)], -1),
            mask=(step >= start) & (step <= end),
        )


def _check_count_range(count_range: Any) -> tuple[int, int]:
    try:
        low, high = (_check.integer("count_range", limit) for limit in count_range)
    except (TypeError, ValueError):
        low, high = 1, 0
    if low > high:
        raise ValueError(f"count_range: expected two integers, 1 <= low <= high, got {count_range!r}")
    return low, high
