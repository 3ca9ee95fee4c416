"""What the models learn: trains each experiment on three seeds by its commands, and writes docs/results.md from it.

`python -m bench.learn` runs what docs/results.json does not hold yet or holds of another command, as many at a time as
there are cores. It can be stopped and started again: a run that did not end goes on from its checkpoint. With nothing
left to run it writes the page anew. The page and the curves come from docs/results.json alone; the runs stay in
runs/learn, for the pictures of a memory.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import jinja2
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench import machine
from fastmem import diagnostics, plots, training
from fastmem.training import Settings

DOCS = machine.ROOT / "docs"
RESULTS = DOCS / "results.json"
TEMPLATE = Path(__file__).with_name("results.md.j2")
CORES = os.cpu_count() or 1
SEEDS = (0, 1, 2)
FRESH = 1000  # sequences of the last evaluation
FRESH_SEED = 2_000_003  # no training or evaluation on the way draws from it
SOLVED = 0.1  # wrong bits a sequence
OF_A_MEMORY = {"num_slots", "word_size", "num_read_heads", "heads"}
POLL = 1.0  # seconds between two looks at how far the runs are


@dataclass(frozen=True)
class Experiment:
    """Networks that are trained on the same task, or on each of several."""

    name: str
    title: str
    source: str  # what was published, and what is other here
    variants: dict[str, Settings]  # by the name of the network
    longer: dict[str, dict[str, int]] = field(default_factory=dict)  # options of the task for longer sequences
    pictured: tuple[str, ...] = ()  # of which variants the memory is shown; none given: of the first
    best: bool = False  # pictured is the seed with the fewest errors, not the first
    shown: dict[str, int] | None = None  # options of the sequence that shows it; None: the first of the longer
    tasks: dict[str, dict[str, str]] = field(default_factory=lambda: {"": {}})  # options of each, by name
    # Accuracy in per cent by task and network, where it is that which is compared.
    published: dict[str, dict[str, float]] = field(default_factory=dict)

    def settings_of(self, task: str, variant: str, seed: int) -> Settings:
        settings = self.variants[variant]
        options = {**settings.task_options, **self.tasks[task]}
        return settings.model_copy(update={"task_options": options, "seed": seed})

    @property
    def against_lstm(self) -> bool:
        """Whether a network with a memory stands against an LSTM of as many parameters."""
        return [*self.variants][1:] == ["lstm"]

    def runs(self) -> "list[Run]":
        return [Run(self, task, variant, seed) for task in self.tasks for variant in self.variants for seed in SEEDS]


class Run(NamedTuple):
    experiment: Experiment
    task: str
    variant: str
    seed: int

    @property
    def name(self) -> str:
        parts = (self.experiment.name, self.task, self.variant, str(self.seed))
        return "-".join(part for part in parts if part)

    @property
    def settings(self) -> Settings:
        return self.experiment.settings_of(self.task, self.variant, self.seed)

    @property
    def folder(self) -> Path:
        """Of its own, not the one that the command takes by itself: what is there was made here and may be removed."""
        return folder_of(self.name)

    def asked(self) -> dict[str, Any]:
        """What fixes a result: where it differs from what is stored, the run is done again."""
        words = shlex.join(["python", *command(self.settings)])
        return {"command": words, "longer": self.experiment.longer, "sequences": FRESH}


def beside_an_lstm(settings: Settings) -> dict[str, Settings]:
    return {settings.model: settings, "lstm": training.matched_lstm(settings)}


# Each evaluation may end a run: half of what counts as solved, so that other sequences find it solved as well.
LIMITS: dict[str, Any] = {"iterations": 20_000, "solved_at": 0.05}
NTM: dict[str, Any] = {"model": "ntm", "hidden_size": 100, "num_slots": 32, "word_size": 20}
LONG_COPY: dict[str, Any] = {"task": "copy", "num_slots": 128, "word_size": 20, "iterations": 10_000}
SEQUENCING: dict[str, Any] = {
    "task": "sequencing", "task_options": {"max_length": 5, "max_repeats": 5}, "num_slots": 64, "word_size": 20,
    "iterations": 20_000,
}  # fmt: skip
TOKENS: dict[str, Any] = {
    "task": "token-sequence", "task_options": {"length": 30}, "hidden_size": 100, "num_slots": 4, "word_size": 64,
    "num_read_heads": 1, "model_options": {"controller": "layernorm_lstm"}, "batch_size": 32, "clip_tensor_norm": 5,
    "iterations": 4_500,
}  # fmt: skip
EXPERIMENTS = [
    Experiment(
        name="repeat-copy",
        title="Repeat copy, the DNC",
        source='Sizes and lengths are those of the code published with Graves et al., "Hybrid computing using a neural '
        'network with dynamic external memory": 1 to 2 vectors of 4 bits, 1 to 2 repeats, 16 slots of 16, 4 read '
        "heads, an LSTM of 64, batches of 16. The optimiser is Adam at 1e-3 where the code has RMSProp at 1e-4.",
        variants=beside_an_lstm(Settings(task="repeat-copy", **LIMITS)),
        longer={"twice as long": {"min_length": 4, "max_length": 4, "min_repeats": 2}},
    ),
    Experiment(
        name="copy",
        title="Copy to length 20, the NTM",
        source='The task of Graves et al., "Neural Turing Machines", as published: 1 to 20 vectors of 8 bits. As there '
        "an LSTM of 100, one read and one write head and words of 20; 32 slots where the paper has 128, batches of 16 "
        "where it has single sequences, and Adam at 1e-3.",
        variants=beside_an_lstm(Settings(task="copy", **NTM, **LIMITS)),
        longer={"twice as long": {"min_length": 40, "max_length": 40}},
    ),
    Experiment(
        name="longer-repeat-copy",
        title="Repeat copy to length 4 and 4 repeats, the DNC",
        source="As the first, but up to 16 vectors are asked for: here what the network holds has to be read again.",
        variants=beside_an_lstm(
            Settings(task="repeat-copy", task_options={"max_length": 4, "max_repeats": 4}, **LIMITS)
        ),
        longer={"twice as long": {"min_length": 8, "max_length": 8, "min_repeats": 4}},
    ),
    Experiment(
        name="associative-recall",
        title="Associative recall, the NTM",
        source='The task of Graves et al., "Neural Turing Machines", as published: 2 to 6 items of 3 vectors of 6 '
        "bits. The network is that of the copy task.",
        variants=beside_an_lstm(Settings(task="associative-recall", **NTM, **LIMITS)),
        longer={"twice as long": {"min_items": 12, "max_items": 12}},
    ),
    Experiment(
        name="long-copy",
        title="Long copy, the NUTM and the NTM",
        source='Reduced from Le et al., "Neural Stored-program Memory", where an NTM of 100 and an NUTM of 80 with two '
        "programs learn to copy 1 to 40 vectors and are asked for 199: here 1 to 20 vectors of 8 bits, 128 slots of "
        "20, an NTM of 100 and an NUTM of 91, which has as many parameters; batches of 16 where the paper has single "
        "sequences, Adam at 1e-3 where it has RMSProp at 1e-4, and as many iterations for all.",
        variants={
            "nutm": Settings(**LONG_COPY, model="nutm", hidden_size=91),
            "ntm": Settings(**LONG_COPY, model="ntm", hidden_size=100),
        },
        longer={
            "twice as long": {"min_length": 40, "max_length": 40},
            "four times as long": {"min_length": 80, "max_length": 80},
        },
        pictured=("nutm", "ntm"),
    ),
    Experiment(
        name="sequencing",
        title="Copy and repeat copy in one sequence, the NUTM and the NTM",
        source='Reduced from Le et al., "Neural Stored-program Memory", where an NTM of 200 and an NUTM of 150 with '
        "three programs have lengths of 1 to 10 and 1 to 9 repeats: here both are 1 to 5, with 64 slots of 20; an NTM "
        "of 100, and NUTMs of as many parameters, of 91 with two programs and of 83 with three. Batches of 16 as "
        "there, Adam at 1e-3 where the paper has RMSProp at 1e-4, and as many iterations for all. Rows named "
        "programs, in the pictures of an NUTM, show which of them makes what a head is told, step by step.",
        variants={
            "nutm-2": Settings(**SEQUENCING, model="nutm", hidden_size=91),
            "nutm-3": Settings(**SEQUENCING, model="nutm", hidden_size=83, model_options={"num_programs": 3}),
            "ntm": Settings(**SEQUENCING, model="ntm", hidden_size=100),
        },
        longer={
            "twice as long": {"min_length": 10, "max_length": 10, "min_repeats": 5},
            "with twice the repeats": {"min_length": 5, "min_repeats": 10, "max_repeats": 10},
        },
        pictured=("nutm-2", "nutm-3", "ntm"),
        best=True,
        shown={"min_length": 5, "min_repeats": 5},  # where the programs do what they were trained for
    ),
    Experiment(
        name="uniform-writing",
        title="Uniform Writing: copy and reverse",
        source='Reduced from Le et al., "Learning to Remember More with Less Memorization", Table 1: 30 tokens where '
        "the paper has 50 and 100, batches of 32 where it has 64, 4,500 iterations where it has 10,000. As there 4 "
        "slots of 64, one read head, a layer-normalised LSTM of 100, of 95 with cached writing, Adam at 1e-3, and "
        "gradients cut tensor by tensor at a norm of 5. The DNC writes in every step, +rw at random ones, drawn once a "
        "seed, +uw at every sixth, and +cuw at every third, from a cache of the states since the last write; in the "
        "answer all write in every step. The LSTM has as many parameters as the DNC.",
        variants={
            "dnc": Settings(**TOKENS),
            "dnc+rw": Settings(**TOKENS, write_schedule="random"),
            "dnc+uw": Settings(**TOKENS, write_schedule="uniform"),
            "dnc+cuw": Settings(**{**TOKENS, "hidden_size": 95}, write_schedule="cached", write_interval=3),
            "lstm": training.matched_lstm(Settings(**TOKENS)),
        },
        pictured=("dnc+uw",),
        tasks={"copy": {"rule": "copy"}, "reverse": {"rule": "reverse"}},
        published={
            "copy": {"dnc": 68.0, "dnc+rw": 47.6, "dnc+uw": 97.7, "dnc+cuw": 83.8, "lstm": 15.6},
            "reverse": {"dnc": 65.0, "dnc+rw": 70.8, "dnc+uw": 100.0, "dnc+cuw": 93.3, "lstm": 49.6},
        },
    ),
]


def folder_of(name: str) -> Path:
    return machine.ROOT / "runs" / "learn" / name


def command(settings: Settings) -> list[str]:
    """What to give `python` to train by the settings."""
    unused = {"task"} | (OF_A_MEMORY if settings.model == "lstm" else set())
    if settings.clip_value is not None or settings.clip_tensor_norm is not None:
        unused |= {"clip_norm"} if settings.clip_norm is None else set()  # follows from these
    flags = settings.model_dump(exclude=unused, exclude_defaults=True) | {"seed": settings.seed}
    words = ["-m", "fastmem", "train", settings.task]
    for name, value in flags.items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, dict):
            flag = flag.removesuffix("s").replace("task-", "")
            words += [word for key, option in value.items() for word in (flag, f"{key}={_typed(key, option)}")]
        else:
            words += [flag, _typed(name, value)]
    return words


def _typed(name: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{name}: expected a number or text, which a command line can hold, got {value!r}")
    return str(value)


def train(words: list[str], printed: Path) -> None:
    """Runs a command of `python`; what it prints goes to a file."""
    with open(printed, "w") as output:
        done = subprocess.run([sys.executable, *words], cwd=machine.ROOT, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(['python', *words])} ended with {done.returncode}; {printed} has what it said")


def carry_out(run: Run) -> dict[str, Any]:
    """Trains by the command, from the checkpoint of a run that was stopped, and measures what was learned."""
    begun = trained_before(run)
    if begun is None:
        shutil.rmtree(run.folder, ignore_errors=True)
        words = [*command(run.settings), "--folder", str(run.folder)]
    else:
        words = ["-m", "fastmem", "train", "--resume", str(run.folder)]
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    train(words, run.folder.with_suffix(".txt"))
    seconds = time.perf_counter() - start + (begun or 0.0)
    trained = training.read_checkpoint(run.folder)
    found = training.evaluate(trained.model, trained.task, FRESH, FRESH_SEED)
    longer = {label: training.variant(trained.settings, changes) for label, changes in run.experiment.longer.items()}
    return {
        **run.asked(),
        "parameters": training.count_parameters(trained.settings),
        "iterations": trained.iteration,
        "minutes": seconds / 60,
        "errors": found.errors,
        "accuracy": found.accuracy,
        "longer_errors": {
            label: training.evaluate(trained.model, task, FRESH, FRESH_SEED).errors for label, task in longer.items()
        },
        "longer_possible": {label: float(task.possible_errors(task.sample(1))) for label, task in longer.items()},
        "made_by": made_by(machine.describe()),
        "curve": rounded(plots.curve(training.read_log(run.folder))),
    }  # fmt: skip


def trained_before(run: Run) -> float | None:
    """The seconds of the iterations up to the checkpoint, if there is one of the same settings."""
    try:
        before = training.read_checkpoint(run.folder)
        log = training.read_log(run.folder)
    except ValueError:
        return None
    if command(before.settings) != command(run.settings):
        return None
    return sum(entry.seconds for entry in log if entry.iteration <= before.iteration)


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
    """For each network beside an LSTM: title, seeds that it solved, its minutes, seeds that the LSTM solved."""
    rows = []
    done = finished(results)
    for experiment in EXPERIMENTS:
        if not experiment.against_lstm or not all(run.name in done for run in experiment.runs()):
            continue
        memory, lstm = by_variant(experiment, done).values()
        solved = [f"{sum(run['errors'] <= SOLVED for run in runs)} of {len(SEEDS)}" for runs in (memory, lstm)]
        taken = [run["minutes"] for run in memory]
        minutes = dict.fromkeys(f"{limit:.1f}" for limit in (min(taken), max(taken)))  # once where both look alike
        rows.append([experiment.title, solved[0], " to ".join(minutes), solved[1]])
    return rows


def findings(results: dict[str, Any]) -> list[str]:
    """What came of each experiment that sets networks with a memory against each other, by means over seeds."""
    done, told = finished(results), []
    for experiment in EXPERIMENTS:
        if experiment.against_lstm or not all(run.name in done for run in experiment.runs()):
            continue
        if experiment.published:
            told.append(f"{experiment.title}. {' '.join(verdicts(experiment, done))}")
            continue
        texts = []
        for label in ("", *experiment.longer):
            means = {
                variant: fmean(run["longer_errors"][label] if label else run["errors"] for run in runs)
                for variant, runs in by_variant(experiment, done).items()
            }
            texts.append(f"{', '.join(f'{variant} {wrong:.1f}' for variant, wrong in means.items())} {label}".rstrip())
        told.append(f"{experiment.title}. Wrong bits a sequence, the mean over seeds: {'; '.join(texts)}.")
    return told


def by_variant(experiment: Experiment, done: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The results of an experiment whose runs are all done."""
    return {
        variant: [done[run.name] for run in experiment.runs() if run.variant == variant]
        for variant in experiment.variants
    }


