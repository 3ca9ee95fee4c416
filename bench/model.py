"""Part d of the main job: a DNC trained on repeat copy with fastmem, with eager steps, and with PyPI's dnc 1.1.0.

fastmem, the textbook step and the fastest eager step that we found start from the same parameters and see the same
batches, so their loss curves must agree until rounding tells them apart. dnc 1.1.0 has its own initialisation and
slightly other maths; it sees the same batches. All take turns, one iteration each, so that the ratios of their times
are paired.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import fastmem
from bench.peers.dnc_eager import EagerDNC
from bench.peers.dnc_pypi import PypiDNC
from bench.peers.dnc_textbook import TextbookDNC
from bench.timing import Contender, cpu_clock, spread, summarise
from fastmem.tasks import Batch, RepeatCopy, masked_loss

OURS = "fastmem"
TASK = RepeatCopy(bits=4, min_length=1, max_length=3, min_repeats=1, max_repeats=2)
BATCH = 16
SHAPE = {"hidden_size": 64, "num_slots": 128, "word_size": 32, "num_read_heads": 4}
LEARNING_RATE = 1e-3
WARM_UP = 5


@dataclass
class Trainer:
    network: nn.Module
    losses: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.RMSprop(self.network.parameters(), lr=LEARNING_RATE, momentum=0.9)

    def train(self, batch: Batch) -> None:
        loss = masked_loss(self.network(batch.input)[0], batch)
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 10.0)
        self.optimiser.step()
        self.losses.append(loss.item())


def trainers() -> dict[str, Trainer]:
    sizes: dict[str, Any] = {"input_size": TASK.input_size, "output_size": TASK.output_size, **SHAPE}
    torch.manual_seed(0)
    ours = fastmem.nn.DNC(**sizes)
    made = {OURS: Trainer(ours), "textbook": Trainer(TextbookDNC(**sizes)), "eager": Trainer(EagerDNC(**sizes))}
    for trainer in made.values():
        trainer.network.load_state_dict(ours.state_dict())
    if importlib.util.find_spec("dnc") is not None:
        made["dnc 1.1.0"] = Trainer(PypiDNC(**sizes))
    return made


def train(iterations: int, progress: Callable[[], Any]) -> dict[str, Any]:
    """Milliseconds per time step and loss of each contender. CPU time on one thread, else wall time."""
    clock = cpu_clock()
    racing = trainers()
    generator = torch.Generator().manual_seed(0)
    samples: dict[str, list[float]] = {name: [] for name in racing}
    for iteration in range(iterations):
        batch = TASK.sample(BATCH, generator)
        names = list(racing)
        for name in names if iteration % 2 == 0 else reversed(names):
            start = clock()
            racing[name].train(batch)
            samples[name].append((clock() - start) / batch.input.shape[0])
        progress()
    summary = summarise({name: values[WARM_UP:] for name, values in samples.items()}, OURS)
    first, last = racing[OURS].losses, racing["textbook"].losses
    return {
        "shape": {"batch": BATCH, **SHAPE},
        "iterations": iterations,
        "threads": torch.get_num_threads(),
        "contenders": summary,
        "losses": {name: trainer.losses for name, trainer in racing.items()},
        "largest_early_loss_gap": max(abs(a - b) / b for a, b in zip(first[:20], last[:20], strict=True)),
        "final_loss": {name: spread(trainer.losses[-20:])["median"] for name, trainer in racing.items()},
    }


def memory_contenders() -> dict[str, Contender]:
    batch = TASK.sample(BATCH, torch.Generator().manual_seed(0))
    return {
        name: Contender(lambda trainer=trainer: trainer.train(batch))  # type: ignore[misc]
        for name, trainer in trainers().items()
    }
