"""Whole sequences of a DNC against what else there is to run them: `python -m bench.sequences`, or `make bench-peers`.

race     forward, and forward and backward, on one core: milliseconds a time step, floors and peak memory
length   fastmem alone on longer and longer sequences: time a step, and what training keeps
threads  fastmem alone on two threads against one, in wall time

A race is of rounds in which every contender takes its turn, each in a process of its own, all pinned to one core. That
all compute the same is checked first. A rival runs with PyTorch's flush of subnormal numbers off and on, as two
contenders, of which the faster counts.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from bench import contender, machine, sequence_floor, timing
from bench.contender import COMPILED, MODES, NEEDS, OURS, PYPI, TEXTBOOK, children
from bench.main import new_table, progress
from bench.sequence_floor import FLOAT, MIB, Limits, Shape

SHAPES = {
    "S": Shape(16, 32, 64, 16, 1, 64),
    "M": Shape(16, 64, 128, 32, 4, 128),
    "L": Shape(8, 64, 256, 64, 4, 256),
    "XL": Shape(4, 32, 512, 64, 4, 256),
}
LONG = Shape(8, 256, 256, 64, 4, 256)  # at the first of LENGTHS
LENGTHS = (256, 512, 1024, 2048, 4096)
FLUSHED = ", flushed"
AGREEMENT = 1e-5
ROUNDS = 7  # at least, however long they take
LABELS = {"forward": "forward", "backward": "fwd+bwd"}


class Part(StrEnum):
    race = "race"
    length = "length"
    threads = "threads"


@contextmanager
def pinned() -> Iterator[None]:
    """On the last core that this process may use, with all children that it starts."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def compile_all(shapes: dict[str, Shape]) -> dict[str, float]:
    """Fills the cache of torch.compile, on all cores, and tells the seconds each shape took: few where it was full."""

    def compiled(shape: Shape) -> float:
        start = time.perf_counter()
        with children({COMPILED: (COMPILED, shape)}) as started:
            for mode in MODES:
                started[COMPILED].ask("sample", mode, False)
        return time.perf_counter() - start

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(shapes, pool.map(compiled, shapes.values()), strict=True))


def agreement(started: dict[str, contender.Child]) -> dict[str, dict[str, float]]:
    """Largest difference from the textbook in the output, and in a gradient relative to the largest number of that."""
    values = {name: child.ask("values") for name, child in started.items() if name != PYPI}
    output, gradients = values.pop(TEXTBOOK)
    found = {}
    for name, (their_output, their_gradients) in values.items():
        relative = [
            abs(their_gradients[key] - gradient).max() / abs(gradient).max() for key, gradient in gradients.items()
        ]
        found[name] = {"output": float(abs(their_output - output).max()), "gradient": float(np.max(relative))}
    return found


def differing(found: dict[str, dict[str, float]]) -> list[str]:
    """Who is further from the textbook than AGREEMENT; NaN is."""
    return [name for name, entry in found.items() if not all(value <= AGREEMENT for value in entry.values())]


def fastest(contenders: dict[str, Any], rival: str | None = None) -> str | None:
    """Of all rivals, or of the ways in which one of them ran; None where none did."""
    names = [name for name in contenders if name != OURS and rival in (None, name.removesuffix(FLUSHED))]
    return min(names, key=lambda name: contenders[name]["ms"]["median"], default=None)


def contender_of(child: contender.Child, mode: str, flush: bool = False) -> timing.Contender:
    return timing.Contender(lambda: child.ask("sample", mode, flush))


def take_turn(racer: timing.Contender) -> float:
    """The child has the clock."""
    return racer.call()


def race(started: dict[str, contender.Child], mode: str, seconds: float) -> dict[str, Any]:
    racing = {}
    for name, child in started.items():
        racing[name] = contender_of(child, mode)
        if name != OURS and contender.is_torch(name):
            racing[name + FLUSHED] = contender_of(child, mode, flush=True)
    return timing.summarise(timing.race(racing, seconds, ROUNDS, sample=take_turn), OURS)


