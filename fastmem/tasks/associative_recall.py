"""Associative recall: show items, then one of them again, and ask for the item that came after it.

An item is `item_length` vectors of `bits` bits. Steps of a sample (Graves et al., "Neural Turing Machines"):

    for each item: a delimiter (channel bits), then its vectors
    a query delimiter (channel bits + 1), the vectors of one item but the last, a query delimiter
    item_length steps of 0: the target is the item after that one, and the mask is 1
"""

from dataclasses import dataclass

import torch

from fastmem.tasks._task import Batch, Task, at, check_range, fair_bits, flags, integers


@dataclass(frozen=True)
class AssociativeRecall(Task):
    """A source of batches. The number of items is drawn uniformly, limits included, and so is the item asked for."""

    graded = ("items",)

    bits: int = 6
    item_length: int = 3
    min_items: int = 2
    max_items: int = 6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("items", self.min_items, self.max_items, least=2)

    @property
    def input_size(self) -> int:
        return self.bits + 2

    @property
    def output_size(self) -> int:
        return self.bits

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        long = self.item_length
        items = integers(self.min_items, self.max_items, batch_size, generator)
        query = (torch.rand(batch_size, generator=generator) * (items - 1)).long()  # any but the last
        vectors = fair_bits(self.max_items * long, batch_size, self.bits, generator=generator)
        listed = items * (long + 1)  # steps of the items; the query delimiter comes next
        start = listed + long + 2
        step = torch.arange(int(start.max()) + long).unsqueeze(1)
        item, within = step // (long + 1), step % (long + 1)
        shown = (step < listed) & (within > 0)
        queried = (step > listed) & (step <= listed + long)
        asked = (step >= start) & (step < start + long)
        row = torch.where(shown, item * long + within - 1, query * long + step - listed - 1)
        return Batch(
            input=torch.cat(
                [
                    at(vectors, row, shown | queried),
                    flags((step < listed) & (within == 0), (step == listed) | (step == listed + long + 1)),
                ],
                -1,
            ),
            target=at(vectors, (query + 1) * long + step - start, asked),
            mask=asked,
        )
