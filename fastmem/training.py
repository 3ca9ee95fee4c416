"""Training on the tasks of the papers: settings, the loop, a log, and checkpoints that resume bit for bit.

`python -m fastmem train` drives it. Needs the extra `cli`.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor, nn

from fastmem import tasks
from fastmem.nn import DNC, NTM

TASKS: dict[str, type[tasks.Task]] = {
    "copy": tasks.Copy,
    "long-copy": tasks.LongCopy,
    "repeat-copy": tasks.RepeatCopy,
    "associative-recall": tasks.AssociativeRecall,
    "dynamic-ngrams": tasks.DynamicNGrams,
    "priority-sort": tasks.PrioritySort,
    "block-copy": tasks.BlockCopy,
    "block-recall": tasks.BlockRecall,
    "key-value": tasks.KeyValue,
}
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
FRESH = 1_000_003  # added to the seed of sequences that are not for training: never the stream that training draws from


class Settings(BaseModel):
    """What fixes a run. Two runs with the same settings on the same machine give the same numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    task: str
    task_options: dict[str, Any] = Field(default_factory=dict)
    model: Literal["dnc", "ntm", "lstm"] = "dnc"
    hidden_size: int = Field(default=64, ge=1)
    num_layers: int = Field(default=1, ge=1)  # of the lstm
    num_slots: int = Field(default=16, ge=1)
    word_size: int = Field(default=16, ge=1)
    num_read_heads: int = Field(default=4, ge=1)  # of the dnc
    heads: str = "rw"  # of the ntm
    iterations: int = Field(default=10_000, ge=0)
    batch_size: int = Field(default=16, ge=1)
    optimiser: Literal["rmsprop", "adam"] = "adam"
    learning_rate: float = Field(default=1e-3, gt=0)
    clip_norm: float = Field(default=10.0, gt=0)
    seed: int = 0
    evaluate_every: int = Field(default=500, ge=1)
    evaluation_size: int = Field(default=1000, ge=1)
    solved_at: float | None = None  # stops when an evaluation finds at most so many wrong bits a sequence
    device: str = "cpu"


class Entry(NamedTuple):
    """One line of the log."""

    iteration: int  # how many were done
    loss: float  # nats per sequence
    bit_errors: float  # of the training batch, per sequence
    seconds: float  # of the iteration
    evaluated: float | None  # wrong bits per fresh sequence, where this iteration was followed by an evaluation


class Trained(NamedTuple):
    """What a checkpoint holds, to be used and not trained on."""

    settings: Settings
    iteration: int
    model: nn.Module  # on the CPU

    def fresh(self, seed: int, changes: dict[str, Any]) -> tasks.Batch:
        """One sequence of the task, with some of its options changed, that training never saw."""
        options = self.settings.task_options
        trained, task = (make_task(self.settings.task, given) for given in (options, {**options, **changes}))
        expected, got = ([t.input_size, t.output_size] for t in (trained, task))
        if got != expected:
            raise ValueError(f"option: expected input and output sizes {expected}, as in training, got {got}")
        return task.sample(1, torch.Generator().manual_seed(seed + FRESH))


class Diverged(RuntimeError):
    """The loss is no longer a number."""


class Recurrent(nn.Module):
    """The baseline: an LSTM and a linear layer, called like the models with a memory."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, output_size: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(input_size, hidden_size, num_layers)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        hidden, state = self.recurrent(input)
        return self.output(hidden), state


def make_task(name: str, options: dict[str, Any]) -> tasks.Task:
    """A task by its name. Options may be strings, as from a command line; a wrong one raises ValueError."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    known = [field.name for field in fields(TASKS[name])]
    if unknown := set(options) - set(known):
        raise ValueError(f"{name}: expected options among {', '.join(known)}, got {', '.join(sorted(unknown))}")
    return TypeAdapter(TASKS[name]).validate_python(options)


def make_model(settings: Settings, task: tasks.Task) -> nn.Module:
    if settings.model == "lstm":
        return Recurrent(task.input_size, settings.hidden_size, settings.num_layers, task.output_size)
    if settings.model == "ntm":
        return NTM(
            task.input_size,
            settings.hidden_size,
            settings.num_slots,
            settings.word_size,
            settings.heads,
            task.output_size,
        )
    return DNC(
        task.input_size,
        settings.hidden_size,
        settings.num_slots,
        settings.word_size,
        settings.num_read_heads,
        output_size=task.output_size,
    )


@torch.no_grad()
def evaluate(model: nn.Module, task: tasks.Task, size: int, seed: int, device: str = "cpu") -> float:
    """Wrong bits per sequence over `size` fresh sequences, drawn from `seed`."""
    generator = torch.Generator().manual_seed(seed)
    wrong = 0.0
    for begin in range(0, size, 100):
        count = min(100, size - begin)
        batch = task.sample(count, generator, device)
        wrong += float(tasks.bit_errors(model(batch.input)[0], batch)) * count
    return wrong / size


