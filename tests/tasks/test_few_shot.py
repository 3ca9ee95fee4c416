"""Episodes of few-shot learning, over images that tell which they are."""

import math

import pytest
import torch

from fastmem.tasks import Batch, FewShotDigits, FewShotImages
from tests.tasks.laws import follows_its_seed, generator, knows_right_from_wrong


def numbered(classes: int, each: int) -> torch.Tensor:
    """Images of two pixels: the class, and the instance."""
    pair = torch.meshgrid(torch.arange(classes), torch.arange(each), indexing="ij")
    return torch.stack(pair, -1).float()


@pytest.mark.parametrize(("classes", "length"), [(5, 50), (3, 7), (1, 4)])
def test_episodes_follow_the_table(classes, length):
    task = FewShotImages(classes, length, images=numbered(8, 12))
    assert (task.input_size, task.output_size) == (2 + classes, classes)
    batch, chosen = task.sample(40, generator()), set()
    assert batch.input.shape == (length, 40, 2 + classes) and batch.mask.eq(1).all()
    for input, target in zip(batch.input.unbind(1), batch.target.unbind(1), strict=True):
        labels = target.argmax(-1)
        assert torch.equal(target, torch.nn.functional.one_hot(labels, classes).float())
        assert torch.equal(input[1:, 2:], target[:-1]) and not input[0, 2:].any()
        shown = [tuple(map(int, image)) for image in input[:, :2].tolist()]
        assert len({*shown}) == length, "no image comes twice"
        label_of = dict(zip((image[0] for image in shown), labels.tolist(), strict=True))
        assert [label_of[image[0]] for image in shown] == labels.tolist() and len({*label_of.values()}) == len(label_of)
        counts = labels.bincount(minlength=classes)
        assert counts.sum() == length and counts.max() - counts.min() <= 1 and counts.min() == length // classes
        chosen.add(tuple(label_of.items()))
    assert len(chosen) > (30 if classes > 1 else 5), "classes and labels are drawn anew"


def test_labels_are_numbered_anew():
    """Any class has any label, as often as the others."""
    batch = FewShotImages(5, 5, images=numbered(5, 1)).sample(2000, generator())
    for kind in range(5):
        labels = batch.target[batch.input[..., 0] == kind]
        assert len(labels) == 2000 and (labels.mean(0) - 0.2).abs().max() < 0.04
    first = batch.target[0].mean(0)
    assert (first - 0.2).abs().max() < 0.04


def test_lengths_of_the_papers():
    for classes, length in ((5, 50), (10, 75)):
        assert len(FewShotImages(classes, images=numbered(10, 20)).sample(1).mask) == length


def test_laws():
    task = FewShotImages(3, 10, images=numbered(4, 6))
    follows_its_seed(task)
    knows_right_from_wrong(task)
    assert task == task and task != FewShotImages(3, 10, images=numbered(5, 6)) and hash(task)


def test_accuracy_by_presentation_by_hand():
    task = FewShotImages(2, 4, images=numbered(2, 2))
    target = torch.nn.functional.one_hot(torch.tensor([[0, 1], [1, 1], [0, 0], [1, 0]]), 2).float()  # [T,B]
    guess = torch.nn.functional.one_hot(torch.tensor([[1, 1], [1, 0], [0, 1], [1, 0]]), 2).float()
    batch = Batch(torch.zeros(4, 2, task.input_size), target, torch.ones(4, 2))
    # first ones: 0 wrong, 1 right; 1 right, 0 wrong. Second ones: right, right; wrong, right.
    assert task.accuracy_by_presentation(guess, batch) == {1: 0.5, 2: 0.75}
    assert task.errors(guess, batch) == 1.5
    right, wrong = math.log(1 + 1 / math.e), math.log(1 + math.e)
    assert float(task.loss(guess, batch)) == pytest.approx((5 * right + 3 * wrong) / 8)
    guess[0, 1, 1] = torch.nan
    assert task.accuracy_by_presentation(guess, batch, (1, 3)) == {1: 0.25}


