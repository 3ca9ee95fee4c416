"""Pictures of runs: their losses, and what a model does with its memory over a sequence. Needs the extra `cli`."""

import math
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor, nn

from fastmem import tasks
from fastmem.diagnostics import Contribution
from fastmem.nn import DNC, NTM, DNCViews, NTMViews
from fastmem.training import Entry

SHARES = colormaps["viridis"].with_extremes(bad="white")
SIGNED = colormaps["RdBu_r"]  # white at 0
POINTS = 100  # of a curve, at most
DPI = 100
OF_BITS = tasks.Copy()  # judges outputs as every task of bits does
LINKS = 6  # how many link matrices of a sequence are shown


class Panel(NamedTuple):
    """An image of numbers over time."""

    title: str
    values: Tensor  # [rows,T]; nan is left white
    rows: str | list[str]  # what a row is, or the name of each
    limits: tuple[float, float] = (0.0, 1.0)
    colours: Colormap = SHARES


class Curve(NamedTuple):
    """A run in numbers few enough to keep: means over blocks of its iterations, and each evaluation."""

    iterations: list[int]  # the last of each block
    loss: list[float]
    wrong_bits: list[float]  # or what else the task measures
    evaluations: list[tuple[int, float]]  # iteration, the same on fresh sequences


def curve(entries: list[Entry]) -> Curve:
    size = math.ceil(len(entries) / POINTS) or 1
    blocks = [entries[begin : begin + size] for begin in range(0, len(entries), size)]
    return Curve(
        [block[-1].iteration for block in blocks],
        [fmean(entry.loss for entry in block) for block in blocks],
        [fmean(entry.bit_errors for entry in block) for block in blocks],
        [(entry.iteration, entry.evaluated) for entry in entries if entry.evaluated is not None],
    )


def curves(
    runs: dict[str, Curve],
    output: Path,
    loss_unit: str = tasks.Task.loss_unit,
    measure: str = tasks.Task.measure,
) -> None:
    """Loss and errors of runs over their iterations; a dot is an evaluation on fresh sequences."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, wrong = figure.subplots(1, 2)
    for name, run in runs.items():
        (line,) = loss.plot(run.iterations, run.loss, label=name)
        wrong.plot(run.iterations, run.wrong_bits, color=line.get_color())
        if run.evaluations:
            wrong.plot(*zip(*run.evaluations, strict=True), "o", color=line.get_color())
    mean = f"mean over a block, {POINTS} a run"
    loss.set(title=f"loss, {loss_unit}", xlabel="iteration", ylabel=mean)
    wrong.set(title=f"{measure}; dots: on fresh ones", xlabel="iteration", ylabel=mean)
    loss.legend()
    figure.savefig(output, dpi=DPI)


def contribution(contributions: dict[str, Contribution], output: Path) -> None:
    """What each input step contributes to the last state, by network, on a logarithmic scale."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, found in contributions.items():
        norms = found.norms.where(found.norms > 0, float("nan"))  # a logarithmic scale has no 0
        axes.plot(range(len(norms)), norms.numpy(), label=f"{name}, decay {found.decay:.3g}")
    axes.set(
        title="contribution to the last state", xlabel="input step", ylabel="norm of the gradient by it", yscale="log"
    )
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.legend()
    figure.savefig(output, dpi=DPI)


@torch.no_grad()
def sequence(model: nn.Module, batch: tasks.Batch, title: str, output: Path, task: tasks.Task = OF_BITS) -> None:
    """Runs a batch of one sequence and draws input, target and output, and what heads and memory did, if any."""
    watching: AbstractContextManager[list[Any]] = model.watched() if isinstance(model, DNC | NTM) else nullcontext([])
    with watching as views:
        logits, _ = model(batch.input)
    seen, unasked = batch.input[:, 0].T, batch.mask[:, 0] == 0
    target, given = (
        values[:, 0].T.masked_fill(unasked, float("nan")) for values in (batch.target, task.answers(logits))
    )
    limits = _limits(batch.target)
    panels = [
        Panel("input", seen, "channel", _limits(seen)),
        Panel("target; white where nothing is asked for", target, "channel", limits),
        Panel("output, on the scale of the target", given, "channel", limits),
    ]
    links = None
    if isinstance(model, DNC):
        panels += _dnc_panels(views[0])
        links = views[0].link[:, 0]
    elif isinstance(model, NTM):
        panels += _ntm_panels(views[0], model.heads)
    wrong, possible = (float(errors) for errors in (task.errors(logits, batch), task.possible_errors(batch)))
    _draw(panels, links, f"{title}, {task.measure}: {wrong:.4g} of {possible:.4g}", output)


def _limits(values: Tensor) -> tuple[float, float]:
    """0 and 1, or as far as the values reach beyond."""
    return min(0.0, float(values.min())), max(1.0, float(values.max()))


