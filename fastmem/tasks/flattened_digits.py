"""Flattened digits: see an image one pixel a step, then tell which digit it is.

The task of Le et al., "Learning to Remember More with Less Memorization", with MNIST and pMNIST, on the small digits of
scikit-learn: 64 steps for 784, and 1,797 images, a choice of ours.

    step       input                                                         target       mask
    0 .. 62    a pixel from 0 to 1, from the top row on and from the left    0            0
    63         the last pixel                                                the digit    1

`permuted` shows the pixels of all images in one other order, drawn from `seed`. So is the split of the images: 297 are
never in a batch but of the task that is `held_out()`, on which training evaluates.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from fastmem import _check
from fastmem.tasks import _digits
from fastmem.tasks._task import Batch, TokenTask, check_choice, integers

PIXELS, DIGITS, TESTED = 64, 10, 297


@dataclass(frozen=True)
class FlattenedDigits(TokenTask):
    """A source of batches, of images drawn from those for training, or for the test. Needs scikit-learn."""

    loss_unit = "nats per label"
    measure = "wrong labels a sequence"

    permuted: bool = False
    seed: int = 1
    part: str = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.flags(permuted=self.permuted)
        check_choice("part", self.part, ("train", "test"))
        _digits.check_installed()

    @property
    def input_size(self) -> int:
        return 1

    @property
    def output_size(self) -> int:
        return DIGITS

    @property
    def read_steps(self) -> int:
        return PIXELS

    def held_out(self) -> Self:
        return replace(self, part="test")

    def images(self) -> tuple[Tensor, Tensor]:
        """All that batches are drawn from: images [n,64] in the order of the steps, and labels [n]."""
        images, labels = _digits.digits()
        generator = torch.Generator().manual_seed(self.seed)
        split = torch.randperm(len(images), generator=generator)
        pixels = torch.randperm(PIXELS, generator=generator) if self.permuted else torch.arange(PIXELS)
        chosen = split[:TESTED] if self.part == "test" else split[TESTED:]
        return images.flatten(1)[chosen][:, pixels], labels[chosen]

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        images, labels = self.images()
        drawn = integers(0, len(images) - 1, batch_size, generator)
        target, mask = torch.zeros(PIXELS, batch_size, DIGITS), torch.zeros(PIXELS, batch_size)
        target[-1], mask[-1] = one_hot(labels[drawn], DIGITS), 1
        return Batch(images[drawn].T.unsqueeze(-1), target, mask)
