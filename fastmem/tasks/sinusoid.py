"""Sinusoid: see the beginning of a noisy wave, and go on with it (Le et al., "Learning to Remember More with Less
Memorization").

Each sample has its own y(x) = 5 + A sin(2 pi f x + phi), with A uniform in [1, 5], f in [10, 30] and phi in [0, 100].
Step t, counted from 1, lies at x_t = (t + e) / 1000, with e uniform in [-1, 1] and its own in each step:

    step                          input         target    mask
    1 .. steps_in                 y(x_t)        0         0
    next steps_out                0             y(x_t)    1

`noisy` adds a number uniform in [-2, 2] to each input. The loss and the errors are the mean squared error.
"""

from dataclasses import dataclass
from math import pi

import torch
from torch import Tensor

from fastmem import _check
from fastmem.tasks._task import Batch, RegressionTask


@dataclass(frozen=True)
class Sinusoid(RegressionTask):
    """A source of batches."""

    steps_in: int = 100
    steps_out: int = 100
    noisy: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check.flags(noisy=self.noisy)

    @property
    def input_size(self) -> int:
        return 1

    @property
    def output_size(self) -> int:
        return 1

    @property
    def read_steps(self) -> int:
        return self.steps_in

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return low + (high - low) * torch.rand(*shape, batch_size, 1, generator=generator)

        steps = self.steps_in + self.steps_out
        amplitude, frequency, phase = uniform(1, 5), uniform(10, 30), uniform(0, 100)
        place = (torch.arange(1, steps + 1).view(-1, 1, 1) + uniform(-1, 1, steps)) / 1000
        wave = 5 + amplitude * torch.sin(2 * pi * frequency * place + phase)
        noise = uniform(-2, 2, steps) if self.noisy else torch.zeros(())
        asked = (torch.arange(steps) >= self.steps_in).float().view(-1, 1, 1)
        return Batch(
            input=(wave + noise) * (1 - asked),
            target=wave * asked,
            mask=asked[..., 0].expand(-1, batch_size),
        )