def race_all(
    console: Console, shapes: dict[str, Shape], limits: Limits, seconds: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The agreement of each shape, and a row for each shape and mode."""
    agreed: dict[str, Any] = {}
    rows = []
    names = [OURS, *contender.rivals()]
    with progress(console, "race", len(MODES) * len(shapes)) as advance:
        for key, shape in shapes.items():
            floors = sequence_floor.floor(shape, limits)
            with children({name: (name, shape) for name in names}) as started:
                agreed[key] = agreement(started)
                if wrong := differing(agreed[key]):
                    raise RuntimeError(f"not the same as the {TEXTBOOK} at {key}: {', '.join(wrong)}: {agreed[key]}")
                for mode in MODES:
                    found = race(started, mode, seconds)
                    floor = 1e3 * floors[mode]
                    rows.append({
                        "shape": key, "mode": mode, "contenders": found, "best": fastest(found),
                        "floor_ms": floor, "floors": {name: 1e3 * value for name, value in floors.items()},
                        "times_floor": found[OURS]["ms"]["median"] / floor,
                    })  # fmt: skip
                    advance()
                rows[-1]["mib"] = {name: _mib(child.ask("peak")) for name, child in started.items()}
    return agreed, rows


def _mib(size: int | None) -> float | None:
    return None if size is None else size / MIB


def length(seconds: float) -> list[dict[str, Any]]:
    """Forward and backward of fastmem at all lengths in turn, and what the longest one takes of memory."""
    with children({steps: (OURS, replace(LONG, steps=steps)) for steps in LENGTHS}) as started:
        racing = {str(steps): contender_of(child, "backward") for steps, child in started.items()}
        samples = timing.race(racing, seconds, least_rounds=3, sample=take_turn)
        summary = timing.summarise(samples, str(LENGTHS[0]))
        rows = []
        for steps, child in started.items():
            kept, states = child.ask("kept")
            given, peak = child.ask("results"), child.ask("peak")
            rows.append({
                "steps": steps, **summary[str(steps)],
                "mib": None if peak is None else (peak - given) / MIB,
                "kept_mib": kept / MIB, "kept_states_mib": states / MIB,
                "allowed_states_mib": FLOAT * LONG.batch * LONG.row * (2 * math.sqrt(steps) + 10) / MIB,
            })  # fmt: skip
    return rows


def two_threads(shapes: dict[str, Shape], seconds: float) -> list[dict[str, Any]]:
    """Two threads against one, at batches of 8 and more."""

    def on(count: int, call: Callable[[], Any]) -> timing.Contender:
        def prepare() -> None:
            torch.set_num_threads(count)
            call()  # the first call after a change of threads wakes them

        return timing.Contender(call, prepare)

    rows = []
    for key, shape in shapes.items():
        if shape.batch < 8:
            continue
        calls = contender.Network(OURS, shape).calls
        for mode in MODES:
            with timing.threads(2):  # what it is afterwards again
                racing = {"1 thread": on(1, calls[mode]), "2 threads": on(2, calls[mode])}
                samples = timing.race(racing, seconds, sample=timing.sample_wall)
            rows.append({"shape": key, "mode": mode, "threads": timing.summarise(samples, "2 threads")})
    return rows


def print_race(console: Console, agreed: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    shown = new_table("largest difference from the textbook", ("shape", "contender"), ("output", "gradient, relative"))
    for key, entries in agreed.items():
        for name, entry in entries.items():
            shown.add_row(key, name, f"{entry['output']:.1e}", f"{entry['gradient']:.1e}")
    console.print(shown)
    columns = ("ms a step", "of fastmem's", "floors", "peak MiB")
    shown = new_table("whole sequences on one core", ("shape", "what", "contender"), columns)
    for row in rows:
        for name, entry in row["contenders"].items():
            peak = row.get("mib", {}).get(name)
            shown.add_row(
                row["shape"], LABELS[row["mode"]], name, f"{entry['ms']['median']:.3f}",
                f"{entry['ratio']['median']:.2f}x", f"{entry['ms']['median'] / row['floor_ms']:.1f}",
                "" if peak is None else f"{peak:.0f}", style="bold" if name in (OURS, row["best"]) else None,
            )  # fmt: skip
    console.print(shown)


def print_length(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ("ms a step", "of the first", "peak MiB", "kept MiB", "links, memories", "allowed")
    shown = new_table("longer sequences, forward and backward of fastmem", ("steps",), columns)
    for row in rows:
        shown.add_row(
            str(row["steps"]), f"{row['ms']['median']:.3f}", f"{row['ratio']['median']:.2f}x",
            "" if row["mib"] is None else f"{row['mib']:.0f}",
            *(f"{row[name]:.0f}" for name in ("kept_mib", "kept_states_mib", "allowed_states_mib")),
        )  # fmt: skip
    console.print(shown)


def print_threads(console: Console, rows: list[dict[str, Any]]) -> None:
    shown = new_table("two threads against one, wall time", ("shape", "what"), ("speed-up",))
    for row in rows:
        shown.add_row(row["shape"], LABELS[row["mode"]], f"{row['threads']['1 thread']['ratio']['median']:.2f}x")
    console.print(shown)


def main(
    only: Annotated[list[Part] | None, typer.Option(help="Run only this part; may be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="Only S, M, L or XL; may be repeated.")] = None,
    seconds: Annotated[float, typer.Option(help="Of every race, beyond its first rounds.")] = 40.0,
    results: Annotated[Path, typer.Option(help="Where to write.")] = machine.ROOT / "bench" / "results",
) -> None:
    """Races whole sequences of a DNC against eager PyTorch, torch.compile, JAX and PyPI's dnc."""
    started, console = time.monotonic(), Console()
    parts, shapes = set(only or Part), {key: SHAPES[key] for key in shape or SHAPES}
    torch.set_num_threads(1)
    found: dict[str, Any] = {**machine.describe(), "shapes": {key: vars(value) for key, value in shapes.items()}}
    if Part.race in parts:
        for name in NEEDS.keys() - set(contender.rivals()):
            console.print(f"{name} does not race: {NEEDS[name]} is not installed.")
        found["compile_seconds"] = compile_all(shapes)
        with pinned():
            limits, found["limits"] = sequence_floor.measure()
            found["agreement"], found["race"] = race_all(console, shapes, limits, seconds)
        print_race(console, found["agreement"], found["race"])
    if Part.length in parts:
        with pinned():
            found["length"] = length(seconds)
        print_length(console, found["length"])
    if Part.threads in parts and (os.cpu_count() or 1) >= 2:
        found["threads"] = two_threads(shapes, seconds=2.0)
        print_threads(console, found["threads"])
    found["seconds"] = time.monotonic() - started

    partial = "".join(f"-{name}" for name in sorted({*(only or ()), *(shape or ())}))  # never overwrites the whole
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"peers-{found['machine']['instruction set']}{partial}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"Wrote {path} after {found['seconds']:.0f} s.")


if __name__ == "__main__":
    typer.run(main)
