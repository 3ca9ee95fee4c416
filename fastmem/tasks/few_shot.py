"""Few-shot learning: classify images of classes that were never seen before, after one or a few of each.

The task of Santoro et al., "Meta-Learning with Memory-Augmented Neural Networks", and of Le et al., "Neural
Stored-program Memory". An episode has `classes` classes, numbered anew, and `length` images of them in any order. For
the images x_t with the labels l_t, all one-hot:

    step    input                      target    mask
    0       x_0 flattened, 0           l_0       1
    t       x_t flattened, l_(t - 1)   l_t       1

so that the label of a class can only be guessed at its first image: with 5 classes 46 % of these guesses are right when
none is a label that another class has already. `accuracy_by_presentation` tells what comes of it::

    task = FewShotDigits().held_out()
    batch = task.sample(1000)
    task.accuracy_by_presentation(model(batch.input)[0], batch)  # {1: ..., 2: ..., 3: ..., 5: ..., 10: ...}

Ours, where the papers are silent: every class of an episode has as many images as the others, or, where the length is
no multiple of the classes, one more or less, and no image comes twice.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from fastmem import _check
from fastmem.tasks import _digits
from fastmem.tasks._task import Batch, TokenTask, check_choice, wrong_tokens


@dataclass(frozen=True)
class FewShot(TokenTask):
    """A source of episodes. A length of None is 25 + 5 classes, which the papers have for 5 classes and for 10."""

    loss_unit = "nats per label"
    measure = "wrong labels an episode"

    classes: int = 5
    length: int | None = None

    @property
    @abstractmethod
    def source(self) -> Tensor:
        """Images by class, [C,n,...]."""

    @property
    def input_size(self) -> int:
        return self.source[0, 0].numel() + self.classes

    @property
    def output_size(self) -> int:
        return self.classes

    @property
    def _steps(self) -> int:
        return self.length or 25 + 5 * self.classes

    def _check_source(self, images: Tensor) -> None:
        """Whether there are images enough for an episode."""
        if self.classes > len(images):
            raise ValueError(f"classes: expected at most {len(images)}, got {self.classes}")
        if self._steps > self.classes * images.shape[1]:
            enough = f"at most {self.classes * images.shape[1]}, the images of {self.classes} classes"
            raise ValueError(f"length: expected {enough}, got {self._steps}")

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        images = self.source.flatten(2)
        length = self._steps

        def choice(count: int, *shape: int) -> Tensor:
            """Numbers below `count` in any order, [count,*shape]."""
            return torch.rand(count, *shape, generator=generator).argsort(0)

        chosen = choice(len(images), batch_size)[: self.classes]  # the label of a class is its place here
        copies = choice(images.shape[1], self.classes, batch_size)
        place = choice(length, batch_size)
        label, instance, sample = place % self.classes, place // self.classes, torch.arange(batch_size)
        target = one_hot(label, self.classes).float()
        return Batch(
            input=torch.cat(
                [
                    images[chosen[label, sample], copies[instance, label, sample]],
                    pad(target[:-1], (0, 0, 0, 0, 1, 0)),
                ],
                -1,
            ),
            target=target,
            mask=torch.ones(length, batch_size),
        )

    def accuracy_by_presentation(
        self, output: Tensor, batch: Batch, presentations: Sequence[int] = (1, 2, 3, 5, 10)
    ) -> dict[int, float]:
        """The share of right labels among the first images of the classes in their episodes, the second, and so on.

        A presentation that no class reaches is left out.
        """
        right = ~wrong_tokens(output, batch)
        seen = (batch.target.cumsum(0) * batch.target).sum(-1).round()  # [T,B], how often so far
        return {
            number: float(right[seen == number].float().mean()) for number in presentations if (seen == number).any()
        }


@dataclass(frozen=True, eq=False)
class FewShotImages(FewShot):
    """Episodes over any images by class, [C,n,...] on the CPU; in `held_out()` over others [D,m,...], where given."""

    images: Tensor = field(kw_only=True, repr=False)
    held_out_images: Tensor | None = field(default=None, kw_only=True, repr=False)

    __eq__, __hash__ = object.__eq__, object.__hash__  # tensors compare element by element

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("images", "held_out_images"):
            images = getattr(self, name)
            _check.tensors([(name, name != "images")], [images])
            if images is not None and (images.dim() < 2 or not images.numel()):
                raise ValueError(f"{name}: expected images by class [C, n, ...], got shape {list(images.shape)}")
            if images is not None:
                self._check_source(images)
        if self.held_out_images is not None and self.held_out_images.shape[2:] != self.images.shape[2:]:
            expected, got = list(self.images.shape[2:]), list(self.held_out_images.shape[2:])
            raise ValueError(f"held_out_images: expected images of shape {expected}, got {got}")

    @property
    def source(self) -> Tensor:
        return self.images

    def held_out(self) -> Self:
        return self if self.held_out_images is None else replace(self, images=self.held_out_images)


@dataclass(frozen=True)
class FewShotDigits(FewShot):
    """Episodes over the digits of scikit-learn, of which it is part of the class how they lie: turned by 0, 90, 180 or
    270 degrees, in a mirror or not, bright on dark or dark on bright; 16 classes a digit.

    No image of the `test_digits` is in training, and no other in `held_out()`. Some classes are hard to tell from each
    other, for a 0 looks much the same when it is turned. Needs scikit-learn.
    """

    test_digits: tuple[int, ...] = (7, 8, 9)
    part: str = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("part", self.part, ("train", "test"))
        try:
            held = {_check.integer("test_digits", digit, least=0) for digit in self.test_digits}
        except (TypeError, ValueError):
            held = set()
        if not held or not held < {*range(10)}:
            raise ValueError(f"test_digits: expected some of 0 to 9, but not all, got {self.test_digits!r}")
        object.__setattr__(self, "test_digits", tuple(sorted(held)))
        _digits.check_installed()
        for part in ("train", "test"):
            self._check_source(self._of_part(part))

    @property
    def source(self) -> Tensor:
        return self._of_part(self.part)

    def _of_part(self, part: str) -> Tensor:
        return _classes(tuple(digit for digit in range(10) if (digit in self.test_digits) == (part == "test")))

    def held_out(self) -> Self:
        return replace(self, part="test")


@cache
def _classes(digits: tuple[int, ...]) -> Tensor:
    """The images of each of the digits in each of its ways to lie, [16 digits,n,8,8]; n is that of the rarest digit."""
    images, labels = _digits.digits()
    kept = labels.bincount().min()
    upright = torch.stack([images[labels == digit][:kept] for digit in digits])
    turned = [upright.rot90(turn, (2, 3)) for turn in range(4)]
    lying = torch.cat([*turned, *(images.flip(3) for images in turned)])
    return torch.cat([lying, 1 - lying])
