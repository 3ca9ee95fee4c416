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
from fastmem.nn import DNC, LRUA, NTM, DNCViews, LRUAViews, NTMViews
from fastmem.training import Entry, Scheduled, outputs

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
        title="contribution to the last state",
        xlabel="input step",
        ylabel="norm of d last state / d input",
        yscale="log",
    )
    axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    axes.legend()
    figure.savefig(output, dpi=DPI)


@torch.no_grad()
def sequence(model: nn.Module, batch: tasks.Batch, title: str, output: Path, task: tasks.Task = OF_BITS) -> None:
    """Runs a batch of one sequence and draws input, target and output, and what heads and memory did, if any."""
    net = next((part for part in model.modules() if isinstance(part, DNC | NTM | LRUA)), None)
    watching: AbstractContextManager[list[Any]] = nullcontext([]) if net is None else net.watched()
    with watching as parts:
        logits = outputs(model, task, batch.input)
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
    links: dict[int, Tensor] = {}
    if net is not None and parts:
        steps = len(batch.input)
        acts = model.acts(steps, task.read_steps) if isinstance(model, Scheduled) else torch.ones(steps).bool()
        views = _joined(parts, acts)
        panels += _program_panels(views, net)
        match net:
            case DNC():
                panels += _dnc_panels(views)
                links = _chosen_links(views.link[:, 0], acts)
            case NTM():
                panels += _ntm_panels(views, net.heads)
            case LRUA():
                panels += _lrua_panels(views)
    wrong, possible = (float(errors) for errors in (task.errors(logits, batch), task.possible_errors(batch)))
    _draw(panels, links, f"{title}, {task.measure}: {wrong:.4g}{task.bound} {possible:.4g}", output)


def _joined(parts: list[Any], acts: Tensor) -> Any:
    """The views of a whole sequence from those of its parts, nan in the steps in which the memory rests.

    Of the steps of a part all are seen, or, in Cached Uniform Writing, one that writes has a part of its own.
    """
    kind = type(parts[0])
    of_steps = [part if part.reads.dim() == 4 else kind._make(view.unsqueeze(0) for view in part) for part in parts]

    def whole(*views: Tensor) -> Tensor:
        seen = torch.cat(views)
        joined = seen.new_full((len(acts), *seen.shape[1:]), float("nan"))
        joined[acts] = seen[acts] if len(seen) == len(acts) else seen
        return joined

    return kind._make(map(whole, *of_steps))


def _chosen_links(links: Tensor, acts: Tensor) -> dict[int, Tensor]:
    """The links `[Q,N,N]` after some of the steps `[T]` that change them."""
    steps = acts.nonzero().flatten()
    chosen = torch.linspace(0, len(steps) - 1, LINKS + 1).round().int()[1:].unique()
    return {step: links[step] for step in steps[chosen].tolist()}


def _limits(values: Tensor) -> tuple[float, float]:
    """0 and 1, or as far as the values reach beyond."""
    return min(0.0, float(values.min())), max(1.0, float(values.max()))


def _program_panels(views: DNCViews | NTMViews | LRUAViews, net: DNC | NTM | LRUA) -> list[Panel]:
    """Which stored programs make the interface vector, for each control head; none without programs."""
    heads, programs = views.program_weights.shape[2:]
    match net:
        case DNC():
            names = ["reading", "writing"]
        case NTM():
            names = _ntm_heads(net.heads)
        case _:
            names = _numbered("head", heads)
    rows = [f"program {i + 1}" for i in range(programs)]
    return [Panel(f"{name}: programs", views.program_weights[:, 0, i].T, rows) for i, name in enumerate(names[:heads])]


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
    names, panels = _ntm_heads(heads), []
    vectors = {"r": iter(views.reads[:, 0].unbind(1)), "w": iter(views.values[:, 0].unbind(1))}
    for i, kind in enumerate(heads):
        panels += [
            Panel(f"{names[i]}: weights", views.weights[:, 0, i].T, "slot"),
            _vectors(f"{names[i]}: what it {'reads' if kind == 'r' else 'adds'}", next(vectors[kind])),
        ]
    most = views.shifts.shape[-1] // 2
    moves = [f"{name}, by {move:+d}" if move else f"{name}, stays" for name in names for move in range(-most, most + 1)]
    sharpness, strengths = views.sharpness[:, 0].T, views.strengths[:, 0].T
    return [
        *panels,
        Panel("gates: 1 by content, 0 from where the head was", views.gates[:, 0].T, names),
        Panel("shifts", views.shifts[:, 0].flatten(1).T, moves),
        Panel("strength of the lookup by content", strengths, names, (0.0, _largest(strengths))),
        Panel("sharpness", sharpness, names, (1.0, _largest(sharpness))),
    ]


