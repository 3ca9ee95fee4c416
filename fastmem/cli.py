"""The command line: `python -m fastmem info`, `bench`, `train` and `plot`. Needs the extra `cli`."""

import importlib.util
import os
import platform
import re
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from enum import StrEnum
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperArgument, TyperCommand, TyperOption

import fastmem

if TYPE_CHECKING:
    from fastmem import training

app = typer.Typer(help=fastmem.__doc__, add_completion=False, no_args_is_help=True)
console = Console()
CORES = os.cpu_count() or 1


class Part(StrEnum):
    verify = "verify"
    ops = "ops"
    long = "long"
    model = "model"


@app.command()
def info() -> None:
    """Versions, the C++ extension, and which backend serves each op here and why."""
    versions = Table(title="fastmem", show_header=False, title_justify="left")
    for name, value in facts().items():
        versions.add_row(name, value)
    backends = Table("op", "backend", "available", "reason", title="backends", title_justify="left")
    for op, rows in fastmem.backends().items():
        for index, (backend, available, reason) in enumerate(rows):
            backends.add_row("" if index else op, backend, "yes" if available else "no", reason)
    console.print(versions, backends)


@app.command()
def bench(
    only: Annotated[list[Part] | None, typer.Option(help="Run only this part; may be repeated.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Every shape, torch.compile too, and longer runs.")] = False,
    results: Annotated[Path | None, typer.Option(help="Where to write. Default: bench/results.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=CORES, help="Threads for PyTorch and the kernels.")] = 1,
) -> None:
    """Verifies every op on every backend, races them against eager PyTorch and torch.compile, and trains a DNC."""
    root = source_tree()
    if root is None:
        console.print("The benchmark lives in the source tree: run this command in a checkout of fastmem.")
        raise typer.Exit(1)
    _require("bench", "matplotlib", "jinja2")
    sys.path.insert(0, str(root))
    from bench import main

    raise typer.Exit(main.run(console, {part.value for part in only or Part}, full, results, threads))


class Model(StrEnum):
    dnc = "dnc"
    ntm = "ntm"
    nutm = "nutm"
    lrua = "lrua"
    lstm = "lstm"


class Optimiser(StrEnum):
    adam = "adam"
    rmsprop = "rmsprop"


class Curriculum(StrEnum):
    none = "none"
    uniform = "uniform"
    naive = "naive"
    look_back = "look-back"
    prediction_gain = "prediction-gain"
    phases = "phases"


class Schedule(StrEnum):
    dense = "dense"
    uniform = "uniform"
    uniform_author = "uniform_author"
    uniform_balanced = "uniform_balanced"
    random = "random"
    cached = "cached"


class TrainCommand(TyperCommand):
    """Its help shows the tasks and the defaults of the settings; pydantic is imported for that only then."""

    def format_help(self, *arguments: Any) -> None:
        _require("train", "pydantic")
        from fastmem.training import TASKS, Settings

        for option in self.params:
            default = Settings.model_fields[option.name].default if option.name in Settings.model_fields else None
            if isinstance(option, TyperArgument):
                option.help = f"One of {', '.join(TASKS)}."
            if isinstance(option, TyperOption) and isinstance(default, str | int | float):
                option.help = f"{option.help} Default: {option.name if default is True else default}."
        super().format_help(*arguments)


@app.command(cls=TrainCommand)
def train(
    context: typer.Context,
    task: Annotated[str | None, typer.Argument()] = None,
    model: Annotated[Model | None, typer.Option(help="What to train.")] = None,
    task_options: Annotated[
        list[str] | None, typer.Option("--option", help="Of the task, as max_length=10; may be repeated.")
    ] = None,
    model_options: Annotated[
        list[str] | None,
        typer.Option("--model-option", help="Of a model with a memory, as clip=none; may be repeated."),
    ] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Width of the controller, or of the lstm.")] = None,
    num_layers: Annotated[int | None, typer.Option(help="Layers of the controller, or of the lstm.")] = None,
    num_slots: Annotated[int | None, typer.Option(help="Rows of the memory.")] = None,
    word_size: Annotated[int | None, typer.Option(help="Width of the memory.")] = None,
    num_read_heads: Annotated[int | None, typer.Option(help="Read heads of the dnc or lrua, or a nutm on one.")] = None,
    heads: Annotated[
        str | None, typer.Option(help="Of the ntm or a nutm on one: a letter each, r reads and w writes.")
    ] = None,
    write_schedule: Annotated[
        Schedule | None,
        typer.Option(
            help="When the memory is written and read: of the steps before the answer, which has all, or of all steps "
            "in tasks whose samples differ in length; cached: every few steps, from a cache of states."
        ),
    ] = None,
    write_interval: Annotated[
        int | None, typer.Option(help="Of uniform and cached, in place of one by the steps and slots.")
    ] = None,
    attention_size: Annotated[int | None, typer.Option(help="Width of the attention of cached.")] = None,
    diversity: Annotated[
        float | None, typer.Option(help="First weight of what keeps the programs of the nutm apart; 0: none.")
    ] = None,
    curriculum: Annotated[
        Curriculum | None,
        typer.Option(help="How the difficulty of a batch is chosen; the task continual has phases by itself."),
    ] = None,
    advance_below: Annotated[
        float | None,
        typer.Option(help="Errors, such as wrong bits a sequence, at which naive and look-back make it harder."),
    ] = None,
    doubles: Annotated[
        bool | None, typer.Option("--doubles/--by-one", help="How much harder they make it: twice, or by one.")
    ] = None,
    iterations: Annotated[int | None, typer.Option(help="Batches to train on.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Sequences in a batch.")] = None,
    optimiser: Annotated[Optimiser | None, typer.Option(help="That of PyTorch; rmsprop with momentum 0.9.")] = None,
    optimiser_options: Annotated[
        list[str] | None, typer.Option("--optimiser-option", help="Of rmsprop, as alpha=0.95; may be repeated.")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of the optimiser.")] = None,
    clip_norm: Annotated[float | None, typer.Option(help="Largest norm of the gradient of all parameters.")] = None,
    clip_value: Annotated[
        float | None, typer.Option(help="Largest absolute value in the gradient; given alone, in place of the norm.")
    ] = None,
    clip_tensor_norm: Annotated[
        float | None, typer.Option(help="Largest norm of the gradient of each parameter; as --clip-value.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the parameters and of the data.")] = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Iterations between evaluations and checkpoints.")] = None,
    evaluation_size: Annotated[int | None, typer.Option(help="Fresh sequences in an evaluation.")] = None,
    solved_at: Annotated[
        float | None, typer.Option(help="Stop at so many errors, such as wrong bits, a fresh sequence.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, ...")] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=CORES, help="Threads for PyTorch and the kernels.")] = None,
    folder: Annotated[Path | None, typer.Option(help="Where the run is kept. Default: runs/TASK-MODEL-SEED.")] = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            help="Go on with the run in this folder, by its settings; given anew may be --iterations, --solved-at, "
            "--evaluate-every, --evaluation-size and --device."
        ),
    ] = None,
) -> None:
    """Trains a model on a task; ctrl-C saves, and --resume continues bit for bit."""
    given = {name: value for name, value in locals().items() if value is not None and name != "context"}
    _require("train", "pydantic")
    from fastmem import training

    given |= {name: dict(map(_pair, given[name])) for name in given if name.endswith("_options")}
    with _failures():
        with _usage():
            if resume is not None:
                _refuse_changes(context, given.keys() - {*training.CHANGEABLE, "resume"}, training.CHANGEABLE)
                del given["resume"]
                run = training.Run.resumed(resume, **given)
            else:
                given.pop("folder", None)
                settings = training.Settings(**{"task": "", **given})
                name = f"{settings.task}-{settings.model}-{settings.seed}"
                run = training.Run(settings, folder or Path("runs") / name)
        torch.set_num_threads(min(run.settings.threads, CORES))  # a run from a larger machine goes on here
        what = f"{run.settings.model} with {run.parameters:,} parameters on {run.task}"
        console.print(f"{what}; the run is in {run.folder}")
        with _interrupted() as interrupted:
            _train(run, interrupted)
        if run.solved:
            console.print(f"solved after {run.iteration} iterations: --solved-at was {run.settings.solved_at}")
        elif interrupted:
            run.save()
            console.print(f"stopped after {run.iteration} iterations; go on with --resume {run.folder}")
            raise typer.Exit(130)


