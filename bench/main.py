"""The main job: `python -m fastmem bench`. The parts, one results file, one HTML page."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import fastmem
from bench import floors, long, machine, memory, model, ops, report, timing, verify
from bench.cases import Case, cases
from fastmem.cli import info

PARTS = {"verify", "ops", "long", "model"}
MODES = {"forward": "forward", "backward": "fwd+bwd", "in_place": "in place"}


def run(console: Console, only: set[str], full: bool, results: Path | None, threads: int) -> int:
    """Runs the parts and returns the exit status: 1 when an op fails its verification."""
    started = time.monotonic()
    torch.set_num_threads(threads)
    folder = results or machine.ROOT / "bench" / "results"
    folder.mkdir(parents=True, exist_ok=True)

    info()
    found: dict[str, Any] = {
        **machine.describe(),
        "settings": {"threads": threads, "full": full},
        "backends": {op: [list(row) for row in rows] for op, rows in fastmem.backends().items()},
    }
    if "verify" in only:
        found["verify"] = verification(console)
    if "ops" in only:
        found["limits"] = {"gemm_gflops": floors.gemm_rate() / 1e9}
        found["ops"] = op_races(console, full, found["limits"]["gemm_gflops"] * 1e9)
    if "long" in only:
        found["long"] = long_run(console)
    if "model" in only:
        found["model"] = training(console, iterations=1000 if full else 200)
    found["seconds"] = time.monotonic() - started

    part = "" if only == PARTS else "-" + "-".join(sorted(only))  # a part never overwrites the whole
    path = folder / f"cpu-{found['machine']['instruction set']}{part}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    report.write(found, path.with_suffix(".html"))
    console.print(f"Wrote {path} and {path.with_suffix('.html')} after {found['seconds']:.0f} s.")
    failures = [f"{row['op']} on {row['backend']}" for row in found.get("verify", []) if row["failed"]]
    if failures:
        console.print(f"[bold red]Verification failed:[/] {', '.join(failures)}")
    return 1 if failures else 0


@contextmanager
def progress(console: Console, title: str, total: int | None) -> Iterator[Any]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total)
        yield lambda: bar.advance(task)


def _interpreted() -> Iterator[dict[str, Any]]:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.verify", "triton"]  # numpy warns of NaN, which cases hold
    with subprocess.Popen(command, cwd=machine.ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the process that interprets the Triton kernels ended with status {process.returncode}")


def verification(console: Console) -> list[dict[str, Any]]:
    targets, interpreted = verify.native_targets(), verify.triton_installed()
    total = len(targets) * verify.count() + interpreted * verify.count(interpreted=True)
    summary: dict[tuple[str, str], dict[str, Any]] = {}
    with progress(console, "verify", total) as advance:
        for row in chain(verify.rows(targets), _interpreted() if interpreted else ()):
            entry = summary.setdefault((row["op"], row["backend"]), {
                "op": row["op"], "backend": row["backend"], "cases": 0, "not_served": 0,
                "value_error": 0.0, "gradient_error": 0.0, "of_allowed": 0.0, "failed": [],
            })  # fmt: skip
            entry["not_served" if row["ok"] is None else "cases"] += 1
            for key in ("value_error", "gradient_error", "of_allowed"):
                entry[key] = max(entry[key], row.get(key, 0.0))
            if row["ok"] is False:
                entry["failed"].append(row["case"] + (f" ({row['reason']})" if "reason" in row else ""))
            advance()
    columns = ("cases", "values", "gradients", "of allowed")
    table = new_table("largest relative errors against float64", ("op", "backend"), columns)
    table.add_column("failed")
    ordered = sorted(summary.values(), key=lambda entry: verify.OPS.index(entry["op"]))
    for entry in ordered:
        table.add_row(
            entry["op"], entry["backend"], str(entry["cases"]), f"{entry['value_error']:.1e}",
            f"{entry['gradient_error']:.1e}", f"{entry['of_allowed']:.2f}", ", ".join(entry["failed"]) or "none",
            style="red" if entry["failed"] else None,
        )  # fmt: skip
    console.print(table)
    return ordered


def plan(full: bool) -> list[tuple[Case, str, str, bool]]:
    """Case, mode, source of inputs, flush: inputs full of subnormal numbers are raced with PyTorch's flush on too."""
    return [
        (case, mode, source, flush)
        for case in cases(full=full)
        for mode in ops.modes(case.op)
        for source in case.sources
        if full or source != "random" or not case.recorded
        for flush in ((False, True) if source == "allocated" else (False,))
    ]


