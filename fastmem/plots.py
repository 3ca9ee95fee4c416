"""Pictures of runs. Needs the extra `cli`."""

from pathlib import Path

from matplotlib.figure import Figure

from fastmem.training import Entry


def curves(runs: dict[str, list[Entry]], output: Path) -> None:
    """Loss and wrong bits of runs over their iterations; a dot is an evaluation on fresh sequences."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, wrong = figure.subplots(1, 2)
    for name, entries in runs.items():
        iterations = [entry.iteration for entry in entries]
        (line,) = loss.plot(iterations, _smooth([entry.loss for entry in entries]), label=name)
        wrong.plot(iterations, _smooth([entry.bit_errors for entry in entries]), color=line.get_color())
        evaluated = [(entry.iteration, entry.evaluated) for entry in entries if entry.evaluated is not None]
        if evaluated:
            wrong.plot(*zip(*evaluated, strict=True), "o", color=line.get_color())
    loss.set(title="loss, nats per sequence", xlabel="iteration")
    wrong.set(title="wrong bits per sequence", xlabel="iteration")
    loss.legend()
    figure.savefig(output, dpi=120)


def _smooth(values: list[float], window: int = 50) -> list[float]:
    """The mean of each value and those before it, `window` at most."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[i + 1] - sums[max(0, i + 1 - window)]) / min(i + 1, window) for i in range(len(values))]
