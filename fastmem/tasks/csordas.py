"""The tasks of Csordas and Schmidhuber, "Improving Differentiable Neural Computers Through Memory Masking,
De-allocation, and Link Distribution Sharpness Control": copies one after the other, recall of blocks, keys and values.

Layouts and loss are those of the published code, where every step counts, also those in which nothing is asked and the
target is 0: the mask is 1 up to the end of a sample. The samples of a published batch all have the same lengths; here,
as in the other tasks, each has its own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmem.tasks._task import Batch, Task, at, check_range, fair_bits, flags, integers


@dataclass(frozen=True)
class BlockCopy(Task):
    """Copy of one block after the other, each of its own length; more bits in all than the memory holds.

    For each block of `length` vectors, which starts where the one before it ended:

        step                        input (bits + 1 channels)    target (bits + 1 channels)
        0 .. length - 1             the vectors                  0
        length                      flag, channel bits           0
        next length                 0                            the vectors
        2 * length + 1              0                            flag, channel bits
    """

    graded = ("length", "blocks")

    bits: int = 8
    min_length: int = 2
    max_length: int = 14
    min_blocks: int = 1
    max_blocks: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("length", self.min_length, self.max_length)
        check_range("blocks", self.min_blocks, self.max_blocks)

    @property
    def input_size(self) -> int:
        return self.bits + 1

    @property
    def output_size(self) -> int:
        return self.bits + 1

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        blocks = integers(self.min_blocks, self.max_blocks, batch_size, generator)
        lengths = torch.randint(
            self.min_length, self.max_length + 1, (self.max_blocks, batch_size), generator=generator
        )
        vectors = fair_bits(self.max_blocks * self.max_length, batch_size, self.bits, generator=generator)
        present = torch.arange(self.max_blocks).unsqueeze(1) < blocks
        ends = ((2 * lengths + 2) * present).cumsum(0)  # [blocks,B]
        step = torch.arange(int(ends[-1].max())).unsqueeze(1)
        block = (step.unsqueeze(0) >= ends.unsqueeze(1)).sum(0)  # [T,B]
        inside, block = block < blocks, block.clamp(max=self.max_blocks - 1)
        length = lengths.gather(0, block)
        within = step - torch.where(block > 0, ends.gather(0, (block - 1).clamp(min=0)), 0)
        shown = inside & (within < length)
        asked = inside & (within > length) & (within <= 2 * length)
        row = block * self.max_length + torch.where(shown, within, within - length - 1)
        return Batch(
            input=torch.cat([at(vectors, row, shown), flags(inside & (within == length))], -1),
            target=torch.cat([at(vectors, row, asked), flags(inside & (within == 2 * length + 1))], -1),
            mask=inside,
        )


@dataclass(frozen=True)
class BlockRecall(Task):
    """Recall of the block that came after a given one.

    For `blocks` of `block_length` vectors each:

        steps             input (bits + 2 channels)                          target (bits + 2 channels)
        block_length      a block                                            0
        1                 flag, channel bits; after the last one bits + 1    0
        ..                the same for each of the other blocks              0
        block_length      any of the blocks but the last                     0
        1                 flag, channel bits + 1                             0
        block_length      0                                                  the block after that one

    The last two channels of the target are always 0.
    """

    graded = ("blocks",)

    bits: int = 8
    block_length: int = 3
    min_blocks: int = 2
    max_blocks: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("blocks", self.min_blocks, self.max_blocks, least=2)

    @property
    def input_size(self) -> int:
        return self.bits + 2

    @property
    def output_size(self) -> int:
        return self.bits + 2

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        long = self.block_length
        blocks = integers(self.min_blocks, self.max_blocks, batch_size, generator)
        query = (torch.rand(batch_size, generator=generator) * (blocks - 1)).long()  # any but the last
        vectors = fair_bits(self.max_blocks * long, batch_size, self.bits, generator=generator)
        listed = blocks * (long + 1)
        start = listed + long + 1
        step = torch.arange(int(start.max()) + long).unsqueeze(1)
        block, within = step // (long + 1), step % (long + 1)
        shown = (step < listed) & (within < long)
        queried = (step >= listed) & (step < listed + long)
        asked = (step >= start) & (step < start + long)
        row = torch.where(shown, block * long + within, query * long + step - listed)
        between = (step < listed - 1) & (within == long)
        return Batch(
            input=torch.cat(
                [at(vectors, row, shown | queried), flags(between, (step == listed - 1) | (step == start - 1))], -1
            ),
            target=pad(at(vectors, (query + 1) * long + step - start, asked), (0, 2)),
            mask=step < start + long,
        )


@dataclass(frozen=True)
class KeyValue(Task):
    """Pairs of a key and a value, then the keys in another order: each asks for its value.

    `two_way`: then the values in yet another order, and each asks for its key. Keys are unique. Values may repeat, so
    that in the second round a question may have several right answers, of which the target is one. For L pairs, with
    half = bits / 2:

        step               input (bits + 1 channels)                  target (half channels)
        0 .. L - 1         a key, then its value                      0
        L                  flag, channel bits                         0
        next L             a key, channels 0 .. half - 1              its value
        2 * L + 1          flag, channel bits (two_way: bits + 1)     0

        two_way, then:     (bits + 2 channels)
        next L             a value, channels 0 .. half - 1            its key
        3 * L + 2          flags, channels bits and bits + 1          0

    The pairs come in any order, a choice of ours: the published code happens to sort them by their keys.
    """

    graded = ("pairs",)

    bits: int = 12
    min_pairs: int = 2
    max_pairs: int = 16
    two_way: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits % 2:
            raise ValueError(f"bits: expected a positive even integer, got {self.bits}")
        check_range("pairs", self.min_pairs, self.max_pairs)
        if self.max_pairs > 2 ** (self.bits // 2):
            raise ValueError(f"max_pairs: expected at most {2 ** (self.bits // 2)} unique keys, got {self.max_pairs}")

    @property
    def input_size(self) -> int:
        return self.bits + (2 if self.two_way else 1)

    @property
    def output_size(self) -> int:
        return self.bits // 2

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        half = self.bits // 2
        pairs = integers(self.min_pairs, self.max_pairs, batch_size, generator)
        numbers = torch.rand(2**half, batch_size, generator=generator).argsort(0)[: self.max_pairs]
        keys = (numbers.unsqueeze(-1) >> torch.arange(half) & 1).float()  # [pairs,B,half]
        values = fair_bits(self.max_pairs, batch_size, half, generator=generator)

        def order() -> Tensor:
            """The pairs of each sample in a random order, the absent ones last, [pairs,B]."""
            draw = torch.rand(self.max_pairs, batch_size, generator=generator)
            absent = torch.arange(self.max_pairs).unsqueeze(1) >= pairs
            return (draw + absent).argsort(0)

        rounds = [(keys, values), (values, keys)] if self.two_way else [(keys, values)]
        end = (len(rounds) + 1) * (pairs + 1)
        step = torch.arange(int(end.max())).unsqueeze(1)
        seen = at(torch.cat([keys, values], -1), step, step < pairs)
        target = torch.zeros(len(step), batch_size, half)
        for turn, (questions, answers) in enumerate(rounds, 1):
            start = turn * (pairs + 1)
            asked = (step >= start) & (step < start + pairs)
            row = order().gather(0, (step - start).clamp(0, self.max_pairs - 1))
            seen = seen + pad(at(questions, row, asked), (0, half))
            target = target + at(answers, row, asked)
        last = step == end - 1
        marks = [(step == turn * (pairs + 1) - 1) | last for turn in range(1, len(rounds) + 1)]
        return Batch(input=torch.cat([seen, flags(*marks)], -1), target=target, mask=step < end)
