"""What the models learn: trains each experiment on three seeds by its command, and writes docs/results.md from it.

`python -m bench.learn` runs what docs/results.json does not hold yet, one command at a time, so that it can be stopped
and started again; the runs stay in runs/. With nothing left to run it writes the page anew.
"""

import json
import shlex
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
        title="Copy to length 10, the NTM",
        source='The task of Graves et al., "Neural Turing Machines", at half its length: 1 to 10 vectors of 8 bits. As '
        "there an LSTM of 100, one read and one write head and words of 20; 32 slots where the paper has 128, batches "
        "of 16 where it has single sequences, and Adam at 1e-3.",
        settings=Settings(task="copy", task_options={"max_length": 10}, **NTM, **LIMITS),
        longer={"min_length": 20, "max_length": 20},
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
    return machine.ROOT / "runs" / name


def command(settings: Settings, name: str) -> list[str]:
    """What to give `python` to train by the settings."""
    unused = {"task"} | (OF_A_MEMORY if settings.model == "lstm" else set())
    flags = {
        **settings.model_dump(exclude=unused, exclude_defaults=True),
        "seed": settings.seed,
        "folder": f"runs/{name}",
    }
    words = ["-m", "fastmem", "train", settings.task]
    for field, value in flags.items():
        if isinstance(value, dict):
            flag = "--" + field.replace("_", "-").removesuffix("s").replace("task-", "")
            words += [word for pair in value.items() for word in (flag, "=".join(map(str, pair)))]
        else:
            words += [f"--{field.replace('_', '-')}", str(value)]
    return words


def train(words: list[str]) -> None:
    subprocess.run([sys.executable, *words], cwd=machine.ROOT, check=True)


def carry_out(experiment: Experiment, model: str, seed: int) -> dict[str, Any]:
    """Trains by the command, and measures what was learned."""
    name = name_of(experiment, model, seed)
    words = command(experiment.settings_of(model, seed), name)
    start = time.perf_counter()
    train(words)
    seconds = time.perf_counter() - start
    trained = training.read_checkpoint(folder_of(name))
    options = trained.settings.task_options
    tasks = [training.make_task(experiment.settings.task, {**options, **longer}) for longer in ({}, experiment.longer)]
    wrong, longer_wrong = (training.evaluate(trained.model, task, FRESH, FRESH_SEED) for task in tasks)
    asked = tasks[1].sample(1).mask.sum() * tasks[1].output_size
    return {
        "command": shlex.join(["python", *words]),
        "parameters": sum(parameter.numel() for parameter in trained.model.parameters()),
        "iterations": trained.iteration,
        "minutes": seconds / 60,
        "wrong_bits": wrong,
        "longer_wrong_bits": longer_wrong,
        "longer_bits": float(asked),
    }


def summary(results: dict[str, Any]) -> list[list[str]]:
    """For each experiment: title, seeds that the network with a memory solved, its minutes, seeds the LSTM solved."""
    rows = []
    for experiment in EXPERIMENTS:
        memory, lstm = (
            [results["runs"][name_of(experiment, model, seed)] for seed in SEEDS] for model in experiment.models
        )
        solved = [f"{sum(run['wrong_bits'] <= SOLVED for run in runs)} of {len(SEEDS)}" for runs in (memory, lstm)]
        minutes = [run["minutes"] for run in memory]
        rows.append([experiment.title, solved[0], f"{min(minutes):.1f} to {max(minutes):.1f}", solved[1]])
    return rows


def write(results: dict[str, Any]) -> None:
    """The page, and the pictures of the experiments whose runs are all in runs/."""
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text()).render(
        results=results, experiments=EXPERIMENTS, seeds=SEEDS, solved=SOLVED, fresh=FRESH, name_of=name_of
    )
    (DOCS / "results.md").write_text(page)
    for experiment in EXPERIMENTS:
        names = [name_of(experiment, model, seed) for model in experiment.models for seed in SEEDS]
        if all(folder_of(name).is_dir() for name in names):
            logs = {name.removeprefix(f"{experiment.name}-"): training.read_log(folder_of(name)) for name in names}
            plots.curves(logs, DOCS / f"{experiment.name}.png")
            first = training.read_checkpoint(folder_of(names[0]))
            title = f"{first.settings.model} on {first.settings.task} after {first.iteration} iterations"
            plots.sequence(first.model, first.fresh(0, experiment.longer), title, DOCS / f"{names[0]}.png")


def main() -> None:
    DOCS.mkdir(exist_ok=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    for experiment in EXPERIMENTS:
        for model in experiment.models:
            for seed in SEEDS:
                name = name_of(experiment, model, seed)
                if name not in results["runs"]:
                    results["runs"][name] = carry_out(experiment, model, seed)
                    results |= machine.describe()
                    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    write(results)


if __name__ == "__main__":
    main()