def finished(results: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What is stored of the runs as they are asked for now."""
    stored = {run.name: (results["runs"].get(run.name, {}), run.asked()) for run in all_runs()}
    return {
        name: found
        for name, (found, wanted) in stored.items()
        if all(found.get(key) == value for key, value in wanted.items())
    }


def accuracies(experiment: Experiment, done: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The mean accuracy over seeds in per cent, by task and network; of networks all of whose seeds are done."""
    found: dict[str, dict[str, float]] = {}
    for task in experiment.tasks:
        found[task] = {}
        for variant in experiment.variants:
            names = [Run(experiment, task, variant, seed).name for seed in SEEDS]
            if all(name in done for name in names):
                found[task][variant] = 100 * fmean(done[name]["accuracy"] for name in names)
    return found


def verdicts(experiment: Experiment, done: dict[str, Any]) -> list[str]:
    """For each task whether the networks with a memory came in the order that was published."""
    sentences = []
    for task, found in accuracies(experiment, done).items():
        names = [name for name, settings in experiment.variants.items() if settings.model != "lstm"]
        if not all(name in found for name in names):
            continue
        published, here = (
            " > ".join(sorted(names, key=lambda name: -shares[name])) for shares in (experiment.published[task], found)
        )
        which = "appeared" if published == here else f"did not appear; here it was {here}"
        sentences.append(f"On {task} the order of the paper, {published}, {which}.")
    return sentences


def write(results: dict[str, Any]) -> None:
    """The page and the curves, from the results, and pictures of each memory whose run is still there."""
    done = finished(results)
    makers: dict[str, list[str]] = {}
    for name, found in done.items():
        makers.setdefault(found["made_by"], []).append(name)
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE.read_text()).render(
        done=done, makers=makers, experiments=EXPERIMENTS, seeds=SEEDS, solved=SOLVED, fresh=FRESH,
        points=plots.POINTS, accuracies=accuracies, verdicts=verdicts, pictured=pictured,
        results_of=lambda runs: [done[run.name] for run in runs],
        mean=lambda results, key: fmean(result[key] for result in results),
    )  # fmt: skip
    (DOCS / "results.md").write_text(page)
    for experiment in EXPERIMENTS:
        draw(experiment, done)


