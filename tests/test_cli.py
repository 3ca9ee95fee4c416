"""`python -m fastmem train` and `plot`, as a user calls them."""

import re
import signal
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
            signal.raise_signal(signal.SIGINT)  # in the midst of an iteration, as it comes
        return iterate(run)

    monkeypatch.setattr(training.Run, "_iterate", interrupted)
    result = call("train", "copy", *SMALL, "--folder", tmp_path / "run")
    assert result.exit_code == 130
    assert f"stopped after 3 iterations; go on with --resume {tmp_path}" in result.output.replace("\n", "")
    assert torch.load(tmp_path / "run" / training.CHECKPOINT)["iteration"] == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


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
        ([], "task: expected one of copy, long-copy"),
        (["copy", "--option", "max_length=0"], "min_length, max_length: expected 1 <= min <= max, got 1 and 0"),
        (["copy", "--option", "max_length=many"], "max_length: expected a valid integer"),
        (["copy", "--learning-rate", "-1"], "learning_rate: expected greater than 0, got -1.0"),
        (["copy", "--seed", "-1"], "seed: expected greater than or equal to 0, got -1"),
        (["copy", "--device", "gpu"], "device: expected one that works here, such as cpu, got 'gpu'"),
        (["copy", "--device", "meta"], "device: expected one that works here, such as cpu, got 'meta'"),
        (["copy", "--model", "ntm", "--heads", "xy"], "heads: expected letters r and w, such as \"rw\", got 'xy'"),
        (["copy", "--model-option", "mask=true"], "dnc: expected options among num_write_heads, norm,"),
        (["copy", "--model-option", "masked=perhaps"], "masked: expected a valid boolean"),
        (["copy", "--model-option", "mask_floor=2"], "mask_floor: expected a number in [0, 1), got 2.0"),
        (["copy", "--model-option", "controller=rnn"], "controller: expected one of lstm, gru, feedforward, got 'rnn'"),
        (["copy", "--model", "lstm", "--model-option", "masked=true"], "lstm: expected no options, got masked"),
        (["copy", "--optimiser-option", "alpha=0.9"], "adam: expected no options, got alpha"),
        (["dynamic-ngrams", "--curriculum", "naive"], "curriculum: expected none, as DynamicNGrams("),
    ],
)
def test_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    result = call("train", *arguments)
    assert result.exit_code == 2 and message in text(result)
    assert not list(tmp_path.iterdir()), "a command that fails leaves nothing behind"


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        result = call("train", "copy", *SMALL, "--folder", folder)
        assert result.exit_code == 2 and "folder: expected one to write to, got" in text(result)
    assert "folder: expected one that holds a run" in text(call("train", "--resume", tmp_path / "file"))
    (tmp_path / training.CHECKPOINT).write_bytes(b"nothing")
    assert "folder: expected a checkpoint of a run" in text(call("train", "--resume", tmp_path))
    torch.save({"weight": torch.zeros(1)}, tmp_path / training.CHECKPOINT)
    assert "folder: expected a checkpoint of a run" in text(call("train", "--resume", tmp_path))


def test_resume_takes_what_may_change_and_refuses_the_rest(tmp_path: Path) -> None:
    assert call("train", "copy", *SMALL, "--iterations", "2", "--folder", tmp_path).exit_code == 0
    for arguments, name in {
        ("copy",): "task",
        ("--model", "dnc"): "model",
        ("--option", "bits=3"): "task_options",
        ("--by-one",): "doubles",
        ("--folder", "elsewhere"): "folder",
    }.items():
        result = call("train", *arguments, "--resume", tmp_path)
        assert result.exit_code == 2
        assert f"{name}: expected to stay as it was in the run that is resumed, got" in text(result)
    changes = ["--iterations", "8", "--solved-at", "1e9", "--evaluate-every", "3", "--evaluation-size", "10"]
    result = call("train", "--resume", tmp_path, *changes, "--device", "cpu")
    assert result.exit_code == 0 and "iteration 3:" in text(result) and "over 10 fresh ones" in text(result)
    assert len(training.read_log(tmp_path)) == 3


def test_the_options_of_the_papers(tmp_path: Path) -> None:
    options = ["--model-option", "masked=true", "--model-option", "controller=gru", "--num-layers", "2"]
    optimiser = ["--optimiser", "rmsprop", "--optimiser-option", "alpha=0.95", "--optimiser-option", "centered=true"]
    curriculum = ["--curriculum", "look-back", "--advance-below", "1e9", "--by-one"]
    small = [*SMALL, "--option", "max_length=3", "--iterations", "12", "--clip-value", "10"]
    result = call("train", "copy", *small, *options, *optimiser, *curriculum, "--folder", tmp_path)
    assert result.exit_code == 0, result.output
    assert "was at level 1 of 3" in text(result) and "at level 2 of 3" in text(result)


def test_help_shows_the_defaults_of_the_settings() -> None:
    shown = text(call("train", "--help"))
    assert "Default: 0.001." in shown and "Default: doubles." in shown and "Default: None" not in shown


def test_plot_of_a_folder_without_a_run(tmp_path: Path) -> None:
    assert call("plot", tmp_path).exit_code == 2
