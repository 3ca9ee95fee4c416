"""The command line: `python -m fastmem info`, `bench`, `train` and `plot`. Needs the extra `cli`."""

import importlib.util
import os
import platform
import sys
from collections import deque
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import fastmem

if TYPE_CHECKING:
    from fastmem import training

app = typer.Typer(help=fastmem.__doc__, add_completion=False, no_args_is_help=True)
console = Console()


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
    threads: Annotated[int, typer.Option(min=1, help="Threads for PyTorch and the kernels.")] = 1,
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
    lstm = "lstm"


class Optimiser(StrEnum):
    adam = "adam"
    rmsprop = "rmsprop"


@app.command()
def train(
    task: Annotated[str, typer.Argument(help="copy, repeat-copy, ...; an unknown one is answered with the list.")] = "",
    model: Annotated[Model, typer.Option(help="What to train.")] = Model.dnc,
    option: Annotated[list[str] | None, typer.Option(help="Of the task, as max_length=10; may be repeated.")] = None,
    hidden_size: Annotated[int, typer.Option(help="Width of the controller, or of the lstm.")] = 64,
    num_layers: Annotated[int, typer.Option(help="Layers of the lstm.")] = 1,
    num_slots: Annotated[int, typer.Option(help="Rows of the memory.")] = 16,
    word_size: Annotated[int, typer.Option(help="Width of the memory.")] = 16,
    num_read_heads: Annotated[int, typer.Option(help="Read heads of the dnc.")] = 4,
    heads: Annotated[str, typer.Option(help="Of the ntm: a letter each, r reads and w writes.")] = "rw",
    iterations: Annotated[int | None, typer.Option(help="Batches to train on. Default: 10000.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a batch.")] = 16,
    optimiser: Annotated[Optimiser, typer.Option(help="With PyTorch's defaults; rmsprop with momentum 0.9.")] = (
        Optimiser.adam
    ),
    learning_rate: Annotated[float, typer.Option(help="Of the optimiser.")] = 1e-3,
    clip_norm: Annotated[float, typer.Option(help="Largest norm of the gradient of all parameters.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the parameters and of the data.")] = 0,
    evaluate_every: Annotated[int, typer.Option(help="Iterations between two evaluations and checkpoints.")] = 500,
    evaluation_size: Annotated[int, typer.Option(help="Fresh sequences in an evaluation.")] = 1000,
    solved_at: Annotated[float | None, typer.Option(help="Stop at so many wrong bits a fresh sequence.")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    folder: Annotated[Path | None, typer.Option(help="Where the run is kept. Default: runs/TASK-MODEL-SEED.")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with the run in this folder, by its settings.")] = None,
) -> None:
    """Trains a model on a task; ctrl-C saves, and --resume continues bit for bit."""
    _require("train", "pydantic")
    from fastmem import training

    try:
        if resume is not None:
            run = training.Run.resumed(resume, **({} if iterations is None else {"iterations": iterations}))
        else:
            settings = training.Settings(
                task=task, task_options=dict(_pair(text) for text in option or ()), model=model.value,
                hidden_size=hidden_size, num_layers=num_layers, num_slots=num_slots, word_size=word_size,
                num_read_heads=num_read_heads, heads=heads, iterations=10_000 if iterations is None else iterations,
                batch_size=batch_size, optimiser=optimiser.value, learning_rate=learning_rate, clip_norm=clip_norm,
                seed=seed, evaluate_every=evaluate_every, evaluation_size=evaluation_size, solved_at=solved_at,
                device=device,
            )  # fmt: skip
            run = training.Run(settings, folder or Path("runs") / f"{task}-{model}-{seed}")
    except ValueError as error:  # pydantic's are ValueErrors
        raise typer.BadParameter(str(error)) from None
    console.print(f"{run.settings.model} with {run.parameters:,} parameters on {run.task}; the run is in {run.folder}")
    try:
        _train(run)
    except KeyboardInterrupt:
        run.save()
        console.print(f"stopped after {run.iteration} iterations; go on with --resume {run.folder}")
        raise typer.Exit(130) from None
    except training.Diverged as error:
        console.print(f"[red]{error}")
        raise typer.Exit(1) from None


def _train(run: "training.Run") -> None:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  wrong bits {task.fields[wrong]:.2f}  {task.fields[speed]:.1f} it/s"),
        TimeRemainingColumn(),
    )  # fmt: skip
    board = _tensorboard(run.folder)
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(
            run.settings.task, total=run.settings.iterations, completed=run.iteration, loss=0.0, wrong=0.0, speed=0.0
        )
        recent: deque[training.Entry] = deque(maxlen=100)
        for entry in run.train():
            recent.append(entry)
            loss, wrong, seconds = (sum(values) / len(recent) for values in zip(*(e[1:4] for e in recent), strict=True))
            progress.update(bar, completed=entry.iteration, loss=loss, wrong=wrong, speed=1 / max(seconds, 1e-9))
            if board is not None:
                board.add_scalar("loss", entry.loss, entry.iteration)
                board.add_scalar("wrong bits", entry.bit_errors, entry.iteration)
            if entry.evaluated is not None:
                progress.console.print(
                    f"iteration {entry.iteration}: {entry.evaluated:.3f} wrong bits a sequence over "
                    f"{run.settings.evaluation_size} fresh ones"
                )


def _tensorboard(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder))


@app.command()
def plot(
    folders: Annotated[list[Path], typer.Argument(help="Folders of runs.")],
    output: Annotated[Path, typer.Option(help="The picture.")] = Path("loss.png"),
) -> None:
    """Draws the loss and the wrong bits of runs over their iterations."""
    _require("plot", "pydantic", "matplotlib")
    from fastmem import plots, training

    try:
        plots.curves({folder.name: training.read_log(folder) for folder in folders}, output)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    console.print(f"wrote {output}")


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise typer.BadParameter(f"option: expected NAME=VALUE, got {text!r}")
    return name, value


def _require(command: str, *packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            console.print(f"The command {command} needs {package}: pip install 'fastmem-kernels\\[cli]'")
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
