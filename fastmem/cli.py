"""The command line: `python -m fastmem info` and `python -m fastmem bench`. Needs the extra `cli`."""

import importlib.util
import os
import platform
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

import fastmem

app = typer.Typer(help=fastmem.__doc__, add_completion=False, no_args_is_help=True)
console = Console()


class Part(StrEnum):
    verify = "verify"
    ops = "ops"
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
    for package in ("matplotlib", "jinja2"):
        if importlib.util.find_spec(package) is None:
            console.print(f"The benchmark needs {package}: pip install 'fastmem-kernels\\[cli]'")
            raise typer.Exit(1)
    sys.path.insert(0, str(root))
    from bench import main

    raise typer.Exit(main.run(console, {part.value for part in only or Part}, full, results, threads))


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
