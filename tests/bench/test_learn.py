"""docs/results.md: its commands train what it says, and it is made of the results alone."""

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pydantic")
pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from bench import learn
from fastmem import training
from fastmem.cli import app

MODELS = [(experiment, model) for experiment in learn.EXPERIMENTS for model in experiment.models]


@pytest.mark.parametrize(("experiment", "model"), MODELS, ids=lambda value: getattr(value, "name", value))
def test_the_command_gives_the_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experiment: Any, model: str):
    settings = experiment.settings_of(model, 2)
    module, package, *arguments = learn.command(settings, "run")
    assert (module, package) == ("-m", "fastmem")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.Run, "train", lambda run: iter(()))
    assert CliRunner().invoke(app, arguments).exit_code == 0
    kept = training.read_checkpoint(tmp_path / "runs" / "run").settings
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


def test_a_page_from_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two tiny runs through everything that a real one takes."""
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
    monkeypatch.setattr(learn, "train", lambda words: CliRunner().invoke(app, words[2:], catch_exceptions=False))
    monkeypatch.chdir(tmp_path)
    learn.main()
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "python -m fastmem train copy --option bits=2 --option max_length=2 --model ntm" in page
    assert page.count("| lstm | 0 |") == 1 and page.count("| 3 |") == 2
    for picture in ("tiny", "tiny-ntm-0"):
        assert f"({picture}.png)" in page and (tmp_path / "docs" / f"{picture}.png").is_file()
    written = (tmp_path / "docs" / "results.json").read_text()
    learn.main()
    assert (tmp_path / "docs" / "results.json").read_text() == written, "what is there is not run again"
