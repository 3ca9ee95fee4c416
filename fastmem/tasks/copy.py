"""Copy: show random bit vectors, then ask for them (Graves et al., "Neural Turing Machines").

For `length` vectors, with `bits` channels of bits; `delimiters="both"` is the encoding of public code, "end" the one of
the paper:

    step, both        step, end          input                                     target        mask
    0                 -                  start flag, channel bits                  0             0
    1 .. length       0 .. length - 1    the vectors                               0             0
    length + 1        length             end flag, channel bits + 1 (end: bits)    0             0
    next length       next length        0                                         the vectors   1
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmem.tasks._task import Batch, Task, at, check_choice, check_range, fair_bits, flags, integers


@dataclass(frozen=True)
class Copy(Task):
    """A source of batches. Lengths are drawn uniformly, limits included."""

    graded = ("length",)

    bits: int = 8
    min_length: int = 1
    max_length: int = 20
    delimiters: str = "both"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("length", self.min_length, self.max_length)
        check_choice("delimiters", self.delimiters, ("both", "end"))

    @property
    def input_size(self) -> int:
        return self.bits + (2 if self.delimiters == "both" else 1)

    @property
    def output_size(self) -> int:
        return self.bits

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        return self.of_lengths(integers(self.min_length, self.max_length, batch_size, generator), generator)

    def of_lengths(self, length: Tensor, generator: torch.Generator | None) -> Batch:
        """A batch of samples of given lengths [B], none above `max_length`."""
        vectors = fair_bits(self.max_length, len(length), self.bits, generator=generator)
        first = 1 if self.delimiters == "both" else 0
        start = first + length + 1
        step = torch.arange(int(start.max() + length.max())).unsqueeze(1)
        shown = (step >= first) & (step < first + length)
        asked = (step >= start) & (step < start + length)
        ended = step == start - 1
        marks = flags((step == 0).expand_as(ended), ended) if self.delimiters == "both" else flags(ended)
        return Batch(
            input=torch.cat([at(vectors, step - first, shown), marks], -1),
            target=at(vectors, step - start, asked),
            mask=asked,
        )


@dataclass(frozen=True)
class LongCopy(Copy):
    """Copy of up to 40 vectors, tested with 199 in Le et al., "Neural Stored-program Memory"."""

    max_length: int = 40
