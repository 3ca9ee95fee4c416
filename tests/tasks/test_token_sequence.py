"""Sequences of tokens, against the table of the module."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from fastmem.tasks import TokenSequence
from tests.tasks.laws import follows_its_seed, generator, knows_right_from_wrong

TASKS = [
    TokenSequence(),
    TokenSequence("reverse", 7),
    TokenSequence("double", 1, classes=3),
    TokenSequence("add", 9),
    TokenSequence("max", 6),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=repr)


@every_task
def test_laws(task):
    follows_its_seed(task)
    knows_right_from_wrong(task)


@pytest.mark.parametrize(
    ("rule", "data", "made"),
    [
        ("copy", [3, 1, 2], [3, 1, 2]),
        ("reverse", [3, 1, 2], [2, 1, 3]),
        ("double", [3, 1, 2], [3, 1, 2, 3, 1, 2]),
        ("add", [3, 9, 4, 8], [5, 6]),  # (3 + 8) / 2 rounded down, (9 + 4) / 2 too
        ("add", [3, 9, 1, 4, 8], [5, 6]),
        ("max", [3, 9, 4, 1], [9, 4]),
        ("max", [3, 9, 4, 1, 7], [9, 4]),
    ],
)
def test_rules_by_hand(rule, data, made):
    task = TokenSequence(rule, len(data))
    assert task._made_of(torch.tensor(data).unsqueeze(1))[:, 0].tolist() == made


@every_task
def test_steps_follow_the_table(task):
    batch, classes, length = task.sample(40, generator()), task.input_size, task.length
    tokens = batch.input[:length].argmax(-1)
    assert tokens.min() == 1 and tokens.max() <= classes - 1
    made = task._made_of(tokens)
    outputs = {"double": 2 * length, "add": length // 2, "max": length // 2}.get(task.rule, length)
    assert made.shape == (outputs, 40)
    assert len(batch.mask) == task.read_steps + outputs + 1 == length + 1 + outputs + 1
    ends = torch.zeros(1, 40, dtype=torch.long)
    assert torch.equal(batch.input[: length + 1], one_hot(torch.cat([tokens, ends]), classes).float())
    assert torch.equal(batch.target[length + 1 :], one_hot(torch.cat([made, ends]), classes).float())
    assert not batch.input[length + 1 :].any() and not batch.target[: length + 1].any()
    assert torch.equal(batch.mask[:, 0], (torch.arange(len(batch.mask)) > length).float())


def test_the_sizes_of_the_paper():
    batch = TokenSequence().sample(64, generator())
    assert batch.mask.sum(0).eq(51).all() and TokenSequence().read_steps == 51 and len(batch.input) == 102
    assert batch.input[:50].sum((0, 1))[1:].gt(250).all(), "nine tokens, about 356 of each"
    assert TokenSequence("max").input_size == 50 and TokenSequence("add").output_size == 10
    assert TokenSequence("max", 100).sample(64).input[:100].argmax(-1).unique().numel() == 49


def test_loss_and_errors_by_hand():
    """Two data tokens of three classes: the end token has e times the odds of each of the others in every step."""
    task = TokenSequence("copy", 2, classes=3)
    batch = task.sample(5, generator())
    output = torch.tensor([1.0, 0.0, 0.0]).expand_as(batch.target).clone().requires_grad_()
    loss, odds = task.loss(output, batch), math.log(math.e + 2)
    assert loss.item() == pytest.approx((odds + odds + odds - 1) / 3)
    (gradient,) = torch.autograd.grad(loss, output)
    assert torch.equal(gradient.bool().any(-1), batch.mask > 0)
    assert task.errors(output, batch) == 2 and float(task.accuracy(output, batch)) == pytest.approx(1 / 3)
    torch.testing.assert_close(task.answers(output).sum(-1), torch.ones_like(batch.mask))


def test_an_output_of_another_shape_is_an_error():
    task = TokenSequence()
    batch = task.sample(2)
    for judge in (task.loss, task.errors):
        with pytest.raises(ValueError, match=r"output: expected shape \[102, 2, 10\], got \[102, 2, 9\]"):
            judge(batch.target[..., 1:], batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "sort"}, "rule: expected one of copy, reverse, double, add, max, got 'sort'"),
        ({"length": 0}, "length: expected a positive integer, got 0"),
        ({"rule": "max", "length": 1}, "length: expected at least 2 for max, got 1"),
        ({"classes": 1}, "classes: expected an integer of at least 2, got 1"),
        ({"classes": "5"}, "classes: expected a positive integer, got '5'"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        TokenSequence(**options)


def test_sizes_may_be_integers_of_numpy():
    assert type(TokenSequence(classes=np.int64(5)).classes) is int
