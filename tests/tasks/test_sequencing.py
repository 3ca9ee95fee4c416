"""Sequences of several tasks, taken apart by the table of the module."""

from itertools import pairwise, permutations

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmem.tasks import AssociativeRecall, Copy, PrioritySort, RepeatCopy, Sequencing
from tests.tasks.laws import follows_its_seed, generator, knows_right_from_wrong

ALL = ("copy", "repeat-copy", "associative-recall", "priority-sort")
FIXED = Sequencing(ALL, "drawn", 3, 2, 2, 3, 3, (1, 9), 5, 2, 4, 4, 6, 5)


@pytest.mark.parametrize(
    "task",
    [
        Sequencing(),
        Sequencing(("copy", "associative-recall")),
        Sequencing(("copy", "priority-sort"), sort_items=5, sort_outputs=3),
        Sequencing(ALL),
        FIXED,
    ],
    ids=repr,
)
def test_laws(task):
    follows_its_seed(task)
    knows_right_from_wrong(task)


def test_copy_and_repeat_copy_follow_the_published_table():
    batch = Sequencing().sample(300, generator())
    assert batch.input.shape[2] == 10 and batch.target.shape[2] == 9
    found, ends = set(), []
    for b in range(300):
        input, target = batch.input[:, b], batch.target[:, b]
        order = input[0].tolist()
        assert order in ([1.0] + 9 * [0.0], 9 * [0.0] + [1.0])
        copy_first = order[0] == 1
        starts = [step for step in range(1, len(input)) if input[step, 8] == 1]
        length = starts[1] - starts[0] - 2
        copied, repeated = starts if copy_first else reversed(starts)
        vectors, pattern = (input[at + 1 : at + 1 + length, :8] for at in (copied, repeated))
        count = float(input[repeated + length + 1, 9])
        repeats = round(count * (80 / 12) ** 0.5 + 5)  # of 1 to 9: mean 5, variance (9^2 - 1) / 12
        expected = torch.zeros_like(input)
        expected[0, 0 if copy_first else 9] = 1
        for at, shown, last in ((copied, vectors, 1.0), (repeated, pattern, count)):
            expected[at, 8] = 1
            expected[at + 1 : at + 1 + length, :8] = shown
            expected[at + length + 1, 9] = last
        assert sorted(starts) == [1, 1 + length + 2] and torch.equal(input, expected)
        answers = [torch.zeros(length, 9), torch.zeros(length * repeats + 1, 9)]
        answers[0][:, :8] = vectors
        answers[1][:-1, :8] = pattern.repeat(repeats, 1)
        answers[1][-1, 8] = 1
        asked = torch.cat(answers if copy_first else answers[::-1])
        begin = 1 + 2 * (length + 2)
        end = begin + len(asked)
        assert torch.equal(target[begin:end], asked)
        assert not target[:begin].any() and not target[end:].any()
        step = torch.arange(len(input))
        assert torch.equal(batch.mask[:, b], ((step >= begin) & (step < end)).float())
        found.add((copy_first, length, repeats))
        ends.append(end)
    assert max(ends) == len(batch.mask), "a batch is as long as its longest sample"
    orders, lengths, counts = ({case[i] for case in found} for i in range(3))
    assert orders == {True, False} and lengths == {*range(1, 11)} and counts == {*range(1, 10)}


def answer_of(name: str, shown: Tensor, task: Sequencing) -> Tensor:
    """What a subtask asks for, from what it shows, by its definition."""
    if name == "copy":
        return shown[1:-1, : task.bits]
    if name == "repeat-copy":
        end = torch.zeros(1, task.bits + 1)
        end[0, -1] = 1
        repeated = shown[1:-1, : task.bits].repeat(task.min_repeats, 1)
        return torch.cat([torch.nn.functional.pad(repeated, (0, 1)), end])
    if name == "priority-sort":
        ranked = shown[:, task.bits].argsort(descending=True)[: task.sort_outputs]
        return shown[ranked, : task.bits]
    long = task.item_length
    items = [shown[i * (long + 1) + 1 : (i + 1) * (long + 1), : task.recall_bits] for i in range(task.min_items)]
    query = shown[-long - 1 : -1, : task.recall_bits]
    (answer,) = [after for item, after in pairwise(items) if torch.equal(item, query)]
    return answer


