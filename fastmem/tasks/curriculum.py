"""Curricula: how hard the next batch is.

`task.lesson(level)` is a task at one of its `task.levels` levels of difficulty; a curriculum draws the level of each
batch, and learns from what comes of it. Source, unless said otherwise: Collier and Beel, "Implementing Neural Turing
Machines", and the code published with it. There every batch is of one level, and without a curriculum of the highest;
here it is then of the task itself, whose samples have lengths of their own.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastmem.tasks._task import integers


class Curriculum:
    """None, and the base of the others: every batch is of the task itself.

    All draws come from `generator`. What else a curriculum has learned is in its `state_dict`.
    """

    def __init__(self, levels: int, generator: torch.Generator) -> None:
        self.levels, self.generator = levels, generator

    def draw(self) -> int | None:
        """The level of the next batch; None for the task itself."""
        return None

    def trained(self, gain: Callable[[], float]) -> None:
        """After each step: by how much it lowered the loss of its batch, per step of its sequences."""

    def evaluated(self, errors: Callable[[int], float]) -> None:
        """After each evaluation: the wrong bits of a fresh sequence at a level."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


class Uniform(Curriculum):
    """Every level is as likely as the others."""

    def draw(self) -> int:
        return int(integers(1, self.levels, 1, self.generator))


class Phases(Curriculum):
    """Each level for an equal share of the iterations, in their order, the last one for what is left: continual
    learning."""

    def __init__(self, levels: int, generator: torch.Generator, iterations: int) -> None:
        super().__init__(levels, generator)
        self.length = max(1, iterations // levels)
        self.done = 0

    @property
    def ended(self) -> bool:
        """Whether the last batch was the last one of a phase."""
        return self.done > 0 and self.done % self.length == 0

    def draw(self) -> int:
        return min(1 + self.done // self.length, self.levels)

    def trained(self, gain: Callable[[], float]) -> None:
        self.done += 1

    def state_dict(self) -> dict[str, Any]:
        return {"length": self.length, "done": self.done}


class Naive(Curriculum):
    """One level until its sequences have fewer than `advance_below` wrong bits, then the next, up to the last.

    The next is twice the level, as Collier and Beel have it for copy and, by the loss, Rae et al., "Scaling
    Memory-Augmented Neural Networks with Sparse Reads and Writes"; or the level plus 1, as the former have it for
    associative recall.
    """

    def __init__(
        self, levels: int, generator: torch.Generator, advance_below: float = 1.0, doubles: bool = True
    ) -> None:
        super().__init__(levels, generator)
        self.advance_below, self.doubles = advance_below, doubles
        self.level = 1

    def draw(self) -> int:
        return self.level

    def evaluated(self, errors: Callable[[int], float]) -> None:
        if self.level < self.levels and errors(self.level) < self.advance_below:
            self.level = min(2 * self.level if self.doubles else self.level + 1, self.levels)

    def state_dict(self) -> dict[str, Any]:
        return {"level": self.level}


class LookBack(Naive):
    """As `Naive`, but one batch in ten is of an earlier level, any of them as likely as the others.

    The published code draws that one from the present level too; that it is always an easier one follows Graves et al.,
    "Hybrid computing using a neural network with dynamic external memory".
    """

    def draw(self) -> int:
        if self.level > 1 and torch.rand((), generator=self.generator) < 0.1:
            return int(integers(1, self.level - 1, 1, self.generator))
        return self.level


class PredictionGain(Curriculum):
    """A bandit over the levels, which likes those whose batches become easier by training on them.

    EXP3.S of Graves et al., "Automated Curriculum Learning for Neural Networks", with its constants: `rate` eta,
    `exploration` epsilon, beta 0. Gains are rescaled by the quantiles 0.2 and 0.8 of a sample of all so far, which
    holds `kept` of them; the paper does not say how many (the code of Collier and Beel: 50,000).
    """

    def __init__(
        self,
        levels: int,
        generator: torch.Generator,
        rate: float = 1e-3,
        exploration: float = 0.05,
        kept: int = 1000,
    ) -> None:
        super().__init__(levels, generator)
        self.rate, self.exploration, self.kept = rate, exploration, kept
        self.log_weights = torch.zeros(levels, dtype=torch.float64)
        self.gains: list[float] = []
        self.rounds = 0

    @property
    def chances(self) -> Tensor:
        """Of each level, [levels]."""
        return (1 - self.exploration) * self.log_weights.softmax(0) + self.exploration / self.levels

    def draw(self) -> int:
        self.drawn = int(torch.multinomial(self.chances, 1, generator=self.generator))
        return self.drawn + 1

    def trained(self, gain: Callable[[], float]) -> None:
        found = gain()
        if not math.isfinite(found):  # says nothing of the level, and the run is about to end
            return
        self.rounds += 1
        self._keep(found)
        scores = self.log_weights.clone()
        scores[self.drawn] += self.rate * self._reward(found) / self.chances[self.drawn]
        weights = (scores - scores.max()).exp()  # chances do not change by a factor of all weights
        share = 1 / self.rounds
        others = (weights.sum() - weights) / (self.levels - 1) if self.levels > 1 else weights  # one has no others
        self.log_weights = ((1 - share) * weights + share * others).log()

    def _keep(self, gain: float) -> None:
        """Reservoir sampling: each gain so far is as likely as the others to be among those that are kept."""
        if len(self.gains) < self.kept:
            self.gains.append(gain)
            return
        place = int(torch.randint(self.rounds, (), generator=self.generator))
        if place < self.kept:
            self.gains[place] = gain

    def _reward(self, gain: float) -> float:
        """The gain on a scale from -1, that of the low quantile, to 1, that of the high one; 0 where they are equal."""
        quantiles = torch.tensor([0.2, 0.8], dtype=torch.float64)
        low, high = torch.tensor(self.gains, dtype=torch.float64).quantile(quantiles).tolist()
        return 2 * min(max((gain - low) / (high - low), 0.0), 1.0) - 1 if high > low else 0.0

    def state_dict(self) -> dict[str, Any]:
        return {"log_weights": self.log_weights, "gains": self.gains, "rounds": self.rounds}