def op_races(console: Console, full: bool, rate: float) -> dict[str, Any]:
    seconds = 3.0 if full else 0.7
    rows = []
    planned = plan(full)
    kept = [race for race in planned if race[0].op == "temporal_linkage" and race[2] == "recorded"]
    with progress(console, "ops", len(planned) + len(kept)) as advance:
        for case, mode, source, flush in planned:
            rows.append(ops.measure(case, mode, source, flush, full or case.compiled, seconds, rate))
            advance()
        timing.settle_malloc()  # for the rest of the process: these races come last
        for case, mode, source, flush in kept:
            rows.append({**ops.measure(case, mode, source, flush, False, seconds, rate), "inputs": "malloc keeps"})
            advance()
    scaled = [(case, mode) for case in cases(full=full) if case.shape["batch"] >= 8 for mode in ops.modes(case.op)]
    scaling = []
    if (os.cpu_count() or 1) >= 2:
        with progress(console, "ops, two threads", len(scaled)) as advance:
            for case, mode in scaled:
                scaling.append(ops.scaling(case, mode, case.sources[0], seconds))
                advance()
    with progress(console, "ops, memory", memory.count(full)) as advance:
        for peak in memory.rows("full" if full else "ops"):
            for row in rows:
                if all(row[key] == peak[key] for key in ("op", "case", "mode")):
                    row["contenders"][peak["contender"]]["mib"] = peak["mib"]
            advance()
    for op in verify.OPS:
        print_races(console, op, [row for row in rows if row["op"] == op])
    print_scaling(console, scaling)
    return {"rows": rows, "scaling": scaling}


def new_table(title: str, texts: tuple[str, ...], numbers: tuple[str, ...]) -> Table:
    """A table that fits 80 columns."""
    table = Table(title=f"\n{title}", title_justify="left", box=None, padding=(0, 1, 0, 0))
    for name in texts:
        table.add_column(name)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_races(console: Console, op: str, rows: list[dict[str, Any]]) -> None:
    headlines = ("textbook", "eager", "compile")
    table = new_table(f"{op}: rivals' time / fastmem's", ("case", "what", "inputs"), ("ms", "floors", *headlines))
    for row in rows:
        ratios = ops.headline(row["contenders"])
        table.add_row(
            row["case"], MODES[row["mode"]], "flushed" if row["flush"] else row["inputs"],
            f"{row['contenders'][ops.OURS]['ms']['median']:.3f}", f"{row['times_floor']['median']:.1f}",
            *(f"{ratios[name]['median']:.2f}x" if name in ratios else "" for name in ops.HEADLINES),
        )  # fmt: skip
    console.print(table)


def print_scaling(console: Console, rows: list[dict[str, Any]]) -> None:
    table = new_table("two threads against one, wall time", ("op", "case", "what"), ("speed-up",))
    for row in rows:
        speed_up = row["threads"]["1 thread"]["ratio"]["median"]
        table.add_row(row["op"], row["case"], MODES[row["mode"]], f"{speed_up:.2f}x")
    console.print(table)


def long_run(console: Console) -> dict[str, Any]:
    found = long.measure()
    title = f"a step of a DNC: the first {long.WINDOW}, {long.WINDOW} after {long.LATER:,}, and with subnormal links"
    table = new_table(title, ("contender",), ("ms at first", "later / first", "subnormal / first"))
    for name, entry in found["contenders"].items():
        ratios = [entry["ratio"], entry["subnormal_ratio"]]
        marked = [f"[red]{ratio:.2f}" if ratio > long.MOST else f"{ratio:.2f}" for ratio in ratios]
        table.add_row(name, f"{entry['first_ms']['median']:.3f}", *marked)
    console.print(table)
    return found


def training(console: Console, iterations: int) -> dict[str, Any]:
    with progress(console, "model", iterations) as advance:
        found = model.train(iterations, advance)
    with progress(console, "model, memory", len(found["contenders"])) as advance:
        for peak in memory.rows("model"):
            found["contenders"][peak["contender"]]["mib"] = peak["mib"]
            advance()
    columns = ("ms per step", "relative", "peak MiB", "final loss")
    table = new_table("a DNC on repeat copy: forward, backward and update", ("contender",), columns)
    for name, entry in found["contenders"].items():
        table.add_row(
            name, f"{entry['ms']['median']:.3f}", f"{entry['ratio']['median']:.2f}x",
            f"{entry['mib']:.1f}" if "mib" in entry else "", f"{found['final_loss'][name]:.3f}",
        )  # fmt: skip
    console.print(table)
    return found
