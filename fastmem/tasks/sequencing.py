"""Sequencing: several tasks in one sequence, first what each of them shows and then what each asks for.

From Le et al., "Neural Stored-program Memory", and the code published with it, which has copy and repeat copy. Steps of
a sample:

    step                     input                                            target                   mask
    0                        the order                                        0                        0
    next                     what the first shows, as in a task of its own    0                        0
    ..                       the same for each of the others                  0                        0
    next                     0                                                what the first asks for  1
    ..                       0                                                the same for the others  1

Inputs and targets are as wide as the widest among the tasks, and 0 on the channels that a task does not have. With k
tasks, the one listed at i < k - 1 has channel i of step 0, and the last one the last channel. It holds 1 for the task
that comes first, 0 for the one that comes last, and equal distances between: of two tasks the published flags. One
length is drawn for a sample, that of its copy and of its repeat copy.

Ours, where our source is silent: where `order` says nothing else, that of two tasks is drawn, as in the published code,
and of more it is that of the list; associative recall and priority sort have the sizes that they have alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import pad

from fastmem.tasks._task import Batch, Task, at, check_choice, check_range, integers
from fastmem.tasks.associative_recall import AssociativeRecall
from fastmem.tasks.copy import Copy
from fastmem.tasks.priority_sort import PrioritySort
from fastmem.tasks.repeat_copy import RepeatCopy

SUBTASKS = ("copy", "repeat-copy", "associative-recall", "priority-sort")


@dataclass(frozen=True)
class Sequencing(Task):
    """A source of batches. Counts are normalised; `count_range` is that of `RepeatCopy`."""

    subtasks: tuple[str, ...] = ("copy", "repeat-copy")
    order: str | None = None  # drawn, or listed; None: drawn of two subtasks
    bits: int = 8  # of copy, repeat copy and priority sort
    min_length: int = 1  # of copy and repeat copy
    max_length: int = 10
    min_repeats: int = 1
    max_repeats: int = 9
    count_range: tuple[int, int] | None = None
    recall_bits: int = 6  # of associative recall
    item_length: int = 3
    min_items: int = 2
    max_items: int = 6
    sort_items: int = 20  # of priority sort
    sort_outputs: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "subtasks", _check_subtasks(self.subtasks))
        check_range("length", self.min_length, self.max_length)
        if self.order is not None:
            check_choice("order", self.order, ("drawn", "listed"))
        if self.sort_outputs > self.sort_items:
            raise ValueError(f"sort_outputs: expected 1 to {self.sort_items} of the items, got {self.sort_outputs}")
        for task in self.tasks:  # which check what is theirs
            if isinstance(task, RepeatCopy):
                object.__setattr__(self, "count_range", task.count_range)
        if len(self.subtasks) > self.input_size:
            raise ValueError(f"bits: expected a channel for each of {len(self.subtasks)} subtasks, got {self.bits}")

    @property
    def tasks(self) -> tuple[Task, ...]:
        """Those of which a sequence is made, as they are listed."""
        made: dict[str, Task] = {
            "copy": Copy(self.bits, self.min_length, self.max_length),
            "repeat-copy": RepeatCopy(
                self.bits, self.min_length, self.max_length, self.min_repeats, self.max_repeats,
                count="normalised", count_range=self.count_range,
            ),
            "associative-recall": AssociativeRecall(
                self.recall_bits, self.item_length, self.min_items, self.max_items
            ),
            "priority-sort": PrioritySort(self.bits, self.sort_items, self.sort_outputs),
        }  # fmt: skip
        return tuple(made[name] for name in self.subtasks)

    @property
    def input_size(self) -> int:
        return max(task.input_size for task in self.tasks)

    @property
    def output_size(self) -> int:
        return max(task.output_size for task in self.tasks)

    def _limits(self) -> dict[str, tuple[int, int]]:
        """What is graded in any of the subtasks; a sort is as long at every level."""
        return {name: limits for task in self.tasks for name, limits in task._limits().items()}

    def lesson(self, level: int) -> Self:
        """See `Task.lesson`; the count means the same at every level."""
        return replace(super().lesson(level), count_range=self.count_range or (self.min_repeats, self.max_repeats))

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        length = integers(self.min_length, self.max_length, batch_size, generator)
        batches = [
            task.of_lengths(length, generator)
            if isinstance(task, Copy | RepeatCopy)
            else task.sample(batch_size, generator)
            for task in self.tasks
        ]
        place = self._places(batch_size, generator)
        shown, asked = (torch.stack(steps) for steps in zip(*(_parts(batch.mask) for batch in batches), strict=True))
        start = 1 + shown.sum(0)  # of the answers
        end = start + asked.sum(0)
        step = torch.arange(int(end.max())).unsqueeze(1)
        input = torch.zeros(len(step), batch_size, self.input_size)
        target = torch.zeros(len(step), batch_size, self.output_size)
        shown_from, asked_from = 1 + _before(shown, place), start + _before(asked, place)
        channels = [*range(len(batches) - 1), self.input_size - 1]
        input[0, :, channels] = 1 - place.T / (len(batches) - 1)
        for i, batch in enumerate(batches):
            row = step - shown_from[i]
            seen = at(batch.input, row, (row >= 0) & (row < shown[i]))
            input += pad(seen, (0, self.input_size - seen.shape[-1]))
            row = step - asked_from[i]
            answer = at(batch.target, row + shown[i], (row >= 0) & (row < asked[i]))
            target += pad(answer, (0, self.output_size - answer.shape[-1]))
        return Batch(input, target, (step >= start) & (step < end))

    def _places(self, batch_size: int, generator: torch.Generator | None) -> Tensor:
        """Where in its sequence each subtask comes, from 0, [subtasks,B]."""
        count = len(self.subtasks)
        if self.order == "drawn" or (self.order is None and count == 2):
            return torch.rand(count, batch_size, generator=generator).argsort(0)
        return torch.arange(count).unsqueeze(1).expand(-1, batch_size)


def _parts(mask: Tensor) -> tuple[Tensor, Tensor]:
    """How many steps of each sample show something, and how many after these ask for something, [B] both."""
    return mask.int().argmax(0), mask.int().sum(0)


def _before(steps: Tensor, place: Tensor) -> Tensor:
    """Of each subtask, how many of the steps [subtasks,B] belong to those that come before it, [subtasks,B]."""
    earlier = place.unsqueeze(0) < place.unsqueeze(1)
    return (earlier * steps).sum(1)


def _check_subtasks(names: tuple[str, ...]) -> tuple[str, ...]:
    known = isinstance(names, Sequence) and not isinstance(names, str) and all(name in [*SUBTASKS] for name in names)
    if not known or len(names) < 2 or len({*names}) < len(names):
        raise ValueError(f"subtasks: expected two or more of {', '.join(SUBTASKS)}, each once, got {names!r}")
    return tuple(names)