class Run:
    """A run in a folder, which holds its checkpoint and log. `resume`: goes on from the checkpoint."""

    def __init__(self, settings: Settings, folder: Path, resume: bool = False) -> None:
        self.settings = settings
        self.folder = folder
        self.task = make_task(settings.task, settings.task_options)
        torch.manual_seed(settings.seed)
        self.model = make_model(settings, self.task).to(settings.device)
        optimisers: dict[str, Callable[..., torch.optim.Optimizer]] = {
            "adam": torch.optim.Adam,
            "rmsprop": lambda parameters, lr: torch.optim.RMSprop(parameters, lr=lr, momentum=0.9),
        }
        self.optimiser = optimisers[settings.optimiser](self.model.parameters(), lr=settings.learning_rate)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.iteration = 0
        folder.mkdir(parents=True, exist_ok=True)
        if resume:
            self._load()
        elif (folder / LOG).exists():
            raise ValueError(f"folder: expected a new one or --resume, got {folder}, which holds a run")
        else:
            (folder / LOG).touch()
            self.save()

    @classmethod
    def resumed(cls, folder: Path, **changes: Any) -> "Run":
        """The run that a folder holds, with some settings changed: more iterations, say."""
        settings = {**_checkpoint(folder)["settings"], **changes}
        return cls(Settings(**settings), folder, resume=True)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def train(self) -> Iterator[Entry]:
        """Trains until the iterations are done or the task is solved; yields, and logs, each iteration.

        The checkpoint follows every evaluation. Whoever stops early calls `save`.
        """
        settings = self.settings
        with open(self.folder / LOG, "a") as log:
            while self.iteration < settings.iterations:
                entry = self._iterate()
                log.write(json.dumps(entry._asdict()) + "\n")
                if entry.evaluated is not None:
                    log.flush()
                    self.save()
                yield entry
                if entry.evaluated is not None and entry.evaluated <= (settings.solved_at or -1):
                    return

    def _iterate(self) -> Entry:
        settings, start = self.settings, time.perf_counter()
        batch = self.task.sample(settings.batch_size, self.generator, settings.device)
        output, _ = self.model(batch.input)
        loss = tasks.masked_loss(output, batch)
        if not loss.isfinite():
            kept = _checkpoint(self.folder)["iteration"]
            raise Diverged(
                f"the loss is {loss.item()} at iteration {self.iteration + 1} with seed {settings.seed}; "
                f"the last good checkpoint is {self.folder / CHECKPOINT}, of iteration {kept}"
            )
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        self.optimiser.step()
        self.iteration += 1
        seconds = time.perf_counter() - start
        wrong = float(tasks.bit_errors(output.detach(), batch))
        last = self.iteration == settings.iterations
        evaluated = self.evaluate() if last or self.iteration % settings.evaluate_every == 0 else None
        return Entry(self.iteration, loss.item(), wrong, seconds, evaluated)

    def evaluate(self, task: tasks.Task | None = None) -> float:
        """Wrong bits per sequence on fresh sequences of the run's task, or of another of the same sizes."""
        settings = self.settings
        return evaluate(self.model, task or self.task, settings.evaluation_size, settings.seed + FRESH, settings.device)

    def save(self) -> None:
        """Writes the checkpoint; whatever stops the program meanwhile, one of the two is whole."""
        state = {
            "settings": self.settings.model_dump(),
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
        }
        unfinished = self.folder / f"{CHECKPOINT}.unfinished"
        torch.save(state, unfinished)
        os.replace(unfinished, self.folder / CHECKPOINT)

    def _load(self) -> None:
        state = _checkpoint(self.folder)
        self.iteration = state["iteration"]
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        kept = [entry for entry in read_log(self.folder) if entry.iteration <= self.iteration]
        (self.folder / LOG).write_text("".join(json.dumps(entry._asdict()) + "\n" for entry in kept))


def read_checkpoint(folder: Path) -> Trained:
    """The model of a run and what it was trained on; the folder is left as it is."""
    state = _checkpoint(folder)
    settings = Settings(**state["settings"])
    model = make_model(settings, make_task(settings.task, settings.task_options))
    model.load_state_dict(state["model"])
    return Trained(settings, state["iteration"], model)


def read_log(folder: Path) -> list[Entry]:
    """The log of a run; a last line that was cut off is left out."""
    lines = (folder / LOG).read_text().splitlines(keepends=True)
    return [Entry(**json.loads(line)) for line in lines if line.endswith("\n")]


def _checkpoint(folder: Path) -> dict[str, Any]:
    if not (folder / CHECKPOINT).exists():
        raise ValueError(f"folder: expected one that holds a run, got {folder}")
    return torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