def pictured(experiment: Experiment, done: dict[str, Any]) -> list[Run]:
    """The runs whose memory is shown, of one seed each."""
    variants = experiment.pictured or [*experiment.variants][:1]
    seeds = SEEDS if experiment.best else SEEDS[:1]
    of_each = (
        [Run(experiment, task, variant, seed) for seed in seeds] for task in experiment.tasks for variant in variants
    )
    there = ([run for run in runs if run.name in done] for runs in of_each)
    return [min(runs, key=lambda run: done[run.name]["errors"]) for runs in there if runs]


def draw(experiment: Experiment, done: dict[str, Any]) -> None:
    for task in experiment.tasks:
        runs = [run for run in experiment.runs() if run.task == task and run.name in done]
        if not runs:
            continue
        kept = {f"{run.variant}-{run.seed}": plots.Curve(**done[run.name]["curve"]) for run in runs}
        if experiment.published:  # too many lines for one picture
            kept = {
                variant: mean([kept[f"{run.variant}-{run.seed}"] for run in runs if run.variant == variant])
                for variant in dict.fromkeys(run.variant for run in runs)
            }
        judge = training.make_task(runs[0].settings.task, {})
        name = "-".join(part for part in (experiment.name, task) if part)
        plots.curves(kept, DOCS / f"{name}.png", judge.loss_unit, judge.measure)
        there = {run.variant: run for run in runs if run.seed == SEEDS[0] and run.folder.is_dir()}
        if experiment.published and len(there) == len(experiment.variants):
            plots.contribution(contributions(there), DOCS / f"{name}-contribution.png")
    for run in pictured(experiment, done):
        if run.folder.is_dir():
            trained = training.read_checkpoint(run.folder)
            changes = next(iter(experiment.longer.values()), {}) if experiment.shown is None else experiment.shown
            picture = DOCS / f"{run.name}.png"
            title = f"{run.variant}: {trained.title}"
            plots.sequence(trained.model, trained.fresh(0, changes), title, picture, trained.task)


