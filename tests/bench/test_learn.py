"""docs/results.md: its commands train what it says, and it is made of the results alone."""

import json
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from bench import learn, machine
from fastmem import cli, plots, tasks, training
from fastmem.cli import app

TRAIN = learn.train

RUNS = [run for run in learn.all_runs() if run.seed == 2]


@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_command_gives_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: learn.Run):
    module, package, *arguments = learn.command(run.settings)
    assert (module, package) == ("-m", "fastmem")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.Run, "train", lambda run: iter(()))
    assert CliRunner().invoke(app, [*arguments, "--folder", "run"]).exit_code == 0
    kept = training.read_checkpoint(tmp_path / "run").settings
    task, asked = (training.make_task(s.task, s.task_options) for s in (kept, run.settings))
    lstm = run.settings.model == "lstm"
    unused = {"task_options", "model_options", *(learn.OF_A_MEMORY if lstm else ())}
    assert task == asked
    assert kept.model_dump(exclude=unused) == run.settings.model_dump(exclude=unused)
    made, expected = (training.make_model(s, task) for s in (kept, run.settings))
    assert repr(made) == repr(expected)


def test_the_networks_of_an_experiment_have_as_many_parameters():
    for experiment in learn.EXPERIMENTS:
        for task in experiment.tasks:
            settings = [experiment.settings_of(task, variant, 0) for variant in experiment.variants]
            first, *others = map(training.count_parameters, settings)
            assert all(abs(other - first) < 0.03 * first for other in others)
            assert len({(one.iterations, one.batch_size, one.optimiser, one.learning_rate) for one in settings}) == 1


def test_names_of_runs_are_different():
    names = [run.name for run in learn.all_runs()]
    assert len({*names}) == len(names)


def test_longer_is_what_it_says_and_fits_the_trained_network():
    for experiment in learn.EXPERIMENTS:
        settings = experiment.runs()[0].settings
        task = training.make_task(settings.task, settings.task_options)
        for label, options in experiment.longer.items():
            longer = training.variant(settings, options)
            assert (longer.input_size, longer.output_size) == (task.input_size, task.output_size)
            factor = {"four times as long": 4, "with twice the repeats": 1}.get(label, 2)
            name = "length" if hasattr(task, "max_length") else "items"
            most = factor * getattr(task, f"max_{name}")
            assert getattr(longer, f"min_{name}") == getattr(longer, f"max_{name}") == most
            if isinstance(task, tasks.RepeatCopy | tasks.Sequencing):
                assert isinstance(longer, tasks.RepeatCopy | tasks.Sequencing)
                most = (2 if "repeats" in label else 1) * task.max_repeats
                assert longer.min_repeats == longer.max_repeats == most


def test_what_is_stored_is_in_the_present_form():
    """Nobody has to train again what the page shows."""
    results = json.loads(learn.RESULTS.read_text())
    assert results["runs"].keys() == learn.finished(results).keys()


@pytest.mark.parametrize(
    "changes", [{"clip_norm": None}, {"doubles": False}, {"task_options": {"count_range": (1, 2)}}]
)
def test_what_the_command_line_cannot_hold_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="expected a number or text, which a command line can hold, got"):
        learn.command(learn.EXPERIMENTS[0].variants["dnc"].model_copy(update=changes))


