"""When a network writes to its memory, and how much of a sequence such a schedule remembers at best.

Source of both: Le et al. 2019, "Learning to Remember More with Less Memorization" (Uniform Writing).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from fastmem import _check

RULES = ("dense", "uniform", "uniform_author", "uniform_balanced", "random")


@dataclass(frozen=True)
class WriteSchedule:
    r"""At which steps of a sequence a network writes and reads; between them its memory stays as it is.

    A memory of D slots that is written at equal intervals of :math:`T / (D + 1)` steps holds, by a lower bound, the
    most of a sequence of T steps (:func:`contribution_bound`). The rules, for steps t = 1..T:

    - "dense": every step.
    - "uniform": each t that :math:`L = \lfloor T / (D + 1) \rfloor` divides; at least D + 1 writes where T is more
      than D, the last one at or near T. L is 1 elsewhere (ours: the published rule divides by zero there).
    - "uniform_author": as the code published with the paper counts, which takes a token at the end of the sequence for
      a step: T includes it. Writes lie at the steps h, 2h, ... counted from 0, with :math:`h = \lfloor T / (D + 1)
      \rfloor`, at most `cache_size`; where h is 0, a single one at :math:`\lfloor T / 2 \rfloor`.
    - "uniform_balanced" (ours): D writes, :math:`t = \lfloor i T / (D + 1) \rfloor` for i = 1..D: the intervals of
      :func:`optimal_intervals`, which lead to the largest bound in whole steps. Every step where T is at most D.
    - "random": each step with probability :math:`(D + 1) / T`, drawn once: the same for equal T, D and seed.

    Args:
        rule (str): one of the above. Default: "uniform".
        slots (int, optional): D. Default: None, as many as the network has.
        interval (int, optional): L of "uniform", where it is not to follow from T and D (Cached Uniform Writing); any
            positive number. No write where it is longer than the sequence. Default: None.
        cache_size (int, optional): the longest interval of "uniform_author". Default: None, any.
        seed (int): of "random", without effect elsewhere. Default: 0.

    Raises:
        ValueError: for options that do not fit.

    Example::

        schedule = fastmem.nn.WriteSchedule("uniform_balanced")
        schedule.steps(50, slots=4).nonzero()    # the steps 9, 19, 29, 39, counted from 0
    """

    rule: str = "uniform"
    slots: int | None = None
    interval: int | None = None
    cache_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.rule, str) or self.rule not in RULES:
            raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {self.rule!r}")
        for name, rule in (("slots", None), ("interval", "uniform"), ("cache_size", "uniform_author")):
            value = getattr(self, name)
            if value is None:
                continue
            if rule not in (None, self.rule):
                raise ValueError(f"{name}: expected None for the rule {self.rule}, got {value!r}")
            object.__setattr__(self, name, _check.integer(name, value))
        object.__setattr__(self, "seed", _check.integer("seed", self.seed, least=0))
        if self.seed >= 2**64:
            raise ValueError(f"seed: expected at most 2**64 - 1, got {self.seed}")

    def interval_of(self, length: int, slots: int) -> int:
        """L of "uniform" for a sequence of so many steps."""
        return self.interval or max(1, length // (slots + 1))

    def steps(self, length: int, slots: int) -> Tensor:
        """Where a sequence is written and read: bools `[length]`, on the CPU.

        Args:
            length (int): steps T of the sequence, from 0.
            slots (int): those of the network, which the option of the schedule overrides.
        """
        length = _check.integer("length", length, least=0)
        slots = _check.integer("slots", slots) if self.slots is None else self.slots
        if self.rule == "random":
            drawn = torch.rand(length, generator=torch.Generator().manual_seed(self.seed), device="cpu")
            return drawn * length < slots + 1
        chosen = torch.zeros(length, dtype=torch.bool, device="cpu")
        if self.rule == "dense" or (self.rule == "uniform_balanced" and length <= slots):
            chosen[:] = True
        elif self.rule == "uniform":
            interval = self.interval_of(length, slots)
            chosen[interval - 1 :: interval] = True
        elif self.rule == "uniform_balanced":
            chosen[optimal_intervals(length, slots).cumsum(0)[:-1] - 1] = True
        elif interval := min(length // (slots + 1), self.cache_size or length):
            chosen[interval::interval] = True
        else:
            chosen[length // 2 : length // 2 + 1] = True
        return chosen

    def mask(self, lengths: Tensor | Sequence[int], steps: int, slots: int) -> Tensor:
        """Where each of several padded sequences is written and read: each by its own length, nowhere past its end.

        Args:
            lengths (Tensor or sequence of ints): steps of each sequence, from 0 to `steps`. Shape `[B]`.
            steps (int): T, of the longest or more.
            slots (int): as for :meth:`steps`.

        Returns:
            Bools `[T, B]`, on the device of the lengths.

        Raises:
            TypeError: for lengths that are no integers.
            ValueError: for lengths that do not fit.
        """
        lengths = _check.integers("lengths", lengths)
        steps = _check.integer("steps", steps, least=0)
        if lengths.dim() != 1:
            raise ValueError(f"lengths: expected one dimension, got shape {list(lengths.shape)}")
        numbers = lengths.tolist()
        if not all(0 <= number <= steps for number in numbers):
            raise ValueError(f"lengths: expected numbers from 0 to {steps}, got {numbers}")
        columns = torch.zeros(len(numbers), steps, dtype=torch.bool, device="cpu")
        for number in set(numbers):
            columns[lengths.cpu() == number, :number] = self.steps(number, slots)
        return columns.T.to(lengths.device)


def optimal_intervals(length: int, slots: int) -> Tensor:
    """Intervals between writes that remember most of a sequence, in whole steps: int64 `[slots + 1]`.

    Their sum is the length, and no two differ by more than one; any arrangement of them is as good, and here the longer
    ones are spread evenly. The last is what follows the last write. Some are 0 where there are more slots than steps.

    Args:
        length (int): steps T of the sequence, from 0.
        slots (int): writes D that are retained, from 0.
    """
    length, slots = _check.integer("length", length, least=0), _check.integer("slots", slots, least=0)
    return (torch.arange(slots + 2, device="cpu") * length // (slots + 1)).diff()


def contribution_bound(intervals: Tensor | Sequence[int], decay: float) -> Tensor:
    r"""How much of a sequence a memory holds at least that is written at these intervals, up to a factor.

    .. math::
        \sum_i f_\lambda(l_i), \qquad f_\lambda(l) = \sum_{j < l} \lambda^j = \frac{1 - \lambda^l}{1 - \lambda}

    is the mean contribution of the steps to the last state, times their number, in units of that of a step to the
    state right after it. Among intervals of one sum and number it is largest for equal ones where the decay is at most
    1, and smallest where it is more.

    Args:
        intervals (Tensor or sequence of ints): steps up to each write, and after the last one. Shape `[..., D + 1]`.
        decay (float): factor :math:`\lambda` by which a step contributes less than the one after it; positive.

    Returns:
        float64 `[...]`.

    Raises:
        TypeError: for intervals that are no integers.
        ValueError: for an interval below 0, or a decay that is not positive.
    """
    whole = _check.integers("intervals", intervals)
    if (whole < 0).any():
        raise ValueError(f"intervals: expected numbers of at least 0, got {whole.tolist()}")
    if not (_check.is_number(decay) and 0 < decay < float("inf")):
        raise ValueError(f"decay: expected a positive number, got {decay!r}")
    intervals = whole.double()
    if decay == 1:
        return intervals.sum(-1)
    return (torch.expm1(intervals * log(decay)) / (decay - 1)).sum(-1)  # exact to rounding near a decay of 1 too