def test_four_tasks_in_any_order():
    """Of fixed sizes, so that where each part lies is known; items of ten bits, of which no two are likely alike."""
    task, shows = FIXED, {"copy": 4, "repeat-copy": 4, "associative-recall": 16, "priority-sort": 6}
    assert (task.input_size, task.output_size) == (7, 5)
    batch, orders = task.sample(200, generator(7)), set()
    assert batch.mask.shape == (1 + 30 + 2 + 7 + 2 + 5, 200) and batch.mask[31:].all() and not batch.mask[:31].any()
    for input, target in zip(batch.input.unbind(1), batch.target.unbind(1), strict=True):
        rank = input[0, [0, 1, 2, 6]]  # the last subtask has the last channel
        assert not input[0, 3:6].any() and torch.allclose(rank.sort().values, torch.arange(4) / 3)
        order = [ALL[i] for i in rank.argsort(descending=True)]
        orders.add(tuple(order))
        step, answers = 1, []
        for name in order:
            shown, step = input[step : step + shows[name]], step + shows[name]
            if name in ("copy", "repeat-copy"):
                assert shown[0].tolist() == [0, 0, 0, 1, 0, 0, 0]
            answer = answer_of(name, shown, task)
            answers.append(torch.nn.functional.pad(answer, (0, 5 - answer.shape[1])))
        assert torch.equal(target[31:], torch.cat(answers)) and not target[:31].any() and not input[31:].any()
    assert orders == {*permutations(ALL)}


def test_more_than_two_are_in_the_order_of_the_list():
    for task in (Sequencing(ALL), Sequencing(order="listed")):
        batch = task.sample(50, generator())
        count = len(task.subtasks)
        expected = torch.zeros(task.input_size)
        expected[: count - 1] = 1 - torch.arange(count - 1) / (count - 1)
        assert torch.allclose(batch.input[0], expected.expand(50, -1))


def test_subtasks_have_the_sizes_that_they_have_alone():
    task = Sequencing(ALL)
    assert task.tasks == (
        Copy(max_length=10),
        RepeatCopy(8, 1, 10, 1, 9, count="normalised"),
        AssociativeRecall(),
        PrioritySort(),
    )
    assert (task.input_size, task.output_size) == (10, 9)
    assert Sequencing(("copy", "priority-sort")).output_size == 8


def test_longer_sequences_and_lessons_count_as_in_training():
    longer = Sequencing(min_length=10, max_length=19, min_repeats=10, max_repeats=14, count_range=[np.int64(1), 9])
    assert longer.count_range == (1, 9)
    counts = longer.sample(200, generator()).input[..., 9].amax(0)
    assert counts.min() >= (10 - 5) / (80 / 12) ** 0.5 - 1e-6 and counts.max() <= (14 - 5) / (80 / 12) ** 0.5 + 1e-6
    task = Sequencing(("repeat-copy", "associative-recall"))
    assert task.levels == 10
    assert task.lesson(7) == Sequencing(
        task.subtasks, min_length=7, max_length=7, min_repeats=7, max_repeats=7, count_range=(1, 9), min_items=6
    )
    assert Sequencing(("associative-recall", "priority-sort")).levels == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"subtasks": ("copy",)}, r"subtasks: expected two or more of copy, .*, each once, got \('copy',\)"),
        ({"subtasks": ("copy", "copy")}, "subtasks: expected two or more of"),
        ({"subtasks": ("copy", "sort")}, "subtasks: expected two or more of"),
        ({"subtasks": "copy"}, "subtasks: expected two or more of"),
        ({"subtasks": 5}, "subtasks: expected two or more of copy, .*, each once, got 5"),
        ({"subtasks": ("copy", ["x"])}, "subtasks: expected two or more of"),
        ({"order": "random"}, "order: expected one of drawn, listed, got 'random'"),
        ({"min_length": 11}, "min_length, max_length: expected 1 <= min <= max, got 11 and 10"),
        ({"min_repeats": 10}, "min_repeats, max_repeats: expected 1 <= min <= max, got 10 and 9"),
        ({"count_range": (3, 2)}, "count_range: expected two integers"),
        ({"subtasks": ALL, "min_items": 1}, "min_items, max_items: expected 2 <= min <= max, got 1 and 6"),
        ({"recall_bits": 0}, "recall_bits: expected a positive integer, got 0"),
        ({"sort_outputs": 21}, "sort_outputs: expected 1 to 20 of the items, got 21"),
        ({"subtasks": ALL, "bits": 1, "recall_bits": 1}, "bits: expected a channel for each of 4 subtasks, got 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Sequencing(**options)
