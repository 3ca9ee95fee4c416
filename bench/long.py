"""Whether a step costs later what it cost at first: 1,100 steps on one state, driven by those of a recorded run.

The allocation gate is held at 1. Then a twentieth of the link's numbers are subnormal in the first hundred steps; later
writes replace them. The vectors come round after 100 steps, so that the first hundred and the hundred after 1,000 are
driven by the same ones.
"""

from collections.abc import Callable, Iterator
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
SHAPE = {"batch": BATCH, "num_slots": SLOTS, "word_size": WORD, "num_read_heads": HEADS}
Step = Callable[[Tensor], Any]


class Told(fastmem.nn.DNC):
    """A DNC that asks its LSTM and then hears something else, so that what it does to its memory is given."""

    told: Iterator[Tensor]

    def control(self, seen: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        _, hidden, cell = super().control(seen, hidden, cell)
        return next(self.told), hidden, cell


def vectors() -> Tensor:
    found = recorded.interface_vectors(SLOTS)[:WINDOW]
    split(found, interface_shapes(WORD, HEADS, 1)).allocation_gates.fill_(dnc_textbook.CLIP)
    return found


def op(driven: Tensor) -> Step:
    state, reads = dnc_textbook.empty(BATCH, SLOTS, WORD, HEADS, driven), driven.new_zeros(BATCH, HEADS, WORD)
    return lambda vector: fastmem.dnc_step_(vector, *state, reads)


def module(driven: Tensor) -> Step:
    """The loop that the module runs for inference, step by step; its interface layer passes the vectors on."""
    size = driven.shape[-1]
    network = Told(HIDDEN, HIDDEN, SLOTS, WORD, HEADS)
    network.interface = torch.nn.Linear(size, size, bias=False)
    torch.nn.init.eye_(network.interface.weight)
    network.output = torch.nn.Linear(size + HEADS * WORD, HIDDEN)
    network.told = cycle(driven)
    state, input = network.initial_state(BATCH), torch.zeros(BATCH, HIDDEN)

    def step(vector: Tensor) -> None:
        nonlocal state
        _, state = network.step(input, state, in_place=True)

    return step


def eager(driven: Tensor) -> Step:
    state: tuple[Tensor, ...] = dnc_textbook.empty(BATCH, SLOTS, WORD, HEADS, driven)

    def step(vector: Tensor) -> None:
        nonlocal state
        *after, _ = dnc_step.fast_eager(vector, *state)
        state = tuple(after)

    return step


CONTENDERS = {"dnc_step_": op, "nn.DNC, inference": module, "eager step": eager}


@torch.no_grad()
def measure() -> dict[str, Any]:
    """Milliseconds of a step, early and late, and the ratio of the medians."""
    clock, driven = cpu_clock(), vectors()
    found = {}
    for name, begin in CONTENDERS.items():
        step, seconds = begin(driven), []
        for _ in range(LATER // WINDOW + 1):
            for vector in driven:
                start = clock()
                step(vector)
                seconds.append(clock() - start)
        first, later = (spread([1e3 * value for value in seconds[at : at + WINDOW]]) for at in (0, LATER))
        found[name] = {"first_ms": first, "later_ms": later, "ratio": later["median"] / first["median"]}
    return {"shape": SHAPE, "contenders": found}