def _refuse_changes(context: typer.Context, names: set[str], changeable: tuple[str, ...]) -> None:
    """Names the flags, as they were typed, that cannot be given with --resume."""
    for parameter in context.command.params:
        if parameter.name in names and isinstance(parameter, TyperArgument | TyperOption):
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changeable)
            raise typer.BadParameter(
                f"expected to stay as it was in the run that is resumed; what may change is {flags}", param=parameter
            )


@contextmanager
def _usage() -> Iterator[None]:
    """What was asked for and cannot be had, in our words."""
    from pydantic import ValidationError

    try:
        yield
    except ValidationError as error:
        raise typer.BadParameter("; ".join(map(_wrong, error.errors()))) from None
    except OSError as error:
        raise typer.BadParameter(f"{error.filename}: {error.strerror}") from None
    except (ImportError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None


@contextmanager
def _failures() -> Iterator[None]:
    """What ends a run that was asked for rightly: it diverged, or there is no memory for it."""
    from fastmem.training import Diverged

    try:
        yield
    except Diverged as error:
        console.print(f"[red]{escape(str(error))}")
        raise typer.Exit(1) from None
    except (MemoryError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        # PyTorch has a type of its own for the memory of a GPU only; a size beyond all memory overflows
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and not re.search("allocat|overflow", reason):
            raise
        console.print(f"[red]out of memory: expected sizes that fit this machine: {escape(reason)}")
        raise typer.Exit(1) from None


@contextmanager
def _interrupted() -> Iterator[list[int]]:
    """Ctrl-C fills the list, so that an iteration ends whole and its state can be saved; a second one acts at once."""
    signals: list[int] = []

    def interrupt(number: int, _: Any) -> None:
        signals.append(number)
        signal.signal(signal.SIGINT, before)

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def _wrong(error: Any) -> str:
    """One of pydantic's errors in our words."""
    if "error" in error.get("ctx", {}):
        return str(error["ctx"]["error"])
    name, message = ".".join(map(str, error["loc"])), error["msg"].replace("Input should be", "expected")
    return f"{name}: {message}, got {error['input']!r}"


def _train(run: "training.Run", interrupted: list[int]) -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn(f"loss {{task.fields[loss]:.3f}}  {run.task.share} {{task.fields[accuracy]:.1%}}"),
        TextColumn("{task.fields[speed]:.1f} it/s"), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console) as progress, _tensorboard(run) as board:
        bar = progress.add_task(
            run.settings.task, total=run.settings.iterations, completed=run.iteration,
            loss=0.0, accuracy=0.0, speed=0.0,
        )  # fmt: skip
        recent: deque[training.Entry] = deque(maxlen=100)
        for entry in run.train():
            recent.append(entry)
            loss, accuracy, seconds = (
                fmean(getattr(past, name) for past in recent) for name in ("loss", "accuracy", "seconds")
            )
            progress.update(bar, completed=entry.iteration, loss=loss, accuracy=accuracy, speed=1 / max(seconds, 1e-9))
            if board is not None:
                board.add_scalar("loss", entry.loss, entry.iteration)
                board.add_scalar(run.task.measure, entry.bit_errors, entry.iteration)
                board.add_scalar(run.task.share, entry.accuracy, entry.iteration)
            if entry.evaluated is not None:
                level = (
                    "" if entry.level is None else f"; the last batch was at level {entry.level} of {run.task.levels}"
                )
                shares = ", ".join(f"{name} {share:.1%}" for name, share in (entry.accuracies or {}).items())
                progress.console.print(
                    f"iteration {entry.iteration}: {entry.evaluated:.3f} {run.task.measure} over "
                    f"{run.settings.evaluation_size} fresh ones{level}{'; accuracy: ' * bool(shares)}{shares}"
                )
            if interrupted:
                break


def _tensorboard(run: "training.Run") -> AbstractContextManager[Any]:
    if importlib.util.find_spec("tensorboard") is None:
        return nullcontext()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run.folder), purge_step=run.iteration + 1)  # what a resumed run does again


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.", metavar="RUN")],
    output: Annotated[Path, typer.Option(help="Folder of the pictures; older ones are replaced.")] = Path("plots"),
    option: Annotated[
        list[str] | None, typer.Option(help="Of the task of the sequence, as min_length=20; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Of the sequence.")] = 0,
) -> None:
    """Draws the losses of runs in loss.png, and in RUN.png what a model does with a fresh sequence, step by step.

    Input, target and output; of a model with a memory also the programs, weights and gates of all heads, vectors, usage
    and links, white in steps in which the memory rests.
    """
    _require("plot", "pydantic", "matplotlib")
    from fastmem import plots, training

    with _failures(), _usage():
        names = _names(folders)
        runs = {name: training.read_checkpoint(folder) for name, folder in zip(names, folders, strict=True)}
        logs = {name: plots.curve(training.read_log(folder)) for name, folder in zip(names, folders, strict=True)}
        changes = dict(_pair(text) for text in option or ())
        batches = {name: run.fresh(seed, changes) for name, run in runs.items()}
        output.mkdir(parents=True, exist_ok=True)
        units, measures = (
            "\nor ".join(dict.fromkeys(getattr(run.task, name) for run in runs.values()))
            for name in ("loss_unit", "measure")
        )
        plots.curves(logs, output / "loss.png", units, measures)
        for name, run in runs.items():
            title = f"{name}: {run.title}"
            picture = output / f"{name}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            plots.sequence(run.model, batches[name], title, picture, run.task)
    console.print(f"wrote {', '.join(str(output / f'{name}.png') for name in ('loss', *names))}")


