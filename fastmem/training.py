"""Training on the tasks of the papers: settings, the loop, a log, and checkpoints that resume bit for bit.

`python -m fastmem train` drives it. Needs the extra `cli`.
"""

import inspect
import json
import math
import os
import pickle
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, Self, get_args, get_origin

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model, model_validator
from torch import Tensor, nn

from fastmem import tasks
from fastmem.nn import (
    DNC,
    LRUA,
    NTM,
    NUTM,
    CachedUniformWriting,
    WriteSchedule,
    program_diversity_loss,
    program_diversity_weight,
)
from fastmem.nn.nutm import CORES

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
    "token-sequence": tasks.TokenSequence,
    "sinusoid": tasks.Sinusoid,
    "flattened-digits": tasks.FlattenedDigits,
    "sequencing": tasks.Sequencing,
    "few-shot-digits": tasks.FewShotDigits,
    "continual": tasks.Continual,
}
# Options that the papers set, with our defaults. Graves, "Generating Sequences with Recurrent Neural Networks": alpha
# 0.95, centered, and 1e-4 inside the square root, to which PyTorch's eps of 1e-2 outside comes closest. Public code of
# the NTM: alpha 0.95. Collier and Beel: alpha 0.9. Csordas and Schmidhuber: eps 1e-10.
OPTIMISERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "adam": (torch.optim.Adam, {}),
    "rmsprop": (torch.optim.RMSprop, {"alpha": 0.99, "eps": 1e-8, "momentum": 0.9, "centered": False}),
}
COUNTING = (tasks.RepeatCopy, tasks.Sequencing, tasks.Continual)  # their counts are normalised by a range of repeats
CHANGEABLE = ("iterations", "evaluate_every", "evaluation_size", "solved_at", "device")  # when a run is resumed
CHECKPOINT, LOG = "checkpoint.pt", "log.jsonl"
LARGEST = 2**31 - 1  # of a size: PyTorch's own complaint about more names nothing
FRESH = 1_000_003  # added to the seed of sequences that are not for training: never the stream that training draws from

Size = Annotated[int, Field(ge=1, le=LARGEST)]


