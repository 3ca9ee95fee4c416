"""What the models learn: trains each experiment on three seeds by its command, and writes docs/results.md from it.

`python -m bench.learn` runs what docs/results.json does not hold yet or holds of another command, one at a time; it can
be stopped and started again, and a run that did not end starts anew. With nothing left to run it writes the page anew.
The page and the curves come from docs/results.json alone; the runs stay in runs/learn, for the pictures of a memory.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from bench import machine
from fastmem import plots, training
from fastmem.training import Settings

DOCS = machine.ROOT / "docs"
RESULTS = DOCS / "results.json"
TEMPLATE = Path(__file__).with_name("results.md.j2")
SEEDS = (0, 1, 2)
FRESH = 1000  # sequences of the last evaluation
FRESH_SEED = 2_000_003  # no training or evaluation on the way draws from it
SOLVED = 0.1  # wrong bits a sequence
OF_A_MEMORY = {"num_slots", "word_size", "num_read_heads", "heads"}


@dataclass(frozen=True)
class Experiment:
    name: str
    title: str
    source: str  # what was published, and what is other here
    settings: Settings
    longer: dict[str, int]  # options of the task for sequences twice as long as the longest of the training

    def settings_of(self, model: str, seed: int) -> Settings:
        settings = training.matched_lstm(self.settings) if model == "lstm" else self.settings
        return settings.model_copy(update={"seed": seed})

    @property
    def models(self) -> tuple[str, str]:
        return self.settings.model, "lstm"


# Each evaluation may end a run: half of what counts as solved, so that other sequences find it solved as well.
LIMITS: dict[str, Any] = {"iterations": 20_000, "solved_at": 0.05}
NTM: dict[str, Any] = {"model": "ntm", "hidden_size": 100, "num_slots": 32, "word_size": 20}
EXPERIMENTS = [
    Experiment(
        name="repeat-copy",
        title="Repeat copy, the DNC",
        source='Sizes and lengths are those of the code published with Graves et al., "Hybrid computing using a neural '
        'network with dynamic external memory": 1 to 2 vectors of 4 bits, 1 to 2 repeats, 16 slots of 16, 4 read '
        "heads, an LSTM of 64, batches of 16. The optimiser is Adam at 1e-3 where the code has RMSProp at 1e-4.",
        settings=Settings(task="repeat-copy", **LIMITS),
        longer={"min_length": 4, "max_length": 4, "min_repeats": 2},
    ),
    Experiment(
        name="copy",
        title="Copy to length 20, the NTM",
        source='The task of Graves et al., "Neural Turing Machines", as published: 1 to 20 vectors of 8 bits. As there '
        "an LSTM of 100, one read and one write head and words of 20; 32 slots where the paper has 128, batches of 16 "
        "where it has single sequences, and Adam at 1e-3.",
        settings=Settings(task="copy", **NTM, **LIMITS),
        longer={"min_length": 40, "max_length": 40},
    ),
    Experiment(
        name="longer-repeat-copy",
        title="Repeat copy to length 4 and 4 repeats, the DNC",
        source="As the first, but up to 16 vectors are asked for: here what the network holds has to be read again.",
        settings=Settings(task="repeat-copy", task_options={"max_length": 4, "max_repeats": 4}, **LIMITS),
        longer={"min_length": 8, "max_length": 8, "min_repeats": 4},
    ),
    Experiment(
        name="associative-recall",
        title="Associative recall, the NTM",
        source='The task of Graves et al., "Neural Turing Machines", as published: 2 to 6 items of 3 vectors of 6 '
        "bits. The network is that of the copy task.",
        settings=Settings(task="associative-recall", **NTM, **LIMITS),
        longer={"min_items": 12, "max_items": 12},
    ),
]


def name_of(experiment: Experiment, model: str, seed: int) -> str:
    return f"{experiment.name}-{model}-{seed}"


def folder_of(name: str) -> Path:
    """Of its own, not the one that the command takes by itself: what is there was made here and may be removed."""
    return machine.ROOT / "runs" / "learn" / name


def command(settings: Settings) -> list[str]:
    """What to give `python` to train by the settings."""
    unused = {"task"} | (OF_A_MEMORY if settings.model == "lstm" else set())
    flags = settings.model_dump(exclude=unused, exclude_defaults=True) | {"seed": settings.seed}
    words = ["-m", "fastmem", "train", settings.task]
    for field, value in flags.items():
        flag = "--" + field.replace("_", "-")
        if isinstance(value, dict):
            flag = flag.removesuffix("s").replace("task-", "")
            words += [word for name, option in value.items() for word in (flag, f"{name}={_typed(name, option)}")]
        else:
            words += [flag, _typed(field, value)]
    return words


def _typed(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name}: expected a number or text, which a command line can hold, got {value!r}")
    return str(value)


def train(words: list[str]) -> None:
    subprocess.run([sys.executable, *words], cwd=machine.ROOT, check=True)


def asked(experiment: Experiment, model: str, seed: int) -> dict[str, Any]:
    """What fixes a result: where it differs from what is stored, the run is done again."""
    words = command(experiment.settings_of(model, seed))
    return {"command": shlex.join(["python", *words]), "longer": experiment.longer, "sequences": FRESH}


def carry_out(experiment: Experiment, model: str, seed: int) -> dict[str, Any]:
    """Trains by the command, and measures what was learned."""
    folder = folder_of(name_of(experiment, model, seed))
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    train([*command(experiment.settings_of(model, seed)), "--folder", str(folder)])
    seconds = time.perf_counter() - start
    trained = training.read_checkpoint(folder)
    tasks = [training.variant(trained.settings, changes) for changes in ({}, experiment.longer)]
    wrong, longer_wrong = (training.evaluate(trained.model, task, FRESH, FRESH_SEED).errors for task in tasks)
    longer_bits = tasks[1].sample(1).mask.sum() * tasks[1].output_size
    return {
        **asked(experiment, model, seed),
        "parameters": training.count_parameters(trained.settings),
        "iterations": trained.iteration,
        "minutes": seconds / 60,
        "wrong_bits": wrong,
        "longer_wrong_bits": longer_wrong,
        "longer_bits": float(longer_bits),
        "made_by": made_by(machine.describe()),
        "curve": rounded(plots.curve(training.read_log(folder))),
    }


def made_by(described: dict[str, Any]) -> str:
    """The machine and the code of a run, as the page says it."""
    where, versions = described["machine"], described["versions"]
    changed = " with changes" if described["changed"] else ""
    return (
        f"{where['processor']}, {where['cores']} cores; torch {versions['torch']}, Python {versions['python']}, "
        f"fastmem {versions['fastmem']}, commit {(described['commit'] or 'unknown')[:10]}{changed}"
    )


def rounded(curve: plots.Curve) -> dict[str, Any]:
    """Its numbers to four digits, as many as a picture shows."""
    means = {name: [float(f"{value:.4g}") for value in getattr(curve, name)] for name in ("loss", "wrong_bits")}
    return curve._asdict() | means


def summary(results: dict[str, Any]) -> list[list[str]]:
    """For each experiment: title, seeds that the network with a memory solved, its minutes, seeds the LSTM solved."""
    rows = []
    for experiment in EXPERIMENTS:
        memory, lstm = (
            [results["runs"][name_of(experiment, model, seed)] for seed in SEEDS] for model in experiment.models
        )
        solved = [f"{sum(run['wrong_bits'] <= SOLVED for run in runs)} of {len(SEEDS)}" for runs in (memory, lstm)]
        taken = [run["minutes"] for run in memory]
        minutes = dict.fromkeys(f"{limit:.1f}" for limit in (min(taken), max(taken)))  # once where both look alike
        rows.append([experiment.title, solved[0], " to ".join(minutes), solved[1]])
    return rows


def write(results: dict[str, Any]) -> None:
    """The page and the curves, from the results, and a memory's picture of each experiment whose run is still there."""
    names = [name_of(*run) for run in all_runs()]
    makers: dict[str, list[str]] = {}
    for name in names:
        makers.setdefault(results["runs"][name]["made_by"], []).append(name)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text()).render(
        runs=results["runs"], makers=makers, experiments=EXPERIMENTS, seeds=SEEDS, solved=SOLVED, fresh=FRESH,
        name_of=name_of, points=plots.POINTS,
    )  # fmt: skip
    (DOCS / "results.md").write_text(page)
    for experiment in EXPERIMENTS:
        kept = {
            f"{model}-{seed}": plots.Curve(**results["runs"][name_of(experiment, model, seed)]["curve"])
            for model in experiment.models
            for seed in SEEDS
        }
        plots.curves(kept, DOCS / f"{experiment.name}.png")
        first = name_of(experiment, experiment.models[0], SEEDS[0])
        if folder_of(first).is_dir():
            run = training.read_checkpoint(folder_of(first))
            plots.sequence(run.model, run.fresh(0, experiment.longer), run.title, DOCS / f"{first}.png")


def all_runs() -> list[tuple[Experiment, str, int]]:
    return [(experiment, model, seed) for experiment in EXPERIMENTS for model in experiment.models for seed in SEEDS]


def store(results: dict[str, Any]) -> None:
    """A line a run, for one that was done again to be one line of a difference; whole, whenever it is stopped."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in results["runs"].items())
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(f'{{"runs": {{\n{lines}\n}}}}\n')
    os.replace(unfinished, RESULTS)


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    for run in all_runs():
        name, wanted = name_of(*run), asked(*run)
        stored = results["runs"].get(name, {})
        if any(stored.get(key) != value for key, value in wanted.items()):
            results["runs"][name] = carry_out(*run)
            store(results)
    write(results)


if __name__ == "__main__":
    main()