def _lrua_panels(views: LRUAViews) -> list[Panel]:
    names = _numbered("head", views.keys.shape[2])
    panels = []
    for i, name in enumerate(names):
        panels += [
            Panel(f"{name}: weights of the write", views.write_weights[:, 0, i].T, "slot"),
            Panel(f"{name}: weights of the read", views.read_weights[:, 0, i].T, "slot"),
            _vectors(f"{name}: what it adds and looks for", views.keys[:, 0, i]),
        ]
    usage = views.usage[:, 0].T
    return [
        *panels,
        Panel("usage", usage, "slot", (0.0, _largest(usage))),
        Panel("gates: 1 where the head read last, 0 to the least used slot", views.write_gates[:, 0].T, names),
    ]


def _vectors(title: str, vectors: Tensor) -> Panel:
    """Vectors `[T,W]` about 0."""
    reach = _largest(vectors.abs()) or 1.0
    return Panel(title, vectors.T, "word", (-reach, reach), SIGNED)


def _largest(values: Tensor) -> float:
    return float(values.nan_to_num().max())


def _ntm_heads(heads: str) -> list[str]:
    """A name for each head, in the order of the list."""
    counts = {"r": iter(_numbered("read head", heads.count("r"))), "w": iter(_numbered("write head", heads.count("w")))}
    return [next(counts[kind]) for kind in heads]


def _numbered(name: str, count: int) -> list[str]:
    return [f"{name} {i + 1}" for i in range(count)] if count > 1 else [name] * count


def _draw(panels: list[Panel], links: dict[int, Tensor], title: str, output: Path) -> None:
    """Panels below each other over one time axis, and below them the links `[Q,N,N]` after some of the steps."""
    steps = panels[0].values.shape[1]
    width = min(max(9.0, 3 + 0.12 * steps), 24.0)
    heights = [min(max(0.15 + 0.11 * len(panel.values), 0.4), 1.7) for panel in panels]
    over_time = sum(heights) + 0.45 * len(panels) + 0.5
    below = 0.3 + len(next(iter(links.values()))) * (width / LINKS + 0.3) if links else 0.0
    figure: Any = Figure(figsize=(width, over_time + below), layout="constrained")
    figure.suptitle(title)
    upper = figure
    if links:
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
            axes.yaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
        else:
            axes.set_yticks(range(len(panel.rows)), panel.rows, fontsize="small")
        axes.xaxis.set_major_locator(MaxNLocator(12, integer=True))
        axes.tick_params(labelbottom=axes is grid[-1, 0])
        upper.colorbar(image, cax=bar, ticks=MaxNLocator(2))
    grid[-1, 0].set_xlabel("step")
    figure.savefig(output, dpi=DPI)


def _draw_links(figure: Any, links: dict[int, Tensor]) -> None:
    """The link matrices `[Q,N,N]` after some of the steps, a row for each write head."""
    writers = len(next(iter(links.values())))
    grid = figure.subplots(writers, len(links), squeeze=False)
    figure.suptitle("links: a row's slot was written right after a column's", fontsize="medium")
    for row, head in enumerate(_numbered("write head", writers)):
        for (step, link), axes in zip(links.items(), grid[row], strict=True):
            image = axes.imshow(link[row].numpy(), interpolation="nearest", vmin=0, vmax=1, cmap=SHARES)
            axes.set(title=f"after step {step}", xlabel="slot")
            axes.title.set_fontsize("medium")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_locator(MaxNLocator(4, integer=True))
        grid[row, 0].set_ylabel(f"{head}: slot")
    figure.colorbar(image, ax=grid, aspect=40, ticks=MaxNLocator(2))