def _dnc_panels(views: DNCViews) -> list[Panel]:
    writers = _numbered("write head", views.write_weights.shape[2])
    readers = _numbered("read head", views.read_weights.shape[2])
    gates = {
        **dict(zip((f"{name}, writes" for name in writers), views.write_gates[:, 0].T, strict=True)),
        **dict(zip((f"{name}, by allocation" for name in writers), views.allocation_gates[:, 0].T, strict=True)),
        **dict(zip((f"{name}, frees" for name in readers), views.free_gates[:, 0].T, strict=True)),
    }
    ways = len(writers)
    modes = [*_numbered("backward", ways), "content", *_numbered("forward", ways)]
    return [
        *(Panel(f"{name}: weights", views.write_weights[:, 0, i].T, "slot") for i, name in enumerate(writers)),
        *(Panel(f"{name}: weights", views.read_weights[:, 0, i].T, "slot") for i, name in enumerate(readers)),
        Panel("usage", views.usage[:, 0].T, "slot"),
        Panel("gates", torch.stack(list(gates.values())), list(gates)),
        *(Panel(f"{name}: modes", views.read_modes[:, 0, i].T, modes) for i, name in enumerate(readers)),
    ]


def _ntm_panels(views: NTMViews, heads: str) -> list[Panel]:
    names, panels = [], []
    counts = {"r": iter(_numbered("read head", heads.count("r"))), "w": iter(_numbered("write head", heads.count("w")))}
    vectors = {"r": iter(views.reads[:, 0].unbind(1)), "w": iter(views.values[:, 0].unbind(1))}
    for i, kind in enumerate(heads):
        name, vector = next(counts[kind]), next(vectors[kind]).T
        reach = float(vector.abs().max()) or 1.0
        names.append(name)
        panels += [
            Panel(f"{name}: weights", views.weights[:, 0, i].T, "slot"),
            Panel(f"{name}: what it {'reads' if kind == 'r' else 'adds'}", vector, "word", (-reach, reach), SIGNED),
        ]
    most = views.shifts.shape[-1] // 2
    moves = [f"{name}, by {move:+d}" if move else f"{name}, stays" for name in names for move in range(-most, most + 1)]
    sharpness, strengths = views.sharpness[:, 0].T, views.strengths[:, 0].T
    return [
        *panels,
        Panel("gates: 1 by content, 0 from where the head was", views.gates[:, 0].T, names),
        Panel("shifts", views.shifts[:, 0].flatten(1).T, moves),
        Panel("strength of the lookup by content", strengths, names, (0.0, float(strengths.max()))),
        Panel("sharpness", sharpness, names, (1.0, float(sharpness.max()))),
    ]


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name} {i + 1}" for i in range(count)] if count > 1 else [name] * count


def _draw(panels: list[Panel], links: Tensor | None, title: str, output: Path) -> None:
    """Panels below each other over one time axis, and below them the links `[T,Q,N,N]` after some of the steps."""
    steps = panels[0].values.shape[1]
    width = min(max(9.0, 3 + 0.12 * steps), 24.0)
    heights = [min(max(0.15 + 0.11 * len(panel.values), 0.4), 1.7) for panel in panels]
    over_time = sum(heights) + 0.45 * len(panels) + 0.5
    below = 0.0 if links is None else 0.3 + links.shape[1] * (width / LINKS + 0.3)
    figure: Any = Figure(figsize=(width, over_time + below), layout="constrained")
    figure.suptitle(title)
    upper = figure
    if links is not None:
        upper, lower = figure.subfigures(2, 1, height_ratios=[over_time, below])
        _draw_links(lower, links)
    grid = upper.subplots(len(panels), 2, width_ratios=[60, 1], height_ratios=heights)
    for panel, (axes, bar) in zip(panels, grid, strict=True):
        low, high = panel.limits
        image = axes.imshow(
            panel.values.numpy(), aspect="auto", interpolation="nearest", vmin=low, vmax=high, cmap=panel.colours
        )
        axes.set_title(panel.title, loc="left", fontsize="medium")
        if isinstance(panel.rows, str):
            axes.set_ylabel(panel.rows)
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        else:
            axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.tick_params(labelbottom=axes is grid[-1, 0])
        upper.colorbar(image, cax=bar, ticks=MaxNLocator(2))
    grid[-1, 0].set_xlabel("step")
    figure.savefig(output, dpi=DPI)


def _draw_links(figure: Any, links: Tensor) -> None:
    """The link matrices `[T,Q,N,N]` after some of the steps, a row for each write head."""
    steps, writers = links.shape[:2]
    chosen = torch.linspace(0, steps - 1, LINKS + 1).round().int()[1:].unique().tolist()
    grid = figure.subplots(writers, len(chosen), squeeze=False)
    figure.suptitle("links: a row's slot was written right after a column's", fontsize="medium")
    for row, head in enumerate(_numbered("write head", writers)):
        for step, axes in zip(chosen, grid[row], strict=True):
            image = axes.imshow(links[step, row].numpy(), interpolation="nearest", vmin=0, vmax=1, cmap=SHARES)
            axes.set(title=f"after step {step}", xlabel="slot")
            axes.title.set_fontsize("medium")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4, integer=True))
        grid[row, 0].set_ylabel(f"{head}: slot")
    figure.colorbar(image, ax=grid, aspect=40, ticks=MaxNLocator(2))