def mean(curves: list[plots.Curve]) -> plots.Curve:
    """The mean of runs of as many iterations."""
    loss, wrong = (
        [fmean(values) for values in zip(*all_of_them, strict=True)]
        for all_of_them in ([one.loss for one in curves], [one.wrong_bits for one in curves])
    )
    evaluations = [
        (together[0][0], fmean(errors for _, errors in together))
        for together in zip(*(one.evaluations for one in curves), strict=True)
    ]
    return plots.Curve(curves[0].iterations, loss, wrong, evaluations)


def contributions(runs: dict[str, Run]) -> dict[str, diagnostics.Contribution]:
    """What each step that is read contributes to the state after them, of trained networks."""
    found = {}
    for variant, run in runs.items():
        trained = training.read_checkpoint(run.folder)
        input = trained.task.sample(16, torch.Generator().manual_seed(FRESH_SEED)).input
        net = trained.model.recurrent if isinstance(trained.model, training.Recurrent) else trained.model
        found[variant] = diagnostics.contribution(net, input[: trained.task.read_steps])
    return found


def all_runs() -> list[Run]:
    return [run for experiment in EXPERIMENTS for run in experiment.runs()]


def store(results: dict[str, Any]) -> None:
    """A line a run, for one that was done again to be one line of a difference; whole, whenever it is stopped."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(run)}" for name, run in results["runs"].items())
    unfinished = RESULTS.with_suffix(".unfinished")
    unfinished.write_text(f'{{"runs": {{\n{lines}\n}}}}\n')
    os.replace(unfinished, RESULTS)


def results_of(runs: list[Run], jobs: int) -> Iterator[tuple[Run, dict[str, Any]]]:
    """Carries out runs, `jobs` at a time, and shows how far they are."""
    console = Console()
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
    )  # fmt: skip
    pool = ThreadPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,))
    ended = 0
    try:
        with Progress(*columns, console=console) as progress:
            bar = progress.add_task("", total=sum(run.settings.iterations for run in runs))
            waiting = {pool.submit(carry_out, run): run for run in runs}
            while waiting:
                some, _ = wait(waiting, timeout=POLL, return_when=FIRST_COMPLETED)
                for future in some:
                    run, found = waiting.pop(future), future.result()
                    ended += run.settings.iterations  # solved early or not
                    console.print(f"{run.name}: accuracy {found['accuracy']:.1%} after {found['minutes']:.1f} minutes")
                    yield run, found
                active = [run for future, run in waiting.items() if future.running()]
                progress.update(
                    bar, completed=ended + sum(map(iterations_of, active)),
                    description=f"{len(runs) - len(waiting)} of {len(runs)} runs",
                )  # fmt: skip
    finally:
        pool.shutdown(cancel_futures=True)


def iterations_of(run: Run) -> int:
    """How many the log of a run has, which it gets with each evaluation."""
    try:
        with open(run.folder / training.LOG) as log:
            return sum(1 for _ in log)
    except OSError:
        return 0


def main(only: list[str] | None = None, jobs: int = CORES, page: bool = False) -> None:
    DOCS.mkdir(exist_ok=True)
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"runs": {}}
    done = finished(results)
    left = [run for run in all_runs() if run.name not in done and (only is None or run.experiment.name in only)]
    for run, found in results_of(left, jobs) if left and not page else ():
        results["runs"][run.name] = found
        store(results)
    write(results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.learn", description=__doc__.partition("\n")[0])
    names = [experiment.name for experiment in EXPERIMENTS]
    parser.add_argument("--only", action="append", choices=names, help="one experiment; may be repeated")
    parser.add_argument("--jobs", type=int, default=CORES, help=f"runs at a time; default: {CORES}, the cores")
    parser.add_argument("--page", action="store_true", help="run nothing, write the page from what there is")
    main(**vars(parser.parse_args()))
