"""`python -m fastmem train` and `plot`, as a user calls them."""

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result

from fastmem import training
from fastmem.cli import app

SMALL = ["--option", "bits=2", "--option", "max_length=2", "--hidden-size", "8", "--num-slots", "4", "--word-size", "4",
         "--num-read-heads", "1", "--evaluate-every", "4", "--evaluation-size", "20"]  # fmt: skip


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(result: Result) -> str:
    """What was printed, without the frame and the line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def test_train_resume_and_plot(tmp_path: Path) -> None:
    result = call("train", "copy", *SMALL, "--iterations", "6", "--folder", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "dnc with" in text(result) and "iteration 4:" in text(result) and "iteration 6:" in text(result)
    assert len(training.read_log(tmp_path / "run")) == 6
    result = call("train", "--resume", tmp_path / "run", "--iterations", "9")
    assert result.exit_code == 0 and "iteration 9:" in text(result)
    other = call("train", "copy", *SMALL, "--model", "lstm", "--iterations", "3", "--folder", tmp_path / "lstm")
    assert other.exit_code == 0
    result = call("plot", tmp_path / "run", tmp_path / "lstm", "--output", tmp_path / "loss.png")
    assert result.exit_code == 0 and (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = training.Run._iterate

    def interrupted(run: training.Run) -> training.Entry:
        if run.iteration == 2:
            raise KeyboardInterrupt
        return iterate(run)

    monkeypatch.setattr(training.Run, "_iterate", interrupted)
    result = call("train", "copy", *SMALL, "--folder", tmp_path / "run")
    assert result.exit_code == 130
    assert f"stopped after 2 iterations; go on with --resume {tmp_path}" in result.output.replace("\n", "")
    assert torch.load(tmp_path / "run" / training.CHECKPOINT)["iteration"] == 2


def test_a_diverged_run_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training.tasks, "masked_loss", lambda output, batch: output.sum() * float("nan"))
    result = call("train", "copy", *SMALL, "--folder", tmp_path / "run", "--seed", "5")
    assert result.exit_code == 1
    assert "the loss is nan at iteration 1 with seed 5; the last good checkpoint is" in text(result)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpoy"], "task: expected one of copy, long-copy"),
        (["copy", "--option", "max_length"], "option: expected NAME=VALUE, got 'max_length'"),
        (["copy", "--option", "maximum=3"], "copy: expected options among bits"),
        (["copy", "--batch-size", "0"], "greater than or equal to 1"),
        (["--resume", "nowhere"], "folder: expected one that holds a run, got nowhere"),
    ],
)
def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("train", *arguments)
    assert result.exit_code == 2 and message in text(result)
    assert not list(tmp_path.iterdir()), "a command that fails leaves nothing behind"


def test_plot_of_a_folder_without_a_run(tmp_path: Path) -> None:
    assert call("plot", tmp_path).exit_code == 2
