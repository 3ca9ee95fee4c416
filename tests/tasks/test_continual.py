"""Tasks of different widths for one network, one after the other."""

import pytest
import torch

from fastmem.tasks import (
    CONTINUAL,
    AssociativeRecall,
    Continual,
    Copy,
    KeyValue,
    Padded,
    PrioritySort,
    RepeatCopy,
    TokenSequence,
    phases,
)
from tests.tasks.laws import follows_its_seed, generator, knows_right_from_wrong


def test_the_phases_of_the_paper():
    tasks = [Copy(), RepeatCopy(8, 1, 10, 1, 10, count="normalised"), AssociativeRecall(), PrioritySort()]
    assert [phase.task.task for phase in CONTINUAL] == tasks
    assert {phase.iterations for phase in CONTINUAL} == {20_000}
    assert {(phase.task.input_size, phase.task.output_size) for phase in CONTINUAL} == {(10, 9)}
    for phase in CONTINUAL:
        follows_its_seed(phase.task)
    assert [phase.iterations for phase in phases(tasks, 7)] == [7] * 4


@pytest.mark.parametrize("task", [AssociativeRecall(), TokenSequence("copy", 3, 5)], ids=repr)
def test_what_is_added_is_zero_and_without_effect(task):
    padded = Padded(task, task.input_size + 2, task.output_size + 3)
    plain, wide = task.sample(6, generator()), padded.sample(6, generator())
    width = task.output_size
    assert torch.equal(wide.input[..., :-2], plain.input) and not wide.input[..., -2:].any()
    assert torch.equal(wide.target[..., :-3], plain.target) and not wide.target[..., -3:].any()
    assert torch.equal(wide.mask, plain.mask)
    output = torch.randn(wide.target.shape, generator=generator(1))
    for name in ("loss", "errors", "accuracy"):
        assert torch.equal(getattr(padded, name)(output, wide), getattr(task, name)(output[..., :width], plain))
    assert padded.possible_errors(wide) == task.possible_errors(plain)
    assert torch.equal(padded.answers(output)[..., :width], task.answers(output[..., :width]))
    assert (padded.measure, padded.loss_unit, padded.read_steps) == (task.measure, task.loss_unit, task.read_steps)
    with pytest.raises(ValueError, match=r"output: expected shape \[.*\], got \["):
        padded.loss(output[..., :width], wide)


def test_accuracy_is_one_minus_wrong_bits_of_all_that_are_asked_for():
    task = Padded(Copy(2, 3, 3), 6, 4)
    knows_right_from_wrong(task.task)
    batch = task.sample(10, generator())
    output = (2 * batch.target - 1).clone()
    output[-1, :5, 0] *= -1  # five bits of sixty
    output[..., 2:] = 99
    assert float(task.accuracy(output, batch)) == pytest.approx(1 - 5 / 60)


def test_continual_learning_as_one_task():
    task = Continual()
    assert [*task.tasks.values()] == [phase.task for phase in CONTINUAL] and task.levels == 4
    for level, phase in enumerate(CONTINUAL, 1):
        lesson, same = task.lesson(level), generator()
        assert lesson == Continual(phase=level) and (lesson.input_size, lesson.output_size) == (10, 9)
        batch, expected = lesson.sample(3, generator()), phase.task.sample(3, same)
        assert torch.equal(batch.input, expected.input) and torch.equal(batch.target, expected.target)
        output = torch.randn(batch.target.shape, generator=generator(1))
        for name in ("loss", "errors", "accuracy"):
            assert torch.equal(getattr(lesson, name)(output, batch), getattr(phase.task, name)(output, batch))
        assert torch.equal(lesson.answers(output), phase.task.answers(output))
    repeats = Continual(max_repeats=12, count_range=(1, 10)).tasks["repeat-copy"].task
    assert isinstance(repeats, RepeatCopy) and repeats.count_range == (1, 10)
    with pytest.raises(ValueError, match="phase: expected 1 to 4, got 5"):
        Continual(phase=5)
    with pytest.raises(ValueError, match="outputs: expected 1 to 3 of the items, got 16"):
        Continual(sort_items=3)


def test_lessons_are_those_of_the_task():
    task = Padded(KeyValue(), 20, 10)
    assert task.levels == KeyValue().levels and task.lesson(2) == Padded(KeyValue().lesson(2), 20, 10)
    assert task.held_out() == task


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((9, 8), "inputs: expected at least 10, those of the task, got 9"),
        ((10, 7), "outputs: expected at least 8, those of the task, got 7"),
        ((0, 8), "inputs: expected a positive integer, got 0"),
    ],
)
def test_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        Padded(Copy(), *sizes)
