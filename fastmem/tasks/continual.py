"""Continual learning: one task after the other with one network, and what it still knows of the earlier ones.

Le et al., "Neural Stored-program Memory", train on copy, repeat copy, associative recall and priority sort in a row,
each for 20,000 iterations, and measure after each of them `task.accuracy` on all four: 1 - wrong bits / bits asked for.
The sizes in `CONTINUAL`, on which our source is silent, are those of the tasks alone. The bits asked for are those of
the task itself, without the channels that others need: these would be right for nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmem.tasks._task import Batch, Task, check_output
from fastmem.tasks.associative_recall import AssociativeRecall
from fastmem.tasks.copy import Copy
from fastmem.tasks.priority_sort import PrioritySort
from fastmem.tasks.repeat_copy import RepeatCopy

NAMES = ("copy", "repeat-copy", "associative-recall", "priority-sort")


@dataclass(frozen=True)
class Padded(Task):
    """A task with further channels, for a network that others share: 0 in the input, without effect in the output."""

    task: Task
    inputs: int
    outputs: int

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("inputs", self.task.input_size), ("outputs", self.task.output_size)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, those of the task, got {getattr(self, name)}")
        for name in ("loss_unit", "measure"):
            object.__setattr__(self, name, getattr(self.task, name))

    @property
    def input_size(self) -> int:
        return self.inputs

    @property
    def output_size(self) -> int:
        return self.outputs

    @property
    def read_steps(self) -> int | None:
        return self.task.read_steps

    @property
    def levels(self) -> int:
        return self.task.levels

    def lesson(self, level: int) -> Self:
        return replace(self, task=self.task.lesson(level))

    def held_out(self) -> Self:
        return replace(self, task=self.task.held_out())

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return self.task.loss(*self._own(output, batch))

    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        return self.task.errors(*self._own(output, batch))

    def possible_errors(self, batch: Batch) -> Tensor:
        return self.task.possible_errors(self._own(batch.target, batch)[1])

    def answers(self, output: Tensor) -> Tensor:
        own = self.task.output_size
        return pad(self.task.answers(output[..., :own]), (0, self.outputs - own))

    def _own(self, output: Tensor, batch: Batch) -> tuple[Tensor, Batch]:
        """What the task itself knows of an output and a batch."""
        check_output(output, batch)
        input, target = batch.input[..., : self.task.input_size], batch.target[..., : self.task.output_size]
        return output[..., : self.task.output_size], Batch(input, target, batch.mask)

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        input, target, mask = self.task.sample(batch_size, generator)
        return Batch(
            pad(input, (0, self.inputs - self.task.input_size)),
            pad(target, (0, self.outputs - self.task.output_size)),
            mask,
        )


class Phase(NamedTuple):
    """A part of continual learning."""

    task: Padded
    iterations: int


def phases(tasks: Sequence[Task], iterations: int = 20_000) -> list[Phase]:
    """Continual learning of tasks in a row, as wide as the widest input and output among them."""
    inputs, outputs = max(task.input_size for task in tasks), max(task.output_size for task in tasks)
    return [Phase(Padded(task, inputs, outputs), iterations) for task in tasks]


@dataclass(frozen=True)
class Continual(Task):
    """The four tasks as one source of batches: each is a level, and `phase` says whose batches these are."""

    phase: int = 1
    bits: int = 8  # of copy, repeat copy and priority sort
    max_length: int = 20  # of copy
    max_repeated: int = 10  # length of repeat copy
    max_repeats: int = 10
    count_range: tuple[int, int] | None = None  # see RepeatCopy
    recall_bits: int = 6  # of associative recall
    max_items: int = 6
    sort_items: int = 20  # of priority sort
    sort_outputs: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.phase > len(NAMES):
            raise ValueError(f"phase: expected 1 to {len(NAMES)}, got {self.phase}")
        object.__setattr__(self, "count_range", self._repeats.count_range)
        self.tasks  # noqa: B018  # which check what is theirs

    @property
    def tasks(self) -> dict[str, Padded]:
        """The tasks by name, in the order in which they are learned."""
        tasks = [
            Copy(self.bits, max_length=self.max_length),
            self._repeats,
            AssociativeRecall(self.recall_bits, max_items=self.max_items),
            PrioritySort(self.bits, self.sort_items, self.sort_outputs),
        ]
        return dict(zip(NAMES, (phase.task for phase in phases(tasks)), strict=True))

    @property
    def _repeats(self) -> RepeatCopy:
        return RepeatCopy(
            self.bits, max_length=self.max_repeated, max_repeats=self.max_repeats, count="normalised",
            count_range=self.count_range,
        )  # fmt: skip

    @property
    def current(self) -> Padded:
        """The task of the phase."""
        return self.tasks[NAMES[self.phase - 1]]

    @property
    def input_size(self) -> int:
        return self.current.input_size

    @property
    def output_size(self) -> int:
        return self.current.output_size

    @property
    def levels(self) -> int:
        return len(NAMES)

    def lesson(self, level: int) -> Self:
        """The phase of that number."""
        return replace(self, phase=level)

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        return self.current.loss(output, batch)

    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        return self.current.errors(output, batch)

    def possible_errors(self, batch: Batch) -> Tensor:
        return self.current.possible_errors(batch)

    def answers(self, output: Tensor) -> Tensor:
        return self.current.answers(output)

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        return self.current.sample(batch_size, generator)


CONTINUAL = phases([task.task for task in Continual().tasks.values()])