class Settings(BaseModel):
    """What fixes a run. Two runs with the same settings on the same machine give the same numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    task: str
    task_options: dict[str, Any] = Field(default_factory=dict)
    model: Literal["dnc", "ntm", "nutm", "lrua", "lstm"] = "dnc"
    hidden_size: Size = 64
    num_layers: Size = 1  # of the lstm, or of the controller
    num_slots: Size = 16
    word_size: Size = 16
    num_read_heads: Size = 4  # of the dnc or lrua
    heads: str = "rw"  # of the ntm
    model_options: dict[str, Any] = Field(default_factory=dict)  # further keyword arguments; of the nutm its core's too
    # When the memory is written and read, up to the first answer: a rule of WriteSchedule, or CachedUniformWriting.
    write_schedule: Literal["dense", "uniform", "uniform_author", "uniform_balanced", "random", "cached"] = "dense"
    write_interval: Size | None = None  # of uniform and cached, where it is not to follow from steps and slots
    attention_size: Size = 16  # of cached
    diversity: float = Field(default=0.1, ge=0)  # of the nutm: first weight of the likeness of its programs' keys
    curriculum: Literal["none", "uniform", "naive", "look-back", "prediction-gain", "phases"] = "none"
    advance_below: float = Field(default=1.0, gt=0)  # errors of the task: naive and look-back then advance,
    doubles: bool = True  # to twice the level, or by one
    iterations: int = Field(default=10_000, ge=0)
    batch_size: Size = 16
    optimiser: Literal["rmsprop", "adam"] = "adam"
    optimiser_options: dict[str, Any] = Field(default_factory=dict)  # see OPTIMISERS
    learning_rate: float = Field(default=1e-3, gt=0, le=1e6)
    clip_norm: float | None = Field(default=10.0, gt=0)  # of the gradient of all parameters
    clip_value: float | None = Field(default=None, gt=0, le=1e30)  # of each element; given alone, in place of the norm
    clip_tensor_norm: float | None = Field(default=None, gt=0)  # of each parameter by itself; as the former
    seed: int = Field(default=0, ge=0, lt=2**63)
    evaluate_every: Size = 500
    evaluation_size: Size = 1000
    solved_at: float | None = None  # stops when an evaluation finds at most so many errors of the task
    device: str = "cpu"
    threads: int = Field(default=1, ge=1)  # more gain little at the sizes of the papers; the command line sets them

    @model_validator(mode="before")
    @classmethod
    def _follow(cls, given: dict[str, Any]) -> dict[str, Any]:
        """What is not given and follows from what is."""
        otherwise = any(given.get(name) is not None for name in ("clip_value", "clip_tensor_norm"))
        in_phases = given.get("task") == "continual"
        return {
            **({"clip_norm": None} if otherwise else {}),
            **({"curriculum": "phases"} if in_phases else {}),
            **given,
        }

    @model_validator(mode="after")
    def _fit(self) -> Self:
        if self.model == "lstm" and self.write_schedule != "dense":
            raise ValueError(f"write_schedule: expected dense, as an lstm has no memory, got {self.write_schedule}")
        if self.write_interval is not None and self.write_schedule not in ("uniform", "cached"):
            raise ValueError(
                f"write_interval: expected none, as the write schedule is {self.write_schedule}, "
                f"got {self.write_interval}"
            )
        for name, user, used in (
            ("attention_size", "a cached write schedule", self.write_schedule == "cached"),
            ("diversity", "a nutm", self.model == "nutm"),
        ):
            given, default = getattr(self, name), type(self).model_fields[name].default
            if given != default and not used:
                raise ValueError(f"{name}: expected {default}, as only {user} uses it, got {given}")
        return self


class Entry(NamedTuple):
    """One line of the log."""

    iteration: int  # how many were done
    loss: float  # in the task's loss_unit: nats per sequence
    bit_errors: float  # of the training batch, by the task's measure: wrong bits a sequence, or tokens, ...
    seconds: float  # of the iteration
    evaluated: float | None  # the same of fresh sequences, where this iteration was followed by an evaluation
    level: int | None  # of the batch; None without a curriculum
    accuracy: float  # share of what is asked for in the training batch that is right
    accuracies: dict[str, float] | None = None  # of the fresh sequences, where the evaluation has parts


class Evaluation(NamedTuple):
    """What came of fresh sequences."""

    errors: float  # by the task's measure
    accuracy: float
    accuracies: dict[str, float]  # by task in continual learning, by presentation in few-shot learning


class Trained(NamedTuple):
    """What a checkpoint holds, to be used and not trained on."""

    settings: Settings
    iteration: int
    model: nn.Module  # on the CPU

    @property
    def task(self) -> tasks.Task:
        return make_task(self.settings.task, self.settings.task_options)

    @property
    def title(self) -> str:
        """The model, its task, and how long it was trained, for a picture."""
        rule = self.settings.write_schedule
        writes = "" if rule == "dense" else f" with {rule} writes"
        return f"{self.settings.model}{writes} on {self.settings.task} after {self.iteration} iterations"

    def fresh(self, seed: int, changes: dict[str, Any]) -> tasks.Batch:
        """One sequence of the task, with some of its options changed, that training never saw."""
        trained, task = self.task, variant(self.settings, changes)
        expected, got = ([t.input_size, t.output_size] for t in (trained, task))
        if got != expected:
            raise ValueError(f"option: expected input and output sizes {expected}, as in training, got {got}")
        return task.held_out().sample(1, torch.Generator().manual_seed(seed + FRESH))


class Diverged(RuntimeError):
    """The loss, the gradient or a parameter is no longer finite."""


class Recurrent(nn.Module):
    """The baseline: an LSTM and a linear layer, called like the models with a memory."""

    def __init__(self, input_size: int, hidden_size: int, num_layers: int, output_size: int) -> None:
        super().__init__()
        self.recurrent = nn.LSTM(input_size, hidden_size, num_layers)
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, input: Tensor) -> tuple[Tensor, Any]:
        hidden, state = self.recurrent(input)
        return self.output(hidden), state


class Scheduled(nn.Module):
    """A network that reads by a write schedule, or cached, and answers with a write in every step."""

    def __init__(self, net: nn.Module, schedule: WriteSchedule) -> None:
        super().__init__()
        self.net: Any = net
        self.schedule = schedule

    def forward(self, input: Tensor, read_steps: int | None = None) -> tuple[Tensor, Any]:
        """Runs sequences. `read_steps`: how many steps are read before the answer; None: all of them."""
        cached = isinstance(self.net, CachedUniformWriting)
        read = input[:read_steps]
        output, state = self.net(read) if cached else self.net(read, write_schedule=self.schedule)
        if len(read) == len(input):
            return output, state
        answer, state = (self.net.net if cached else self.net)(input[len(read) :], state)
        return torch.cat([output, answer]), state

    def acts(self, steps: int, read_steps: int | None = None) -> Tensor:
        """In which steps of a sequence the memory is written and read: bools [T]."""
        slots = next(part.num_slots for part in self.modules() if isinstance(part, DNC | NTM | LRUA))
        acts = torch.ones(steps, dtype=torch.bool)
        read = acts[:read_steps]
        read[:] = self.schedule.steps(len(read), slots)
        return acts


def outputs(model: nn.Module, task: tasks.Task, input: Tensor) -> Tensor:
    """The raw output of a model for sequences of a task."""
    return (model(input, task.read_steps) if isinstance(model, Scheduled) else model(input))[0]


MODELS: dict[str, Any] = {"dnc": DNC, "ntm": NTM, "nutm": NUTM, "lrua": LRUA, "lstm": Recurrent}


def make_task(name: str, options: dict[str, Any]) -> tasks.Task:
    """A task by its name. Options may be strings, as from a command line; a wrong one raises ValueError."""
    if name not in TASKS:
        raise ValueError(f"task: expected one of {', '.join(TASKS)}, got {name!r}")
    known = {field.name: field.type for field in fields(TASKS[name])}
    return TypeAdapter(TASKS[name]).validate_python(_checked(name, options, known))


def variant(settings: Settings, changes: dict[str, Any]) -> tasks.Task:
    """The task of a run with some options changed, for the network that it trained: a count means what it meant."""
    trained = make_task(settings.task, settings.task_options)
    pinned = {"count_range": trained.lesson(1).count_range} if isinstance(trained, COUNTING) else {}
    return make_task(settings.task, {**settings.task_options, **pinned, **changes})


def make_model(settings: Settings, task: tasks.Task) -> nn.Module:
    """The model on the CPU, with parameters from the global seed. Its options may be strings, as those of a task."""
    arguments = _arguments(settings)
    sizes = settings.model_dump(include=arguments.keys() - {"device"})
    fixed = {"input_size", "output_size", "batch_first", "device", "dtype", *sizes}
    known = {name: (kind.annotation, kind.default) for name, kind in arguments.items() if name not in fixed}
    options = _converted(settings.model, settings.model_options, known)
    net: Any = MODELS[settings.model](input_size=task.input_size, output_size=task.output_size, **sizes, **options)
    rule, interval = settings.write_schedule, settings.write_interval
    if rule == "dense":
        return net
    if rule == "cached":
        cached = CachedUniformWriting(net, interval, settings.attention_size)
        return Scheduled(cached, cached.schedule)
    return Scheduled(net, WriteSchedule(rule, interval=interval, seed=settings.seed))


def _arguments(settings: Settings) -> dict[str, inspect.Parameter]:
    """Those of the model, and of its core where it has one."""
    arguments = dict(inspect.signature(MODELS[settings.model]).parameters)
    if settings.model == "nutm":
        core = settings.model_options.get("core", "ntm")
        if core not in CORES:
            raise ValueError(f"core: expected one of {', '.join(CORES)}, got {core!r}")
        del arguments["options"]
        arguments |= inspect.signature(CORES[core]).parameters
    return arguments


def make_optimiser(settings: Settings, model: nn.Module) -> torch.optim.Optimizer:
    optimiser, defaults = OPTIMISERS[settings.optimiser]
    known = {name: (type(default), default) for name, default in defaults.items()}
    options = defaults | _converted(settings.optimiser, settings.optimiser_options, known)
    return optimiser(model.parameters(), lr=settings.learning_rate, **options)  # type: ignore[call-arg]


def make_curriculum(settings: Settings, task: tasks.Task, generator: torch.Generator) -> tasks.Curriculum:
    if settings.curriculum != "none" and task.levels == 1:
        raise ValueError(f"curriculum: expected none, as {task} has one level, got {settings.curriculum!r}")
    if settings.curriculum in ("naive", "look-back"):
        kind = tasks.Naive if settings.curriculum == "naive" else tasks.LookBack
        return kind(task.levels, generator, settings.advance_below, settings.doubles)
    if settings.curriculum == "phases":
        return tasks.Phases(task.levels, generator, settings.iterations)
    kinds = {"none": tasks.Curriculum, "uniform": tasks.Uniform, "prediction-gain": tasks.PredictionGain}
    return kinds[settings.curriculum](task.levels, generator)


def count_parameters(settings: Settings) -> int:
    with torch.device("meta"):  # no memory, and nothing drawn
        model = make_model(settings, make_task(settings.task, settings.task_options))
    return sum(parameter.numel() for parameter in model.parameters())


def matched_lstm(settings: Settings, num_layers: int = 1) -> Settings:
    """The settings with an LSTM in place of the model, of the width that comes nearest to its number of parameters."""
    wanted = count_parameters(settings)

    def lstm(hidden_size: int) -> Settings:
        changes = {"model": "lstm", "model_options": {}, "hidden_size": hidden_size, "num_layers": num_layers}
        unused = ("write_schedule", "write_interval", "attention_size", "diversity")
        defaults = {name: Settings.model_fields[name].default for name in unused}
        return settings.model_copy(update={**changes, **defaults})

    widths = range(1, math.isqrt(wanted) + 2)  # an LSTM has more parameters than the square of its width
    above = bisect_left(widths, wanted, key=lambda width: count_parameters(lstm(width)))
    nearest = min(widths[max(above - 1, 0) : above + 1], key=lambda width: abs(count_parameters(lstm(width)) - wanted))
    return lstm(nearest)


def _checked(owner: str, options: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Options of known names with their types; where these allow it "none" is None, and commas part a tuple."""
    if unknown := options.keys() - known.keys():
        expected = f"options among {', '.join(known)}" if known else "no options"
        raise ValueError(f"{owner}: expected {expected}, got {', '.join(sorted(unknown))}")
    kinds = {name: [known[name], *get_args(known[name])] for name in options}
    for name, value in options.items():
        if int in kinds[name] and str(value).isdecimal() and int(value) > LARGEST:
            raise ValueError(f"{name}: expected at most {LARGEST}, got {value}")
    return {name: _parsed(value, kinds[name]) for name, value in options.items()}


