"""When a network writes: the published schedules, and the intervals that remember most."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmem.nn import WriteSchedule, contribution_bound, optimal_intervals
from fastmem.nn.write_schedule import RULES

DECAYS = [0.5, 0.9, 1.0, 1.1]


def chosen(rule, length, slots, **options):
    """The steps of a schedule, counted from 0."""
    steps = WriteSchedule(rule, **options).steps(length, slots)
    assert steps.dtype == torch.bool and steps.shape == (length,)
    return steps.nonzero().flatten().tolist()


def test_dense_is_every_step():
    assert chosen("dense", 5, 2) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("length", "slots", "writes", "last"), [(50, 4, 5, 50), (784, 15, 16, 784), (500, 49, 50, 500), (103, 4, 5, 100)]
)
def test_the_published_rule_makes_a_write_more_than_there_are_slots(length, slots, writes, last):
    steps = chosen("uniform", length, slots)
    interval = length // (slots + 1)
    assert steps == [interval * k - 1 for k in range(1, writes + 1)]
    assert steps[-1] + 1 == last


def test_the_published_code_counts_the_token_at_the_end():
    assert chosen("uniform_author", 51, 4) == [10, 20, 30, 40, 50]
    assert chosen("uniform_author", 101, 4) == [20, 40, 60, 80, 100]
    assert chosen("uniform_author", 51, 4, cache_size=20) == [10, 20, 30, 40, 50]
    assert chosen("uniform_author", 31, 4, cache_size=5) == [5, 10, 15, 20, 25, 30]
    assert chosen("uniform_author", 4, 4) == [2], "one write in the middle where there are more slots than steps"
    assert chosen("uniform_author", 1, 4) == [0]


def test_an_interval_of_ones_own():
    assert chosen("uniform", 50, 4, interval=20) == [19, 39]
    assert chosen("uniform", 3, 4, interval=1) == [0, 1, 2]
    assert chosen("uniform", 3, 4, interval=4) == []


def test_the_slots_of_the_schedule_override_those_of_the_network():
    assert torch.equal(WriteSchedule(slots=2).steps(12, 11), WriteSchedule().steps(12, 2))
    assert chosen("uniform", 12, 2) == [3, 7, 11]
    assert chosen("uniform", 3, 3) == [0, 1, 2], "more slots than steps: every step"


def test_random_steps_are_drawn_once():
    before = torch.random.get_rng_state()
    steps = chosen("random", 2000, 199, seed=3)
    assert steps == chosen("random", 2000, 199, seed=3) != chosen("random", 2000, 199, seed=4)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert 150 < len(steps) < 250, "2000 draws at 1/10: 200, with a deviation of 13"
    assert chosen("random", 5, 4) == chosen("random", 5, 9) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rule", RULES)
def test_no_steps(rule):
    assert chosen(rule, 0, 3) == []


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("slots", range(1, 5))
@pytest.mark.parametrize("length", range(3, 15))
def test_optimal_intervals_among_all_placements(length, slots, decay):
    if slots >= length:
        return
    writes = torch.combinations(torch.arange(1, length), slots)
    ends = torch.nn.functional.pad(torch.nn.functional.pad(writes, (1, 0)), (0, 1), value=length)
    bounds = contribution_bound(ends.diff(), decay)
    best = bounds.max() if decay <= 1 else bounds.min()
    scheduled = torch.tensor(chosen("uniform_balanced", length, slots)) + 1
    assert len(scheduled) == slots
    (row,) = (writes == scheduled).all(1).nonzero().flatten()
    assert torch.equal(ends[row].diff(), optimal_intervals(length, slots))
    assert abs(bounds[row] - best) < 1e-13 * best


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    length=st.integers(2, 200), slots=st.integers(1, 40), decay=st.floats(0.05, 1.2), seed=st.integers(0, 99),
)  # fmt: skip
def test_no_placement_is_better(length, slots, decay, seed):
    slots = min(slots, length - 1)
    intervals = optimal_intervals(length, slots)
    assert intervals.sum() == length and intervals.max() - intervals.min() <= 1 and intervals.min() >= 1
    assert intervals.cumsum(0)[:-1].sub(1).tolist() == chosen("uniform_balanced", length, slots)
    order = torch.randperm(length - 1, generator=torch.Generator().manual_seed(seed))[:slots].sort().values + 1
    other = torch.tensor([0, *order.tolist(), length]).diff()
    ours, theirs = (float(contribution_bound(parts, decay)) for parts in (intervals, other))
    slack = 1e-12 * max(ours, theirs)
    assert ours >= theirs - slack if decay <= 1 else ours <= theirs + slack


@pytest.mark.parametrize("decay", [1e-30, 0.3, 1 - 1e-12, 1.0, 1 + 1e-12, 1.5])
def test_the_bound_is_a_geometric_sum(decay):
    intervals = torch.tensor([[4, 1, 0], [0, 2, 3]])
    expected = [sum(decay**j for length in row for j in range(length)) for row in intervals.tolist()]
    torch.testing.assert_close(
        contribution_bound(intervals, decay), torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0
    )
    assert contribution_bound([4, 1, 0], decay) == contribution_bound(intervals, decay)[0]


@pytest.mark.parametrize("rule", RULES)
def test_each_padded_sequence_has_the_schedule_of_its_length(rule):
    schedule, lengths = WriteSchedule(rule), [7, 20, 0, 7, 13]
    mask = schedule.mask(torch.tensor(lengths), 20, 3)
    assert mask.dtype == torch.bool and mask.shape == (20, 5)
    for column, length in zip(mask.T, lengths, strict=True):
        assert torch.equal(column[:length], schedule.steps(length, 3)) and not column[length:].any()
    assert torch.equal(schedule.mask(lengths, 20, 3), mask)
    assert schedule.mask(torch.empty(0), 4, 3).shape == (4, 0)


def test_numpy_numbers_are_options_and_sizes():
    schedule = WriteSchedule("uniform", slots=np.int64(4), interval=np.int32(2))
    assert schedule == WriteSchedule("uniform", slots=4, interval=2)
    assert (type(schedule.slots), type(schedule.interval)) == (int, int)
    assert schedule.steps(np.int64(4), np.int64(3)).tolist() == [False, True, False, True]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rule": "often"}, "rule: expected one of dense, uniform, uniform_author, uniform_balanced, random, got 'o"),
        ({"rule": None}, "rule: expected one of dense, .*, got None"),
        ({"slots": 0}, "slots: expected a positive integer, got 0"),
        ({"interval": 0}, "interval: expected a positive integer, got 0"),
        ({"interval": 2, "rule": "random"}, "interval: expected None for the rule random, got 2"),
        ({"cache_size": 0, "rule": "uniform_author"}, "cache_size: expected a positive integer, got 0"),
        ({"cache_size": 2}, "cache_size: expected None for the rule uniform, got 2"),
        ({"seed": -1}, "seed: expected an integer of at least 0, got -1"),
        ({"seed": 0.5}, "seed: expected an integer of at least 0, got 0.5"),
        ({"rule": "random", "seed": 2**64}, r"seed: expected at most 2\*\*64 - 1, got 18446744073709551616"),
    ],
)
def test_errors_of_the_options(options, message):
    with pytest.raises(ValueError, match=message):
        WriteSchedule(**options)


def test_errors_of_lengths_intervals_and_decay():
    schedule = WriteSchedule()
    with pytest.raises(ValueError, match="length: expected an integer of at least 0, got -1"):
        schedule.steps(-1, 2)
    with pytest.raises(ValueError, match="slots: expected a positive integer, got 0"):
        schedule.steps(3, 0)
    with pytest.raises(ValueError, match=r"lengths: expected numbers from 0 to 3, got \[4, 1\]"):
        schedule.mask([4, 1], 3, 2)
    with pytest.raises(ValueError, match=r"lengths: expected one dimension, got shape \[1, 1\]"):
        schedule.mask(torch.tensor([[1]]), 3, 2)
    with pytest.raises(TypeError, match=r"lengths: expected integers, got torch.float32"):
        schedule.mask(torch.tensor([1.0]), 3, 2)
    with pytest.raises(TypeError, match=r"intervals: expected integers, got torch.float32"):
        contribution_bound(torch.tensor([0.5]), 1.0)
    with pytest.raises(ValueError, match=r"intervals: expected numbers of at least 0, got \[-3, 2\]"):
        contribution_bound([-3, 2], 0.5)
    for wrong in (0.0, -1.0, float("nan"), float("inf"), "1", True):
        with pytest.raises(ValueError, match=f"decay: expected a positive number, got {wrong!r}"):
            contribution_bound([1], wrong)
