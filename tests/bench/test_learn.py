"""docs/results.md: its commands train what it says, and it is made of the results alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from bench import learn, machine
from fastmem import training
from fastmem.cli import app

MODELS = [(experiment, model) for experiment in learn.EXPERIMENTS for model in experiment.models]


@pytest.mark.parametrize(("experiment", "model"), MODELS, ids=lambda value: getattr(value, "name", value))
def test_the_command_gives_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: Any, model: str):
    settings = experiment.settings_of(model, 2)
    module, package, *arguments = learn.command(settings)
    assert (module, package) == ("-m", "fastmem")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.Run, "train", lambda run: iter(()))
    assert CliRunner().invoke(app, [*arguments, "--folder", "run"]).exit_code == 0
    kept = training.read_checkpoint(tmp_path / "run").settings
    task, asked = (training.make_task(s.task, s.task_options) for s in (kept, settings))
    unused = {"task_options", *(learn.OF_A_MEMORY if model == "lstm" else ())}
    assert task == asked
    assert kept.model_dump(exclude=unused) == settings.model_dump(exclude=unused)


def test_the_lstm_has_as_many_parameters():
    for experiment in learn.EXPERIMENTS:
        memory, lstm = (training.count_parameters(experiment.settings_of(model, 0)) for model in experiment.models)
        assert abs(lstm - memory) < 0.02 * memory


def test_longer_is_twice_the_length_and_fits_the_trained_network():
    for experiment in learn.EXPERIMENTS:
        options = experiment.settings.task_options
        task, longer = (
            training.make_task(experiment.settings.task, {**options, **more}) for more in ({}, experiment.longer)
        )
        assert (longer.input_size, longer.output_size) == (task.input_size, task.output_size)
        for name in ("length", "items"):
            if hasattr(task, f"max_{name}"):
                assert (
                    getattr(longer, f"min_{name}") == getattr(longer, f"max_{name}") == 2 * getattr(task, f"max_{name}")
                )


@pytest.mark.parametrize(
    "changes", [{"clip_norm": None}, {"doubles": False}, {"task_options": {"count_range": (1, 2)}}]
)
def test_what_the_command_line_cannot_hold_is_refused(changes: dict[str, Any]):
    with pytest.raises(ValueError, match="expected a number or text, which a command line can hold, got"):
        learn.command(learn.EXPERIMENTS[0].settings.model_copy(update=changes))


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a page of two tiny runs is written."""
    tiny = training.Settings(
        task="copy", task_options={"bits": 2, "max_length": 2}, model="ntm", hidden_size=8, num_slots=4, word_size=4,
        iterations=3, evaluation_size=10,
    )  # fmt: skip
    experiment = learn.Experiment("tiny", "Tiny", "Nowhere.", tiny, {"min_length": 4, "max_length": 4})
    monkeypatch.setattr(learn, "EXPERIMENTS", [experiment])
    monkeypatch.setattr(learn, "SEEDS", (0,))
    monkeypatch.setattr(learn, "FRESH", 20)
    monkeypatch.setattr(learn, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(learn, "RESULTS", tmp_path / "docs" / "results.json")
    monkeypatch.setattr(learn, "folder_of", lambda name: tmp_path / "runs" / name)
    monkeypatch.setattr(learn, "train", train)
    return tmp_path / "docs"


def train(words: list[str]) -> None:
    assert CliRunner().invoke(app, words[2:], catch_exceptions=False).exit_code == 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_page_from_runs(docs: Path):
    learn.main()
    page = (docs / "results.md").read_text()
    assert "python -m fastmem train copy --option bits=2 --option max_length=2 --model ntm" in page
    assert page.count("| lstm | 0 |") == 1 and page.count("| 3 |") == 2 and page.count("commit ") == 1
    for picture in ("tiny", "tiny-ntm-0"):
        assert f"({picture}.png)" in page and (docs / f"{picture}.png").is_file()


def test_page_and_curves_are_made_of_the_results_alone(docs: Path, monkeypatch: pytest.MonkeyPatch):
    learn.main()
    before = contents(docs)
    for picture in docs.glob("*.png"):
        picture.unlink()
    shutil.rmtree(docs.parent / "runs")
    monkeypatch.setattr(learn, "train", None)  # what is there is not run again
    learn.main()
    assert contents(docs) == {name: content for name, content in before.items() if name != "tiny-ntm-0.png"}


def test_a_run_that_was_stopped_starts_anew(docs: Path, monkeypatch: pytest.MonkeyPatch):
    iterate = training.Run._iterate

    def killed(run: training.Run) -> training.Entry:
        if run.iteration == 2 and run.settings.model == "lstm":
            raise KeyboardInterrupt
        return iterate(run)

    with monkeypatch.context() as patch:
        patch.setattr(training.Run, "_iterate", killed)
        with pytest.raises(BaseException):  # noqa: B017
            learn.main()
    (stored,) = json.loads((docs / "results.json").read_text())["runs"].items()
    assert stored[0] == "tiny-ntm-0" and (docs.parent / "runs" / "tiny-lstm-0").is_dir()
    learn.main()
    runs = json.loads((docs / "results.json").read_text())["runs"]
    assert runs["tiny-ntm-0"] == stored[1] and runs["tiny-lstm-0"]["iterations"] == 3


def test_a_result_of_another_command_is_made_again_and_its_commit_shown(docs: Path, monkeypatch: pytest.MonkeyPatch):
    learn.main()
    before = json.loads((docs / "results.json").read_text())["runs"]
    before["tiny-lstm-0"]["command"] += " --batch-size 3"
    learn.store({"runs": before})
    describe = machine.describe()
    monkeypatch.setattr(machine, "describe", lambda: {**describe, "commit": "0123456789abcdef", "changed": True})
    learn.main()
    after = json.loads((docs / "results.json").read_text())["runs"]
    assert after["tiny-ntm-0"] == before["tiny-ntm-0"]
    assert not after["tiny-lstm-0"]["command"].endswith("--batch-size 3")
    page = (docs / "results.md").read_text()
    assert "commit 0123456789 with changes: tiny-lstm-0.\n" in page and ": tiny-ntm-0.\n" in page