TINY: dict[str, Any] = {
    "hidden_size": 8, "num_slots": 4, "word_size": 4, "iterations": 6, "evaluate_every": 2, "evaluation_size": 10,
}  # fmt: skip


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page of tiny runs is written: bits with longer sequences, tokens with two tasks, and some not run."""
    copy = training.Settings(task="copy", task_options={"bits": 2, "max_length": 2}, model="ntm", **TINY)
    tokens = training.Settings(task="token-sequence", task_options={"length": 3}, **TINY)
    random = tokens.model_copy(update={"write_schedule": "random"})
    shares = {"dnc": 68.0, "dnc+rw": 47.6}
    experiments = [
        learn.Experiment(
            "tiny", "Tiny", "Nowhere.", learn.beside_an_lstm(copy),
            longer={"twice as long": {"min_length": 4, "max_length": 4}},
        ),
        learn.Experiment(
            "tokens", "Tokens", "Nowhere.", {"dnc": tokens, "dnc+rw": random}, shown={},
            tasks={"copy": {"rule": "copy"}, "reverse": {"rule": "reverse"}},
            published={"copy": shares, "reverse": shares},
        ),
    ]  # fmt: skip
    monkeypatch.setattr(learn, "EXPERIMENTS", experiments)
    monkeypatch.setattr(learn, "SEEDS", (0,))
    monkeypatch.setattr(learn, "FRESH", 20)
    monkeypatch.setattr(learn, "POLL", 0.01)
    monkeypatch.setattr(plots, "DPI", 10)
    monkeypatch.setattr(learn, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(learn, "RESULTS", tmp_path / "docs" / "results.json")
    monkeypatch.setattr(learn, "folder_of", lambda name: tmp_path / "runs" / name)
    monkeypatch.setattr(learn, "train", train)
    monkeypatch.setattr(cli, "_interrupted", lambda: nullcontext([]))  # signals are for the main thread
    return tmp_path / "docs"


def train(words: list[str], printed: Path) -> None:
    assert CliRunner().invoke(app, words[2:], catch_exceptions=False).exit_code == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def stored(docs: Path) -> dict[str, Any]:
    return json.loads((docs / "results.json").read_text())["runs"]


def test_a_page_from_runs(docs: Path):
    learn.main(jobs=1)
    page = (docs / "results.md").read_text()
    assert "python -m fastmem train copy --option bits=2 --option max_length=2 --model ntm" in page
    assert page.count("| lstm | 0 |") == 1 and page.count("| 6 |") == 2 and page.count("commit ") == 1
    assert "| wrong bits twice as long, of 8 |" in page and "not been run" not in page
    assert page.count("| dnc+rw | ") == 1 and "| 68.0 |" in page and "order of the paper, dnc > dnc+rw, " in page
    assert all(line.count("|") in (0, 9, 10) for line in page.splitlines())
    pictures = ["tiny", "tiny-ntm-0", *(f"tokens-{rule}{end}" for rule in ("copy", "reverse") for end in
                ("", "-contribution", "-dnc-0"))]  # fmt: skip
    for picture in pictures:
        assert f"({picture}.png)" in page and (docs / f"{picture}.png").is_file()
    assert {name.removesuffix(".png") for name in contents(docs) if name.endswith(".png")} == {*pictures}


def test_some_or_none_have_been_run(docs: Path):
    learn.main(page=True)
    assert (docs / "results.md").read_text().count("This has not been run here.") == 2
    learn.main(only=["tiny"], jobs=1)
    assert [*stored(docs)] == ["tiny-ntm-0", "tiny-lstm-0"]
    page = (docs / "results.md").read_text()
    assert page.count("This has not been run here.") == 1 and "| lstm | 0 |" in page
    learn.main(jobs=1)
    kept = {name: run for name, run in stored(docs).items() if name != "tokens-copy-dnc+rw-0"}
    learn.store({"runs": kept})
    learn.main(page=True)
    page = (docs / "results.md").read_text()
    assert "3 of 4 runs have been done here." in page and "On copy the order" not in page
    assert "On reverse the order" in page and stored(docs) == kept


def test_page_and_curves_are_made_of_the_results_alone(docs: Path, monkeypatch: pytest.MonkeyPatch):
    learn.main(jobs=1)
    before = contents(docs)
    for picture in docs.glob("*.png"):
        picture.unlink()
    shutil.rmtree(docs.parent / "runs")
    monkeypatch.setattr(learn, "train", None)  # what is there is not run again
    learn.main()
    kept = {"results.md", "results.json", "tiny.png", "tokens-copy.png", "tokens-reverse.png"}
    assert contents(docs) == {name: content for name, content in before.items() if name in kept}


def test_a_run_that_was_stopped_goes_on(docs: Path, monkeypatch: pytest.MonkeyPatch):
    learn.main(only=["tiny"], jobs=1)
    whole = stored(docs)
    (docs / "results.json").unlink()
    shutil.rmtree(docs.parent / "runs")
    iterate, begun = training.Run._iterate, []

    def killed(run: training.Run) -> training.Entry:
        if run.iteration == 5 and run.settings.model == "lstm":
            raise KeyboardInterrupt
        return iterate(run)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "_iterate", killed)
        with pytest.raises(BaseException):  # noqa: B017
            learn.main(only=["tiny"], jobs=1)
    first = stored(docs)
    assert [*first] == ["tiny-ntm-0"] and (docs.parent / "runs" / "tiny-lstm-0").is_dir()

    def counted(run: training.Run) -> training.Entry:
        begun.append(run.iteration)
        return iterate(run)

    monkeypatch.setattr(training.Run, "_iterate", counted)
    learn.main(only=["tiny"], jobs=1)
    assert begun == [4, 5], "from its last checkpoint"
    after = stored(docs)
    assert after["tiny-ntm-0"] == first["tiny-ntm-0"] and after["tiny-lstm-0"]["minutes"] > 0
    for name in ("errors", "curve", "command", "iterations"):
        assert after["tiny-lstm-0"][name] == whole["tiny-lstm-0"][name]


def test_a_run_of_other_settings_starts_anew(docs: Path):
    run = learn.all_runs()[0]
    other = training.Run(run.settings.model_copy(update={"batch_size": 3}), run.folder)
    list(other.train())
    assert learn.trained_before(run) is None
    learn.main(only=["tiny"], jobs=1)
    assert training.read_checkpoint(run.folder).settings.batch_size == run.settings.batch_size


def test_a_result_of_another_command_is_made_again_and_its_commit_shown(docs: Path, monkeypatch: pytest.MonkeyPatch):
    learn.main(only=["tiny"], jobs=1)
    before = stored(docs)
    before["tiny-lstm-0"]["command"] += " --batch-size 3"
    learn.store({"runs": before})
    describe = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: {**describe, "commit": "0123456789abcdef", "changed": True})
    learn.main(only=["tiny"], jobs=1)
    after = stored(docs)
    assert after["tiny-ntm-0"] == before["tiny-ntm-0"]
    assert not after["tiny-lstm-0"]["command"].endswith("--batch-size 3")
    page = (docs / "results.md").read_text()
    assert "commit 0123456789 with changes: tiny-lstm-0.\n" in page and ": tiny-ntm-0.\n" in page


def test_two_at_a_time_and_one_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, docs: Path):
    """As it is used, by commands of their own."""
    monkeypatch.setattr(learn, "train", TRAIN)
    learn.main(only=["tiny"], jobs=2)
    assert {*stored(docs)} == {"tiny-ntm-0", "tiny-lstm-0"}
    said = (tmp_path / "runs" / "tiny-ntm-0.txt").read_text()
    assert "ntm with" in said and "iteration 6:" in said
    with pytest.raises(RuntimeError, match=r"train nothing ended with 2; .*failed.txt has what it said"):
        learn.train(["-m", "fastmem", "train", "nothing"], tmp_path / "failed.txt")
    assert "task: expected one of copy" in (tmp_path / "failed.txt").read_text()


def test_what_came_of_programs():
    (experiment,) = (one for one in learn.EXPERIMENTS if one.name == "sequencing")
    wrong = {"nutm-2": 1.0, "nutm-3": 2.0, "ntm": 3.0}

    def found(run):
        errors = wrong[run.variant] + run.seed
        return {**run.asked(), "errors": errors, "longer_errors": {label: 10 * errors for label in experiment.longer}}

    results = {"runs": {run.name: found(run) for run in experiment.runs()}}
    assert learn.findings(results) == [
        f"{experiment.title}. Wrong bits a sequence, the mean over seeds: nutm-2 2.0, nutm-3 3.0, ntm 4.0; "
        "nutm-2 20.0, nutm-3 30.0, ntm 40.0 twice as long; nutm-2 20.0, nutm-3 30.0, ntm 40.0 with twice the repeats."
    ]
    del results["runs"]["sequencing-ntm-1"]
    assert learn.findings(results) == []


def test_whether_the_order_of_the_paper_appeared():
    (experiment,) = (one for one in learn.EXPERIMENTS if one.published)
    shares = {"dnc": 0.5, "dnc+rw": 0.4, "dnc+uw": 0.9, "dnc+cuw": 0.6, "lstm": 0.99}
    done = {run.name: {"accuracy": shares[run.variant] + 0.01 * run.seed} for run in experiment.runs()}
    assert learn.accuracies(experiment, done)["copy"]["dnc"] == pytest.approx(51)
    assert learn.verdicts(experiment, done) == [
        "On copy the order of the paper, dnc+uw > dnc+cuw > dnc > dnc+rw, appeared.",
        "On reverse the order of the paper, dnc+uw > dnc+cuw > dnc+rw > dnc, did not appear; here it was "
        "dnc+uw > dnc+cuw > dnc > dnc+rw.",
    ]
    del done["uniform-writing-copy-dnc+uw-1"]
    assert [sentence.split(",")[0] for sentence in learn.verdicts(experiment, done)] == [
        "On reverse the order of the paper"
    ]
