"""Whether a step costs later what it cost at first: steps on one state, driven by those of a recorded run.

The allocation gate is held at 1. Then a twentieth of the link's numbers are subnormal in the first hundred steps; later
writes replace them. So the same hundred vectors drive a third window, before each step of which the link is scaled
until all that it holds is subnormal: the most that a long run could leave there.
"""

from collections.abc import Iterator
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

import fastmem
from bench import recorded
from bench.peers import dnc_step, dnc_textbook
from bench.timing import cpu_clock, spread
from fastmem.reference._interface import interface_shapes, split

SLOTS, WORD, HEADS, BATCH, HIDDEN = 64, 16, recorded.HEADS, 16, 64
WINDOW, LATER = 100, 1000
MOST = 1.1  # times the first hundred steps that a later one may take
SUBNORMAL = 1e-38
SHAPE = {"batch": BATCH, "num_slots": SLOTS, "word_size": WORD, "num_read_heads": HEADS}


class Eager:
    """The fastest eager step that we found."""

    def __init__(self, driven: Tensor) -> None:
        self.state = dnc_textbook.empty(BATCH, SLOTS, WORD, HEADS, driven)

    def step(self, vector: Tensor) -> None:
        *after, _ = dnc_step.fast_eager(vector, *self.state)
        self.state = dnc_textbook.Memory(*after)


class Op:
    def __init__(self, driven: Tensor) -> None:
        self.state = dnc_textbook.empty(BATCH, SLOTS, WORD, HEADS, driven)
        self.reads = driven.new_zeros(BATCH, HEADS, WORD)

    def step(self, vector: Tensor) -> None:
        fastmem.dnc_step_(vector, *self.state, self.reads)


class Told(fastmem.nn.DNC):
    """A DNC that asks its LSTM and then hears something else, so that what it does to its memory is given."""

    told: Iterator[Tensor]

    def control(self, seen: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, hidden, cell = super().control(seen, hidden, cell)
        return next(self.told), hidden, cell


class Module:
    """The loop that the module runs for inference, step by step; its interface layer passes the vectors on."""

    def __init__(self, driven: Tensor) -> None:
        size = driven.shape[-1]
        self.network = Told(HIDDEN, HIDDEN, SLOTS, WORD, HEADS)
        self.network.interface = torch.nn.Linear(size, size, bias=False)
        torch.nn.init.eye_(self.network.interface.weight)
        self.network.output = torch.nn.Linear(size + HEADS * WORD, HIDDEN)
        self.network.told = cycle(driven)
        self.state, self.input = self.network.initial_state(BATCH), torch.zeros(BATCH, HIDDEN)

    def step(self, vector: Tensor) -> None:
        _, self.state = self.network.step(self.input, self.state, in_place=True)


CONTENDERS: dict[str, type[Op | Module | Eager]] = {
    "dnc_step_": Op,
    "nn.DNC, inference": Module,
    "eager step": Eager,
}


def vectors() -> Tensor:
    found = recorded.interface_vectors(SLOTS)[:WINDOW]
    split(found, interface_shapes(WORD, HEADS, 1)).allocation_gates.fill_(dnc_textbook.CLIP)
    return found


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Milliseconds of a step in the three windows, and the last two in times of the first, by their medians."""
    clock, driven = cpu_clock(), vectors()
    found = {}
    for name, kind in CONTENDERS.items():
        contender, windows = kind(driven), []
        for window in range(LATER // WINDOW + 2):
            subnormal, seconds = window == LATER // WINDOW + 1, []
            for vector in driven:
                link = contender.state.link
                link.mul_(SUBNORMAL / link.max() if subnormal else 1.0)  # in every window, so that the cache is as warm
                start = clock()
                contender.step(vector)
                seconds.append(clock() - start)
            windows.append(spread([1e3 * value for value in seconds]))
        first, later, subnormal_ones = windows[0], windows[-2], windows[-1]
        found[name] = {
            "first_ms": first,
            "later_ms": later,
            "subnormal_ms": subnormal_ones,
            "ratio": later["median"] / first["median"],
            "subnormal_ratio": subnormal_ones["median"] / first["median"],
        }
    return {"shape": SHAPE, "contenders": found}
