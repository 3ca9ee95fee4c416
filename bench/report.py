"""Turns a results file into one HTML page that needs nothing else: tables, and plots as inline SVG."""

import io
from pathlib import Path
from typing import Any

import jinja2
import matplotlib

from bench.ops import HEADLINES, headline

matplotlib.use("Agg")
from matplotlib import pyplot

TEMPLATE = Path(__file__).with_name("report.html.j2")
FIGURES: Any = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", bbox_inches="tight")
    pyplot.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def ratios(rows: list[dict[str, Any]], mode: str) -> str:
    """How many times the time of fastmem the rivals take, with quartiles."""
    rows = [row for row in rows if row["mode"] == mode and not row["flush"]]
    labels = [f"{row['op']}\n{row['case']}, {row['inputs']}" for row in rows]
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.45 * len(rows)))
    height = 0.8 / len(HEADLINES)
    found = [headline(row["contenders"]) for row in rows]
    for index, name in enumerate(HEADLINES):
        points = [(at, ratios[name]) for at, ratios in enumerate(found) if name in ratios]
        axes.barh(
            [at + (index - 1) * height for at, _ in points],
            [ratio["median"] for _, ratio in points],
            height,
            xerr=[
                [ratio["median"] - ratio["low"] for _, ratio in points],
                [ratio["high"] - ratio["median"] for _, ratio in points],
            ],
            error_kw={"elinewidth": 0.8},
            label="fastest eager" if name == "eager" else name,
        )
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axes.xaxis.set_minor_formatter(lambda value, _: f"{value:g}" if f"{value:g}"[0] in "25" else "")
    axes.set_xlabel("time relative to fastmem (more than 1x: fastmem is faster)")
    axes.legend(frameon=False)
    return _svg(figure)


def losses(model: dict[str, Any]) -> str:
    figure, axes = pyplot.subplots(figsize=(7, 3.2))
    styles = ["-", "--", ":", "-."]
    for style, (name, values) in zip(styles, model["losses"].items(), strict=False):
        axes.plot(values, style, label=name, linewidth=1.2)
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss, nats per sample")
    axes.legend(frameon=False)
    return _svg(figure)


def steps(model: dict[str, Any]) -> str:
    figure, axes = pyplot.subplots(figsize=(7, 1.8))
    names = list(model["contenders"])
    spreads = [model["contenders"][name]["ms"] for name in names]
    middle = [entry["median"] for entry in spreads]
    low, high = ([abs(entry[side] - entry["median"]) for entry in spreads] for side in ("low", "high"))
    axes.barh(names, middle, xerr=[low, high], error_kw={"elinewidth": 0.8})
    axes.invert_yaxis()
    axes.set_xlabel("ms per time step, forward and backward and update")
    return _svg(figure)


def write(results: dict[str, Any], path: Path) -> None:
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    plots: dict[str, str] = {}
    with pyplot.rc_context(FIGURES):
        if results.get("ops"):
            modes = dict.fromkeys(row["mode"] for row in results["ops"]["rows"])
            plots |= {mode: ratios(results["ops"]["rows"], mode) for mode in modes}
        if results.get("model"):
            plots |= {"losses": losses(results["model"]), "steps": steps(results["model"])}
    page = environment.from_string(TEMPLATE.read_text()).render(results=results, plots=plots, style=STYLE)
    path.write_text(page)


STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: .7rem 0 1.4rem; font-size: 13px; }
th, td { padding: .2rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
.bad { color: #b00020; font-weight: 600; }
svg { max-width: 100%; height: auto; }
"""
