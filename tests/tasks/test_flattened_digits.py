"""Flattened digits: pixels by the step, and images that training never sees."""

import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn")

from fastmem.tasks import FlattenedDigits
from fastmem.tasks._digits import digits
from tests.tasks.laws import follows_its_seed, generator, knows_right_from_wrong


@pytest.mark.parametrize("task", [FlattenedDigits(), FlattenedDigits(permuted=True, seed=4, part="test")], ids=repr)
def test_laws(task):
    follows_its_seed(task)
    knows_right_from_wrong(task)


def test_steps_follow_the_table():
    batch = FlattenedDigits().sample(60, generator())
    images, labels = digits()
    known = {tuple(image): label for image, label in zip(images.flatten(1).tolist(), labels.tolist(), strict=True)}
    assert batch.input.shape == (64, 60, 1) and batch.target.shape == (64, 60, 10)
    assert batch.mask.sum(0).eq(1).all() and batch.mask[-1].all() and not batch.target[:-1].any()
    for b in range(60):
        assert known[tuple(batch.input[:, b, 0].tolist())] == batch.target[-1, b].argmax()
    assert batch.target[-1].sum(1).eq(1).all() and batch.input.min() >= 0 and batch.input.max() == 1


def test_images_of_the_test_are_never_in_training():
    task = FlattenedDigits()
    assert task.held_out() == FlattenedDigits(part="test") == task.held_out().held_out()
    (train, labels), (test, test_labels) = task.images(), task.held_out().images()
    assert len(train) == 1500 and len(test) == 297
    everything = torch.cat([train, test]).unique(dim=0)
    assert len(everything) == 1797, "all images differ, and each is in one part"
    assert labels.bincount().min() > 130 and test_labels.bincount().min() > 15
    other = FlattenedDigits(seed=2).held_out().images()[0]
    assert not torch.equal(other.sort(0).values, test.sort(0).values)


def test_a_permutation_moves_the_pixels_of_all_images_alike():
    plain, moved = FlattenedDigits().images()[0], FlattenedDigits(permuted=True).images()[0]
    assert not torch.equal(plain, moved) and torch.equal(plain.sort(1).values, moved.sort(1).values)
    columns = {tuple(column) for column in plain.T.tolist()}
    assert {tuple(column) for column in moved.T.tolist()} == columns
    assert not torch.equal(moved, FlattenedDigits(permuted=True, seed=2).images()[0])
    kept = FlattenedDigits(permuted=True).held_out().images()[0]
    dark = moved.sum(0) == 0
    assert kept[:, dark].sum() < 5, "the test shows the pixels in the order of the training"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "all"}, "part: expected one of train, test, got 'all'"),
        ({"permuted": "yes"}, "permuted: expected True or False, got 'yes'"),
        ({"seed": 0}, "seed: expected a positive integer, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FlattenedDigits(**options)


def test_without_scikit_learn_the_task_says_what_to_install():
    code = (
        "import sys\n"
        "import fastmem.tasks\n"
        "print('sklearn' in sys.modules)\n"
        "sys.modules['sklearn'] = None\n"
        "try: fastmem.tasks.FlattenedDigits()\n"
        "except ImportError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False\nthe digits need scikit-learn") and "pip install scikit-learn" in done.stdout
