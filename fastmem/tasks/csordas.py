"""The tasks of Csordas and Schmidhuber, "Improving Differentiable Neural Computers Through Memory Masking,
De-allocation, and Link Distribution Sharpness Control": copies one after the other, recall of blocks, keys and values.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastmem.tasks._task import Batch, Task, at, check_range, fair_bits, flags, integers


@dataclass(frozen=True)
class BlockCopy(Task):
    """Copy of one block after the other, each of its own length; more bits in all than the memory holds.

    A block: its vectors, a flag on channel bits, then length + 1 steps of 0 in which the target is the vectors and the
    flag, and the mask is 1.
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
            mask=inside & (within > length),
        )


@dataclass(frozen=True)
class BlockRecall(Task):
    """Recall of the block that came after a given one.

    A flag on channel bits lies between blocks of `block_length` vectors and one on channel bits + 1 after the last.
    Then comes one block again, a flag on channel bits + 1, and block_length steps of 0 in which the target is the block
    after that one, and the mask is 1.
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
        return self.bits

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
            target=at(vectors, (query + 1) * long + step - start, asked),
            mask=asked,
        )


@dataclass(frozen=True)
class KeyValue(Task):
    """Pairs of a key and a value, then the keys in another order: each asks for its value.

    `two_way`: then the values in yet another order, and each asks for its key. Keys are unique, and so are values where
    they are asked by. Half of the `bits` channels hold the key, the other half the value; what is asked is 0 in the
    input and alone in the target. A flag on channel bits comes before each round of questions.
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
        return self.bits + 1

    @property
    def output_size(self) -> int:
        return self.bits

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        half = self.bits // 2
        pairs = integers(self.min_pairs, self.max_pairs, batch_size, generator)

        def unique() -> Tensor:
            """Different numbers in each sample, as bits, [pairs,B,half]."""
            numbers = torch.rand(2**half, batch_size, generator=generator).argsort(0)[: self.max_pairs]
            return (numbers.unsqueeze(-1) >> torch.arange(half) & 1).float()

        keys = unique()
        values = unique() if self.two_way else fair_bits(self.max_pairs, batch_size, half, generator=generator)

        def order() -> Tensor:
            """The pairs of each sample in a random order, the absent ones last, [pairs,B]."""
            draw = torch.rand(self.max_pairs, batch_size, generator=generator)
            absent = torch.arange(self.max_pairs).unsqueeze(1) >= pairs
            return (draw + absent).argsort(0)

        rounds = 2 if self.two_way else 1
        end = pairs + rounds * (pairs + 1)
        step = torch.arange(int(end.max())).unsqueeze(1)
        shown, flagged = step < pairs, torch.zeros_like(step < pairs)
        seen, wanted = at(torch.cat([keys, values], -1), step, shown), torch.zeros(*shown.shape, self.bits)
        for turn in range(rounds):
            start = pairs + 1 + turn * (pairs + 1)
            asked = (step >= start) & (step < start + pairs)
            flagged = flagged | (step == start - 1)
            row = order().gather(0, (step - start).clamp(0, self.max_pairs - 1))
            key, value = at(keys, row, asked), at(values, row, asked)
            nothing = torch.zeros_like(key)
            given, missing = ([key, nothing], [nothing, value]) if turn == 0 else ([nothing, value], [key, nothing])
            seen, wanted = seen + torch.cat(given, -1), wanted + torch.cat(missing, -1)
        return Batch(
            input=torch.cat([seen, flags(flagged)], -1),
            target=wanted,
            mask=(step > pairs) & (step < end) & ~flagged,
        )
