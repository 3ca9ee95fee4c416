"""What writing at few steps saves, and what stored programs cost: `python -m bench.variants`.

schedules  a DNC that writes and reads at every L-th step, from a cache or not, against the dense one and one whose
           memory never acts: time, the part of it that is the memory's, and what training keeps of the memory and of
           the controller
programs   networks with stored programs against the same with a linear interface, beside the time of that layer alone

On one thread, alternating in one process; forward, and forward and backward.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from bench import machine, timing
from bench.main import new_table
from bench.sequence_floor import INPUTS, MIB, OUTPUTS, Shape
from bench.sequences import LABELS, pinned
from fastmem.nn import DNC, NTM, NUTM, CachedUniformWriting, WriteSchedule

Run = Callable[[], tuple[Tensor, Any]]  # to the output of sequences and the state after them

MODES = ("forward", "backward")
SCHEDULED = Shape(8, 512, 256, 64, 4, 256)
INTERVALS = (5, 10, 20)
CACHED = 10  # the interval of Cached Uniform Writing
DENSE, RESTING = "every step", "never"
LINEAR, LAYER = "linear interface", "interface layer alone"
PROGRAMS = (1, 2, 4)
NETWORKS = {
    "NTM": (NTM, Shape(16, 64, 128, 20, 1, 100)),
    "DNC": (DNC, Shape(8, 64, 256, 64, 4, 256)),
}


def calls_of(run: Run, parameters: list[Tensor]) -> dict[str, Callable[[], Any]]:
    """Forward without a gradient, and both ways."""

    def forward() -> None:
        with torch.no_grad():
            run()

    return {"forward": forward, "backward": lambda: torch.autograd.grad(run()[0].sum(), parameters)}


def network(kind: Callable[..., Any], shape: Shape, **options: Any) -> Any:
    torch.manual_seed(0)
    heads = {} if kind is NTM or options.get("core") == "ntm" else {"num_read_heads": shape.heads}
    return kind(
        INPUTS, shape.hidden, num_slots=shape.slots, word_size=shape.word, output_size=OUTPUTS, **heads, **options
    )


def schedules(seconds: float) -> list[dict[str, Any]]:
    """A row for each schedule; times a step."""
    shape, net = SCHEDULED, network(DNC, SCHEDULED)
    inputs = torch.randn(shape.steps, shape.batch, INPUTS)
    resting = torch.zeros(shape.steps, dtype=torch.bool)
    runs: dict[str, Run] = {DENSE: partial(net, inputs), RESTING: partial(net, inputs, write_schedule=resting)}
    for interval in INTERVALS:
        schedule = WriteSchedule("uniform", interval=interval)
        runs[f"every {interval}th"] = partial(net, inputs, write_schedule=schedule)
    runs[f"every {CACHED}th, cached"] = partial(CachedUniformWriting(net, CACHED), inputs)
    rows: dict[str, dict[str, Any]] = {name: {"schedule": name, **kept(net, inputs, run)} for name, run in runs.items()}
    for mode in MODES:
        racing = {name: timing.Contender(calls_of(run, [*net.parameters()])[mode]) for name, run in runs.items()}
        for name, entry in timing.summarise(timing.race(racing, seconds), DENSE).items():
            entry["ms"] = {key: value / shape.steps for key, value in entry["ms"].items()}
            rows[name][mode] = entry
        least, most = (rows[name][mode]["ms"]["median"] for name in (RESTING, DENSE))
        for row in rows.values():
            row[mode]["of_the_memory"] = (row[mode]["ms"]["median"] - least) / (most - least)
    return list(rows.values())


def kept(net: DNC, inputs: Tensor, run: Run) -> dict[str, float]:
    """What the graph keeps for the backward, in MiB: of the memory, one access after the other, and of the rest."""
    states = {(net.num_slots, net.num_slots), (net.num_slots, net.word_size)}

    def of_memory(shape: torch.Size) -> bool:
        """Links and memories, and what accesses record: in three dimensions, wider than what the controller does."""
        return shape[-2:] in states or (len(shape) == 3 and shape[-1] > 5 * net.hidden_size)

    def tensors() -> list[Tensor]:
        output, state = run()
        return [output, *state]

    found = timing.saved(tensors, (*net.parameters(), inputs))
    memory = sum(size for size, shape in found if of_memory(shape))
    return {"memory_mib": memory / MIB, "rest_mib": sum(size for size, _ in found) / MIB - memory / MIB}


def of_layer(layer: nn.Linear, tops: Tensor) -> dict[str, Callable[[], Any]]:
    """Step by step, as a network must."""
    return calls_of(lambda: (torch.stack([layer(top) for top in tops.unbind()]), None), [tops, *layer.parameters()])


def programs(seconds: float) -> list[dict[str, Any]]:
    """A row for each network and mode: times a step, and what programs take more than a linear interface, in layers."""
    rows = []
    for name, (kind, shape) in NETWORKS.items():
        plain = network(kind, shape)
        nets = {LINEAR: plain}
        nets |= {f"P = {count}": network(NUTM, shape, num_programs=count, core=name.lower()) for count in PROGRAMS}
        inputs = torch.randn(shape.steps, shape.batch, INPUTS)
        tops = torch.randn(shape.steps, shape.batch, shape.hidden, requires_grad=True)
        calls = {key: calls_of(partial(net, inputs), [*net.parameters()]) for key, net in nets.items()}
        calls[LAYER] = of_layer(nn.Linear(shape.hidden, plain.interface.out_features), tops)
        for mode in MODES:
            racing = {key: timing.Contender(call[mode]) for key, call in calls.items()}
            found = timing.summarise(timing.race(racing, seconds), LINEAR)
            took = {key: entry["ms"]["median"] / shape.steps for key, entry in found.items()}
            more = {key: (took[key] - took[LINEAR]) / took[LAYER] for key in took if key.startswith("P")}
            ratios = {key: entry["ratio"]["median"] for key, entry in found.items()}
            rows.append({"network": name, "mode": mode, "ms": took, "ratio": ratios, "layers_more": more})
    return rows


def print_schedules(console: Console, rows: list[dict[str, Any]]) -> None:
    columns = ("ms", "of dense", "memory's", "fwd+bwd ms", "of dense", "memory's", "MiB of memory", "other MiB")
    shown = new_table(f"a DNC that writes and reads at some steps, {SCHEDULED}", ("schedule",), columns)
    for row in rows:
        numbers = [
            text
            for mode in MODES
            for text in (
                f"{row[mode]['ms']['median']:.3f}", f"{row[mode]['ratio']['median']:.2f}",
                f"{row[mode]['of_the_memory']:.3f}",
            )
        ]  # fmt: skip
        shown.add_row(row["schedule"], *numbers, f"{row['memory_mib']:.1f}", f"{row['rest_mib']:.1f}")
    console.print(shown)


def print_programs(console: Console, rows: list[dict[str, Any]]) -> None:
    shown = new_table("stored programs", ("network", "what", "interface"), ("ms a step", "of linear", "layers more"))
    for row in rows:
        for key, took in row["ms"].items():
            more = row["layers_more"].get(key)
            shown.add_row(
                row["network"], LABELS[row["mode"]], key, f"{took:.4f}", f"{row['ratio'][key]:.2f}x",
                "" if more is None else f"{more:.2f}",
            )  # fmt: skip
    console.print(shown)


def main(
    seconds: Annotated[float, typer.Option(help="Of every race, beyond its first rounds.")] = 15.0,
    results: Annotated[Path, typer.Option(help="Where to write.")] = machine.ROOT / "bench" / "results",
) -> None:
    """Measures schedules of writing and stored programs."""
    console = Console()
    torch.set_num_threads(1)
    found: dict[str, Any] = {**machine.describe(), "shape": str(SCHEDULED)}
    with pinned():
        found["schedules"] = schedules(seconds)
        print_schedules(console, found["schedules"])
        found["programs"] = programs(seconds / 3)
        print_programs(console, found["programs"])
    results.mkdir(parents=True, exist_ok=True)
    path = results / f"variants-{found['machine']['instruction set']}.json"
    path.write_text(json.dumps(found, indent=1) + "\n")
    console.print(f"Wrote {path}.")


if __name__ == "__main__":
    typer.run(main)