def _parsed(value: Any, kinds: list[Any]) -> Any:
    if value == "none" and NoneType in kinds:
        return None
    if isinstance(value, str) and any(get_origin(kind) is tuple for kind in kinds):
        return value.split(",")
    return value


def _converted(owner: str, options: dict[str, Any], known: dict[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Options, maybe strings, of known names with (type, default), as values of these types; only those given."""
    checked = _checked(owner, options, {name: kind for name, (kind, _) in known.items()})
    return create_model(owner, **known)(**checked).model_dump(exclude_unset=True)  # type: ignore[call-overload]


@torch.no_grad()
def evaluate(model: nn.Module, task: tasks.Task, size: int, seed: int, device: str = "cpu") -> Evaluation:
    """What a model makes of `size` fresh sequences, of data held out where there is such, drawn from `seed`."""
    task, generator = task.held_out(), torch.Generator().manual_seed(seed)
    wrong = possible = 0.0
    shares: dict[str, float] = {}
    training = model.training
    model.eval()  # hard programs are then not drawn
    for begin in range(0, size, 100):
        count = min(100, size - begin)
        batch = task.sample(count, generator, device)
        output = outputs(model, task, batch.input)
        wrong += float(task.errors(output, batch)) * count
        possible += float(task.possible_errors(batch)) * count
        if isinstance(task, tasks.FewShot):
            for number, share in task.accuracy_by_presentation(output, batch).items():
                name = f"presentation {number}"
                shares[name] = shares.get(name, 0.0) + share * count / size
    model.train(training)
    return Evaluation(wrong / size, 1 - wrong / possible, shares)


class Run:
    """A run in a folder, which holds its checkpoint and log. `resume`: goes on from the checkpoint."""

    def __init__(self, settings: Settings, folder: Path, resume: bool = False) -> None:
        self.settings = settings
        self.folder = folder
        self.task = make_task(settings.task, settings.task_options)
        if getattr(self.task, "part", "train") != "train":
            raise ValueError("part: expected train, as what is held out is for evaluations, got test")
        _check_device(settings.device)
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(settings.seed)
            self.model = make_model(settings, self.task).to(settings.device)
        self.optimiser = make_optimiser(settings, self.model)
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.curriculum = make_curriculum(settings, self.task, self.generator)
        self.iteration = 0
        self.solved = False  # by the evaluation after the last iteration
        for name in () if resume else (CHECKPOINT, LOG):
            if (folder / name).exists():
                raise ValueError(f"folder: expected a new one or --resume, got {folder}, which holds {name}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"folder: expected one to write to, got {folder}: {error.strerror}") from None
        if resume:
            self._load()
        else:
            self.save()
            (folder / LOG).touch()

    @classmethod
    def resumed(cls, folder: Path, /, **changes: Any) -> "Run":
        """The run that a folder holds, with some of the CHANGEABLE settings changed: more iterations, say."""
        for name in changes.keys() - set(CHANGEABLE):
            raise ValueError(
                f"{name}: expected to stay as it was in the run that is resumed, got {changes[name]!r}; "
                f"what may change is {', '.join(CHANGEABLE)}"
            )
        settings = {**_checkpoint(folder)["settings"], **changes}
        return cls(Settings(**settings), folder, resume=True)

    @property
    def parameters(self) -> int:
        return count_parameters(self.settings)

    def train(self) -> Iterator[Entry]:
        """Trains until the iterations are done or the task is solved; yields, and logs, each iteration.

        The checkpoint follows every evaluation. Whoever stops early calls `save`.
        """
        settings = self.settings
        with open(self.folder / LOG, "a") as log:
            while self.iteration < settings.iterations and not self.solved:
                entry = self._iterate()
                self.solved = self._solves(entry)
                log.write(json.dumps(entry._asdict()) + "\n")
                if entry.evaluated is not None:
                    log.flush()
                    self.save()
                yield entry

    def _solves(self, entry: Entry) -> bool:
        enough = self.settings.solved_at
        return enough is not None and entry.evaluated is not None and entry.evaluated <= enough

    def _iterate(self) -> Entry:
        settings, start = self.settings, time.perf_counter()
        level = self.curriculum.draw()
        task = self.task if level is None else self.task.lesson(level)
        batch = task.sample(settings.batch_size, self.generator, settings.device)
        with self._drawn_by_the_network():
            output = outputs(self.model, task, batch.input)
        loss = task.loss(output, batch)
        if not loss.isfinite():
            raise self._diverged(f"the loss is {loss.item()}", self.iteration + 1)
        self.optimiser.zero_grad(set_to_none=True)
        (loss + self._regulariser()).backward()
        if settings.clip_value is not None:
            nn.utils.clip_grad_value_(self.model.parameters(), settings.clip_value)
        if settings.clip_tensor_norm is not None:
            for parameter in self.model.parameters():
                nn.utils.clip_grad_norm_(parameter, settings.clip_tensor_norm)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm or math.inf)
        if not norm.isfinite():
            raise self._diverged(f"the norm of the gradient is {norm.item()}", self.iteration + 1)
        self.optimiser.step()
        self.curriculum.trained(lambda: self._gain(loss.item(), task, batch))
        self.iteration += 1
        seconds = time.perf_counter() - start
        output = output.detach()
        wrong, accuracy = float(task.errors(output, batch)), float(task.accuracy(output, batch))
        regular, last = self.iteration % settings.evaluate_every == 0, self.iteration == settings.iterations
        ended = isinstance(self.curriculum, tasks.Phases) and self.curriculum.ended
        found = self.evaluate() if regular or last or ended else None
        evaluated, accuracies = (None, None) if found is None else (found.errors, found.accuracies or None)
        if regular:  # where a run happens to end, its lessons do not change
            self.curriculum.evaluated(lambda level: self.evaluate(self.task.lesson(level)).errors)
        return Entry(self.iteration, loss.item(), wrong, seconds, evaluated, level, accuracy, accuracies)

    @contextmanager
    def _drawn_by_the_network(self) -> Iterator[None]:
        """Hard programs are drawn from PyTorch's own generator: anew from the seed, so that a resumed run goes on."""
        cuda = torch.device(self.settings.device).type == "cuda"
        seed = (self.settings.seed + FRESH * self.iteration) % 2**63
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else ()):
            torch.default_generator.manual_seed(seed)
            if cuda:
                torch.cuda.manual_seed_all(seed)
            yield

    def _regulariser(self) -> Tensor | float:
        """What is added to the loss of the task."""
        settings = self.settings
        if settings.model != "nutm" or not settings.diversity:
            return 0.0
        return program_diversity_weight(self.iteration, settings.diversity) * program_diversity_loss(self.model)

    def _diverged(self, what: str, iteration: int) -> Diverged:
        return Diverged(
            f"{what} at iteration {iteration} with seed {self.settings.seed}; the last good checkpoint is "
            f"{self.folder / CHECKPOINT}, of iteration {_checkpoint(self.folder)['iteration']}"
        )

    @torch.no_grad()
    def _gain(self, loss: float, task: tasks.Task, batch: tasks.Batch) -> float:
        """By how much the step lowered the loss of its batch, per step of the sequences."""
        with self._drawn_by_the_network():
            return (loss - float(task.loss(outputs(self.model, task, batch.input), batch))) / len(batch.input)

    def evaluate(self, task: tasks.Task | None = None) -> Evaluation:
        """What it makes of fresh sequences of the run's task, or of another of the same sizes.

        Of the tasks of continual learning there are as many each, and the means count.
        """
        if task is None and isinstance(self.task, tasks.Continual):
            found = {name: self.evaluate(part) for name, part in self.task.tasks.items()}
            accuracies = {name: one.accuracy for name, one in found.items()}
            return Evaluation(fmean(one.errors for one in found.values()), fmean(accuracies.values()), accuracies)
        settings = self.settings
        return evaluate(self.model, task or self.task, settings.evaluation_size, settings.seed + FRESH, settings.device)

    def save(self) -> None:
        """Writes the checkpoint; whatever stops the program meanwhile, the one before or this one is whole."""
        if not all(parameter.isfinite().all() for parameter in self.model.parameters()):
            raise self._diverged("a parameter is not finite", self.iteration)
        state = {
            "settings": self.settings.model_dump(),
            "iteration": self.iteration,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "curriculum": self.curriculum.state_dict(),
        }
        unfinished = self.folder / f"{CHECKPOINT}.unfinished"
        torch.save(state, unfinished)
        os.replace(unfinished, self.folder / CHECKPOINT)

    def _load(self) -> None:
        state = _checkpoint(self.folder)
        with _by_this_version(self.folder / CHECKPOINT):
            self.iteration = state["iteration"]
            self.model.load_state_dict(state["model"])
            self.optimiser.load_state_dict(state["optimiser"])
            self.generator.set_state(state["generator"])
            self.curriculum.load_state_dict(state["curriculum"])
        entries = read_log(self.folder) if self.iteration else []  # a run stopped at its start may have no log
        kept = [entry for entry in entries if entry.iteration <= self.iteration]
        self.solved = bool(kept) and self._solves(kept[-1])
        (self.folder / LOG).write_text("".join(json.dumps(entry._asdict()) + "\n" for entry in kept))


def read_checkpoint(folder: Path) -> Trained:
    """The model of a run and what it was trained on; the folder is left as it is."""
    state = _checkpoint(folder)
    with _by_this_version(folder / CHECKPOINT), torch.random.fork_rng(devices=()):
        settings = Settings(**state["settings"])
        model = make_model(settings, make_task(settings.task, settings.task_options))
        model.load_state_dict(state["model"])
        return Trained(settings, state["iteration"], model.eval())


def read_log(folder: Path) -> list[Entry]:
    """The log of a run; a last line that was cut off is left out."""
    _check_holds(folder, LOG)
    lines = (folder / LOG).read_text().splitlines(keepends=True)
    with _by_this_version(folder / LOG):
        return [Entry(**json.loads(line)) for line in lines if line.endswith("\n")]


def _checkpoint(folder: Path) -> dict[str, Any]:
    _check_holds(folder, CHECKPOINT)
    with _by_this_version(folder / CHECKPOINT):
        state = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
        Settings(**state["settings"])
        return state


def _check_holds(folder: Path, name: str) -> None:
    if not (folder / name).exists():
        raise ValueError(f"folder: expected one that holds a run, got {folder}, which has no {name}")


@contextmanager
def _by_this_version(path: Path) -> Iterator[None]:
    """Names the file for whatever goes wrong when it is read."""
    try:
        yield
    except pickle.UnpicklingError:  # a page of advice on unsafe files
        raise ValueError(f"folder: expected a run by this version, got {path}, which is no checkpoint") from None
    except (EOFError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error).partition("\n")[0]
        raise ValueError(f"folder: expected a run by this version, got {path}: {reason}") from None


def _check_device(device: str) -> None:
    try:
        torch.zeros(1, device=device).item()
    except (AssertionError, NotImplementedError, RuntimeError) as error:  # PyTorch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that works here, such as cpu, got {device!r}: {reason}") from None
