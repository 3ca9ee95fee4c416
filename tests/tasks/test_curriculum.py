"""Lessons of the tasks, and the laws of the curricula over them."""

from collections import Counter

import pytest
import torch

from fastmem.tasks import (
    AssociativeRecall,
    BlockCopy,
    BlockRecall,
    Copy,
    Curriculum,
    DynamicNGrams,
    KeyValue,
    LookBack,
    Naive,
    PredictionGain,
    PrioritySort,
    RepeatCopy,
    Uniform,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("task", "levels", "level", "lesson"),
    [
        (Copy(), 20, 7, Copy(min_length=7, max_length=7)),
        (Copy(min_length=3, max_length=3), 1, 1, Copy(min_length=3, max_length=3)),
        (AssociativeRecall(), 5, 1, AssociativeRecall(max_items=2)),
        (BlockCopy(), 13, 10, BlockCopy(min_length=11, max_length=11, min_blocks=8, max_blocks=8)),
        (BlockRecall(), 15, 15, BlockRecall(min_blocks=16)),
        (KeyValue(two_way=True), 15, 2, KeyValue(min_pairs=3, max_pairs=3, two_way=True)),
        (PrioritySort(), 20, 20, PrioritySort()),
        (PrioritySort(), 20, 1, PrioritySort(items=1, outputs=1)),
        (PrioritySort(), 20, 8, PrioritySort(items=8, outputs=7)),
        (RepeatCopy(8, 1, 4, 2, 3), 4, 3, RepeatCopy(8, 3, 3, 3, 3, count_range=(2, 3))),
    ],
)
def test_lessons(task, levels, level, lesson):
    assert task.levels == levels
    assert task.lesson(level) == lesson
    for level in range(1, levels + 1):
        batch = task.lesson(level).sample(2, generator())
        assert batch.input.shape[1:] == (2, task.input_size) and batch.target.shape[2] == task.output_size
    for level in (0, levels + 1):
        with pytest.raises(ValueError, match=f"level: expected 1 to {levels}, got {level}"):
            task.lesson(level)


def test_every_prefix_of_dynamic_ngrams_is_asked_for_already():
    assert DynamicNGrams().levels == 1 and DynamicNGrams().lesson(1) == DynamicNGrams()


def test_the_count_of_repeat_copy_means_the_same_at_every_level():
    task = RepeatCopy(1, 1, 1, 1, 10, count="normalised")
    counts = [float(task.lesson(repeats).sample(1, generator()).input[2, 0, -1]) for repeats in range(1, 11)]
    torch.testing.assert_close(torch.tensor(counts), (torch.arange(1, 11) - 5.5) / (99 / 12) ** 0.5)


def test_without_a_curriculum_there_is_no_level_and_no_draw():
    source = generator()
    before = source.get_state()
    assert Curriculum(20, source).draw() is None
    assert torch.equal(before, source.get_state())


def test_uniform_is_uniform():
    curriculum = Uniform(5, generator())
    drawn = Counter(curriculum.draw() for _ in range(5000))
    assert set(drawn) == {1, 2, 3, 4, 5} and all(850 < count < 1150 for count in drawn.values())


@pytest.mark.parametrize(("doubles", "expected"), [(True, [1, 2, 4, 8, 11, 11]), (False, [1, 2, 3, 4, 5, 6])])
@pytest.mark.parametrize("kind", [Naive, LookBack])
def test_naive_advances_only_below_the_threshold_and_never_past_the_last(kind, doubles, expected):
    curriculum = kind(11, generator(), advance_below=0.5, doubles=doubles)
    levels = []
    for _ in range(6):
        levels.append(curriculum.level)
        curriculum.evaluated(lambda level: 0.5)
        assert curriculum.level == levels[-1]
        curriculum.evaluated(lambda level: 0.49)
    assert levels == expected


def test_naive_looks_at_the_errors_of_its_own_level():
    curriculum = Naive(8, generator(), doubles=False)
    for _ in range(5):
        curriculum.evaluated(lambda level: level - 2.5)  # fewer than one up to level 3
        assert curriculum.draw() == curriculum.level
    assert curriculum.level == 4


def test_look_back_draws_one_in_ten_from_earlier_levels():
    curriculum = LookBack(20, generator())
    assert {curriculum.draw() for _ in range(100)} == {1}
    curriculum.level = 5
    drawn = Counter(curriculum.draw() for _ in range(20_000))
    assert set(drawn) == {1, 2, 3, 4, 5}
    earlier = [drawn[level] for level in range(1, 5)]
    assert 1850 < sum(earlier) < 2150 and all(400 < count < 600 for count in earlier)


def test_the_bandit_comes_to_prefer_the_level_with_gain_and_follows_when_it_moves():
    curriculum, noise = PredictionGain(5, generator(), rate=1e-2), generator(1)
    for best in (2, 4):
        drawn = []
        for _ in range(3000):
            level = curriculum.draw()
            drawn.append(level)
            gain = (1.0 if level == best else 0.0) + 0.1 * float(torch.randn((), generator=noise))
            curriculum.trained(lambda gain=gain: gain)
        assert float(curriculum.chances[best - 1]) > 0.9
        assert Counter(drawn[-500:])[best] > 400
        torch.testing.assert_close(float(curriculum.chances.sum()), 1.0)
        assert float(curriculum.chances.min()) >= 0.05 / 5, "every level stays possible"


def test_the_bandit_scales_gains_by_quantiles_and_keeps_a_sample_of_them():
    curriculum = PredictionGain(3, generator(), kept=11)
    curriculum.gains = [float(gain) for gain in range(11)]
    rewards = [curriculum._reward(gain) for gain in (-5.0, 2.0, 3.5, 5.0, 8.0, 1e9)]
    assert rewards == pytest.approx([-1, -1, -0.5, 0, 1, 1])
    for gain in range(11, 1000):
        curriculum.rounds = gain
        curriculum._keep(float(gain))
    assert len(curriculum.gains) == 11 and min(curriculum.gains) < 500 < max(curriculum.gains)


def test_one_step_of_the_bandit_by_the_formula():
    curriculum = PredictionGain(3, generator(), rate=0.5, exploration=0.3)
    curriculum.log_weights = torch.tensor([0.1, -0.2, 0.4], dtype=torch.float64)
    curriculum.gains, curriculum.rounds = [float(gain) for gain in range(11)], 4
    before, chances = curriculum.log_weights.exp(), curriculum.chances
    torch.testing.assert_close(chances, 0.7 * before / before.sum() + 0.1)
    drawn = curriculum.draw() - 1
    curriculum.trained(lambda: 100.0)  # past the high quantile: the reward is 1
    before[drawn] *= torch.exp(0.5 / chances[drawn])
    after = 0.8 * before + 0.2 * (before.sum() - before) / 2  # alpha is 1 / 5
    torch.testing.assert_close(curriculum.log_weights.softmax(0), after / after.sum())


def test_a_bandit_of_one_level_draws_it_for_ever():
    curriculum = PredictionGain(1, generator())
    for step in range(20):
        assert curriculum.draw() == 1
        curriculum.trained(lambda step=step: float(step))
    assert torch.equal(curriculum.chances, torch.ones(1, dtype=torch.float64))


def test_a_gain_that_is_no_number_changes_nothing():
    curriculum = PredictionGain(3, generator())
    curriculum.draw()
    curriculum.trained(lambda: float("nan"))
    assert curriculum.rounds == 0 and not curriculum.gains