def _names(folders: list[Path]) -> list[str]:
    """The ends of the paths, as long as it takes to tell them from each other and from the picture of the losses."""
    paths = [folder.resolve() for folder in folders]
    for length in range(1, max(len(path.parts) for path in paths)):
        names = ["/".join(path.parts[1:][-length:]) for path in paths]
        if len({"loss", *names}) == 1 + len(names):
            return names
    raise ValueError(f"runs: expected different folders, got {', '.join(map(str, folders))}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"option: expected NAME=VALUE, got {text!r}")
    return name, value


def _require(command: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            console.print(f"The command {command} needs {package}, which the extra cli brings: pip install {package}")
            raise typer.Exit(1)


def facts() -> dict[str, str]:
    """What to say about this machine and installation in a bug report."""
    extension = fastmem.native.build_info()
    triton = importlib.util.find_spec("triton") is not None
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "fastmem": fastmem.__version__,
        "torch": torch.__version__,
        "triton": __import__("triton").__version__ if triton else "not installed",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "cores": f"{os.cpu_count()}, {torch.get_num_threads()} threads in use",
        "GPU": cuda,
        **({f"extension {key}": value for key, value in extension.items()} if extension else {}),
        **({} if extension else {"extension": str(fastmem.native.failure)}),
    }


def source_tree() -> Path | None:
    """The checkout that this package was installed from in editable mode, or the one we stand in."""
    for root in (Path(fastmem.__file__).resolve().parent.parent, Path.cwd()):
        if (root / "bench" / "main.py").is_file() and (root / "tests" / "cases").is_dir():
            return root
    return None