def test_other_images_for_the_test():
    task = FewShotImages(2, 4, images=numbered(3, 4), held_out_images=numbered(6, 5) + 100)
    assert task.sample(50).input[..., :2].max() < 100
    assert task.held_out().sample(50, generator()).input[..., :2].min() >= 100
    assert task.held_out().held_out().source is task.held_out().source
    alone = FewShotImages(2, 4, images=numbered(3, 4))
    assert alone.held_out() is alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": torch.zeros(4)}, r"images: expected images by class \[C, n, \.\.\.\], got shape \[4\]"),
        ({"images": torch.zeros(4, 0)}, r"images: expected images by class .*, got shape \[4, 0\]"),
        ({"images": numbered(4, 20)}, "classes: expected at most 4, got 5"),
        ({"images": numbered(5, 9)}, "length: expected at most 45, the images of 5 classes, got 50"),
        ({"images": numbered(5, 10), "length": 0}, "length: expected a positive integer, got 0"),
        ({"images": numbered(5, 10), "held_out_images": numbered(4, 10)}, "classes: expected at most 4, got 5"),
        (
            {"images": numbered(5, 10), "held_out_images": torch.zeros(5, 10, 3)},
            r"held_out_images: expected images of shape \[2\], got \[3\]",
        ),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        FewShotImages(**options)


def test_images_are_a_tensor():
    with pytest.raises(TypeError, match="images: expected a Tensor, got list"):
        FewShotImages(images=[[0.0]])


def test_digits_lie_in_sixteen_ways_and_those_of_the_test_are_held_out():
    pytest.importorskip("sklearn")
    from fastmem.tasks._digits import digits

    task = FewShotDigits()
    follows_its_seed(task)
    assert (task.input_size, task.output_size) == (69, 5)
    assert task.source.shape == (112, 174, 8, 8) and task.held_out().source.shape == (48, 174, 8, 8)
    assert task.held_out() == FewShotDigits(part="test") == task.held_out().held_out()
    images, labels = digits()
    digit = {tuple(image): label for image, label in zip(images.flatten(1).tolist(), labels.tolist(), strict=True)}
    for part, allowed in ((task, {*range(7)}), (task.held_out(), {7, 8, 9})):
        kinds = [part.source[i] for i in range(len(part.source))]
        upright = [kind for kind in kinds if tuple(kind[0].flatten().tolist()) in digit]
        assert {digit[tuple(image)] for kind in upright for image in kind.flatten(1).tolist()} == allowed
        for kind in upright:
            (kept,) = {digit[tuple(image)] for image in kind.flatten(1).tolist()}
            assert kept in allowed, "a class has one digit"
        six, ways = upright[0], set()
        for invert in (False, True):
            for mirror in (False, True):
                for turn in range(4):
                    image = six.rot90(turn, (1, 2))
                    image = image.flip(2) if mirror else image
                    image = 1 - image if invert else image
                    ways |= {i for i, kind in enumerate(kinds) if torch.equal(kind, image)}
        assert len(ways) == 16


def test_other_digits_for_the_test():
    pytest.importorskip("sklearn")
    task = FewShotDigits(test_digits=(2, 0, 2))
    assert task.test_digits == (0, 2) and len(task.source) == 128 and len(task.held_out().source) == 32
    for wrong in ((), tuple(range(10)), (10,), 7, ([7],), (True, 2), (2.0,)):
        with pytest.raises(ValueError, match="test_digits: expected some of 0 to 9, but not all, got"):
            FewShotDigits(test_digits=wrong)
    with pytest.raises(ValueError, match="classes: expected at most 16, got 17"):
        FewShotDigits(classes=17, test_digits=(1,))
    with pytest.raises(ValueError, match="part: expected one of train, test, got 'all'"):
        FewShotDigits(part="all")
