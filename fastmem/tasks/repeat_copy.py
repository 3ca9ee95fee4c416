"""Repeat copy: show a pattern of random bits and a count, then ask for the pattern that many times and an end flag.

The encoding of the code published with Graves et al., "Hybrid computing using a neural network with dynamic external
memory". For a pattern of `length` bit vectors and `repeats`, with `bits` channels of bits:

    step                        input (bits + 2 channels)            target (bits + 1 channels)   mask
    0                           start flag, channel bits             0                            0
    1 .. length                 the pattern                          0                            0
    length + 1                  repeats / 10, channel bits + 1       0                            0
    next length * repeats       0                                    the pattern, repeats times   1
    the one after               0                                    end flag, channel bits       1

A batch is as long as its longest sample; the steps after a sample's end are zero and masked.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

REPEATS_SCALE = 10


class Batch(NamedTuple):
    input: Tensor  # [T,B,bits + 2]
    target: Tensor  # [T,B,bits + 1]
    mask: Tensor  # [T,B], 1 where the output counts


@dataclass(frozen=True)
class RepeatCopy:
    """A source of batches. Lengths and repeats are drawn uniformly, limits included."""

    bits: int = 4
    min_length: int = 1
    max_length: int = 2
    min_repeats: int = 1
    max_repeats: int = 2

    def __post_init__(self) -> None:
        if self.bits < 1:
            raise ValueError(f"bits: expected a positive integer, got {self.bits}")
        for name in ("length", "repeats"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if not 1 <= low <= high:
                raise ValueError(f"min_{name}, max_{name}: expected 1 <= min <= max, got {low} and {high}")

    @property
    def input_size(self) -> int:
        return self.bits + 2

    @property
    def output_size(self) -> int:
        return self.bits + 1

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """Draws a batch on the CPU, so that a seed gives the same one everywhere, and moves it to `device`."""
        shape = (batch_size,)
        length = torch.randint(self.min_length, self.max_length + 1, shape, generator=generator)
        repeats = torch.randint(self.min_repeats, self.max_repeats + 1, shape, generator=generator)
        pattern = torch.randint(0, 2, (self.max_length, batch_size, self.bits), generator=generator).to(dtype)

        start = length + 2
        end = start + length * repeats
        step = torch.arange(int(end.max()) + 1 if batch_size else 0).unsqueeze(1)
        shown = (step >= 1) & (step <= length)
        asked = (step >= start) & (step < end)
        row = torch.where(asked, (step - start) % length, (step - 1).clamp(min=0) % length)
        bits = pattern[row, torch.arange(batch_size)]  # [T,B,bits], repeating over the whole sample

        count = (step == length + 1) * repeats.to(dtype) / REPEATS_SCALE
        flags = torch.stack([(step == 0).expand_as(shown).to(dtype), count], -1)
        finish = (step == end).to(dtype).unsqueeze(-1)
        batch = Batch(
            input=torch.cat([bits * shown.unsqueeze(-1), flags], -1),
            target=torch.cat([bits * asked.unsqueeze(-1), finish], -1),
            mask=((step >= start) & (step <= end)).to(dtype),
        )
        return Batch(*(tensor.to(device) for tensor in batch))


def masked_loss(output: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the logits `output` [T,B,bits + 1], summed over the masked steps and bits, mean over samples."""
    loss = binary_cross_entropy_with_logits(output, batch.target, reduction="none")
    return (loss * batch.mask.unsqueeze(-1)).sum((0, 2)).mean()


def bit_errors(output: Tensor, batch: Batch) -> Tensor:
    """Wrong bits of the logits `output` [T,B,bits + 1] in the masked steps, a mean over samples."""
    wrong = (output > 0) != (batch.target > 0.5)
    return (wrong * batch.mask.unsqueeze(-1)).sum((0, 2)).mean()
