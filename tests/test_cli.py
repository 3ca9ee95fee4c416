"""`python -m fastmem train` and `plot`, as a user calls them."""

import importlib.util
import re
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("pydantic")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner, Result

from fastmem import cli, nn, plots, tasks, training
from fastmem.cli import app

SMALL = ["--option", "bits=2", "--option", "max_length=2", "--hidden-size", "8", "--num-slots", "4", "--word-size", "4",
         "--num-read-heads", "1", "--evaluate-every", "4", "--evaluation-size", "20"]  # fmt: skip


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def text(result: Result) -> str:
    """What was printed, without the frame and the line breaks."""
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", result.output).split())


def contents(*folders: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}


def drawn(folder: Path) -> set[str]:
    files = contents(folder)
    assert all(picture.startswith(b"\x89PNG") for picture in files.values())
    return {str(path.relative_to(folder)) for path in files}


def test_train_resume_and_plot(tmp_path: Path) -> None:
    result = call("train", "copy", *SMALL, "--iterations", "6", "--folder", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "dnc with" in text(result) and "iteration 4:" in text(result) and "iteration 6:" in text(result)
    assert len(training.read_log(tmp_path / "run")) == 6
    result = call("train", "--resume", tmp_path / "run", "--iterations", "9")
    assert result.exit_code == 0 and "iteration 9:" in text(result)
    other = call("train", "copy", *SMALL, "--model", "lstm", "--iterations", "3", "--folder", tmp_path / "lstm")
    assert other.exit_code == 0
    ntm = call("train", "copy", *SMALL, "--model", "ntm", "--iterations", "3", "--folder", tmp_path / "ntm")
    assert ntm.exit_code == 0
    names = ["run", "lstm", "ntm"]
    before = contents(*(tmp_path / name for name in names))
    result = call("plot", *(tmp_path / name for name in names), "--output", tmp_path / "plots")
    assert result.exit_code == 0, result.output
    assert drawn(tmp_path / "plots") == {"loss.png", "run.png", "lstm.png", "ntm.png"}
    assert contents(*(tmp_path / name for name in names)) == before, "a run is left as it is"


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = training.Run._iterate

    def interrupted(run: training.Run) -> training.Entry:
        if run.iteration == 2:
            signal.raise_signal(signal.SIGINT)  # in the midst of an iteration, as it comes
        return iterate(run)

    monkeypatch.setattr(training.Run, "_iterate", interrupted)
    before = signal.getsignal(signal.SIGINT)
    result = call("train", "copy", *SMALL, "--folder", tmp_path / "run")
    assert result.exit_code == 130
    assert f"stopped after 3 iterations; go on with --resume {tmp_path}" in result.output.replace("\n", "")
    assert torch.load(tmp_path / "run" / training.CHECKPOINT)["iteration"] == 3
    assert signal.getsignal(signal.SIGINT) is before


def test_a_diverged_run_ends_with_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.Copy, "loss", lambda task, output, batch: output.sum() * float("nan"))
    result = call("train", "copy", *SMALL, "--folder", tmp_path / "run", "--seed", "5")
    assert result.exit_code == 1
    assert "the loss is nan at iteration 1 with seed 5; the last good checkpoint is" in text(result)


def test_ctrl_c_never_saves_a_parameter_that_is_no_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: training.Run, interrupted: list[int]) -> None:
        next(run.model.parameters()).data.fill_(float("nan"))
        interrupted.append(signal.SIGINT)

    monkeypatch.setattr(cli, "_train", broken)
    result = call("train", "copy", *SMALL, "--folder", tmp_path / "run")
    assert result.exit_code == 1 and "a parameter is not finite at iteration 0" in text(result)


@pytest.mark.parametrize(("name", "value"), [("--hidden-size", "100000000"), ("--num-slots", "2000000000")])
def test_more_than_fits_into_memory(tmp_path: Path, name: str, value: str) -> None:
    """Sizes beyond what any machine can address, for those that lend memory that they do not have."""
    result = call("train", "copy", "--batch-size", "10000", name, value, "--folder", tmp_path / "run")
    assert result.exit_code == 1 and "out of memory: expected sizes that fit this machine" in text(result)


def test_a_solved_run_stays_so(tmp_path: Path) -> None:
    small = [*SMALL, "--solved-at", "1e9", "--folder", tmp_path]
    assert "solved after 4 iterations: --solved-at was 1000000000.0" in text(call("train", "copy", *small))
    result = call("train", "--resume", tmp_path)
    assert result.exit_code == 0 and "solved after 4 iterations" in text(result)
    assert len(training.read_log(tmp_path)) == 4


def test_tensorboard_drops_what_a_resumed_run_does_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the writer: it is told from where on, and closed."""
    boards: list[tuple[Any, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            boards.append((folder, purge_step))

        def add_scalar(self, *_: Any) -> None:
            pass

        def __enter__(self) -> "Writer":
            return self

        def __exit__(self, *_: Any) -> None:
            boards.append(("closed",))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found("sys" if name == "tensorboard" else name))
    assert call("train", "copy", *SMALL, "--iterations", "4", "--folder", tmp_path).exit_code == 0
    assert call("train", "--resume", tmp_path, "--iterations", "5").exit_code == 0
    assert boards == [(str(tmp_path), 1), ("closed",), (str(tmp_path), 5), ("closed",)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cpoy"], "task: expected one of copy, long-copy"),
        (["copy", "--option", "max_length"], "option: expected NAME=VALUE, got 'max_length'"),
        (["copy", "--option", "maximum=3"], "copy: expected options among bits"),
        (["copy", "--batch-size", "0"], "greater than or equal to 1"),
        (["--resume", "nowhere"], "folder: expected one that holds a run, got nowhere"),
        ([], "task: expected one of copy, long-copy"),
        (["copy", "--option", "max_length=0"], "max_length: expected a positive integer, got 0"),
        (["copy", "--option", "max_length=many"], "max_length: expected a valid integer"),
        (["copy", "--learning-rate", "-1"], "learning_rate: expected greater than 0, got -1.0"),
        (["copy", "--learning-rate", "inf"], "learning_rate: expected a finite number, got inf"),
        (["copy", "--learning-rate", "1e39"], "learning_rate: expected less than or equal to 1000000, got 1e+39"),
        (["copy", "--solved-at", "nan"], "solved_at: expected a finite number, got nan"),
        (["copy", "--threads", "100000"], "'--threads': Input should be less than or equal to"),
        (["copy", "--option", "bits=99999999999999999999"], "bits: expected at most 2147483647, got 9999"),
        (["copy", "--hidden-size", "99999999999"], "hidden_size: expected less than or equal to 2147483647, got"),
        (["copy", "--seed", "-1"], "seed: expected greater than or equal to 0, got -1"),
        (["copy", "--device", "gpu"], "device: expected one that works here, such as cpu, got 'gpu'"),
        (["copy", "--device", "meta"], "device: expected one that works here, such as cpu, got 'meta'"),
        (["copy", "--model", "ntm", "--heads", "xy"], "heads: expected letters r and w, such as \"rw\", got 'xy'"),
        (["copy", "--model-option", "mask=true"], "dnc: expected options among num_write_heads, norm,"),
        (["copy", "--model-option", "masked=perhaps"], "masked: expected a valid boolean"),
        (["copy", "--model-option", "mask_floor=2"], "mask_floor: expected a number in [0, 1), got 2.0"),
        (
            ["copy", "--model-option", "controller=rnn"],
            "controller: expected one of lstm, layernorm_lstm, gru",
        ),
        (["copy", "--model", "lstm", "--model-option", "masked=true"], "lstm: expected no options, got masked"),
        (["copy", "--optimiser-option", "alpha=0.9"], "adam: expected no options, got alpha"),
        (
            ["token-sequence", "--option", "rule=sort"],
            "rule: expected one of copy, reverse, double, add, max, got 'sort'",
        ),
        (["sequencing", "--option", "subtasks=copy"], "subtasks: expected two or more of copy, repeat-copy,"),
        (["few-shot-digits", "--option", "classes=49"], "classes: expected at most 48, got 49"),
        (["copy", "--model", "nutm", "--model-option", "core=dnc", "--model-option", "max_shift=2"], "got max_shift"),
        (["copy", "--model", "lstm", "--write-schedule", "uniform"], "write_schedule: expected dense, as an lstm"),
        (["copy", "--write-interval", "5"], "write_interval: expected none, as the write schedule is dense, got 5"),
        (["continual", "--option", "phase=5"], "phase: expected 1 to 4, got 5"),
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
    assert "folder: expected a run by this version, got" in text(call("train", "--resume", tmp_path))
    torch.save({"weight": torch.zeros(1)}, tmp_path / training.CHECKPOINT)
    assert "folder: expected a run by this version, got" in text(call("train", "--resume", tmp_path))


def test_resume_takes_what_may_change_and_refuses_the_rest(tmp_path: Path) -> None:
    assert call("train", "copy", *SMALL, "--iterations", "2", "--folder", tmp_path).exit_code == 0
    for arguments, name in {
        ("copy",): "task",
        ("--model", "dnc"): "--model",
        ("--option", "bits=3"): "--option",
        ("--by-one",): "--doubles",
        ("--folder", "elsewhere"): "--folder",
    }.items():
        result = call("train", *arguments, "--resume", tmp_path)
        assert result.exit_code == 2
        assert re.search(rf"'{name}.*': expected to stay as it was in the run that is resumed;", text(result))
    changes = ["--iterations", "8", "--solved-at", "-1", "--evaluate-every", "3", "--evaluation-size", "10"]
    result = call("train", "--resume", tmp_path, *changes, "--device", "cpu")
    assert result.exit_code == 0 and "iteration 3:" in text(result) and "over 10 fresh ones" in text(result)
    assert len(training.read_log(tmp_path)) == 8
    result = call("train", "--resume", tmp_path, "--iterations", "20", "--solved-at", "1e9")
    assert "solved after 8 iterations" in text(result), "as its last evaluation found"


def test_the_options_of_the_papers(tmp_path: Path) -> None:
    options = ["--model-option", "masked=true", "--model-option", "controller=gru", "--num-layers", "2"]
    optimiser = ["--optimiser", "rmsprop", "--optimiser-option", "alpha=0.95", "--optimiser-option", "centered=true"]
    curriculum = ["--curriculum", "look-back", "--advance-below", "1e9", "--by-one"]
    small = [*SMALL, "--option", "max_length=3", "--iterations", "12", "--clip-value", "10"]
    result = call("train", "copy", *small, *options, *optimiser, *curriculum, "--folder", tmp_path)
    assert result.exit_code == 0, result.output
    assert "was at level 1 of 3" in text(result) and "at level 2 of 3" in text(result)


def test_errors_are_named_by_the_task(tmp_path: Path) -> None:
    small = ["--model", "lstm", "--hidden-size", "4", "--iterations", "2", "--evaluation-size", "5"]
    for task, option, measure in (
        ("copy", "max_length=2", "wrong bits a sequence over 5 fresh ones"),
        ("token-sequence", "length=2", "wrong tokens a sequence over 5 fresh ones"),
        ("sinusoid", "steps_in=2", "mean squared error over 5 fresh ones"),
    ):
        result = call("train", task, "--option", option, *small, "--folder", tmp_path / task)
        assert result.exit_code == 0 and measure in text(result), result.output
    result = call("plot", *(tmp_path / task for task in ("token-sequence", "sinusoid")), "--output", tmp_path / "plots")
    assert result.exit_code == 0, result.output


def test_the_networks_of_le_et_al(tmp_path: Path) -> None:
    """Stored programs, write schedules and continual learning, with pictures of what memory there is."""
    small = ["--iterations", "4", "--hidden-size", "4", "--num-slots", "3", "--word-size", "2"]
    tokens = ["token-sequence", "--option", "length=6", "--clip-tensor-norm", "5"]
    continual = ["--option", "max_length=2", "--option", "sort_items=2", "--option", "sort_outputs=2"]
    for name, arguments in {
        "nutm": ["copy", "--model", "nutm", "--model-option", "num_programs=3", "--diversity", "0.2"],
        "nutm-of-a-dnc": ["copy", "--model", "nutm", "--model-option", "core=dnc"],
        "lrua": ["copy", "--model", "lrua", "--num-read-heads", "2"],
        "nutm-of-an-lrua": [*tokens, "--model", "nutm", "--model-option", "core=lrua", "--num-read-heads", "2",
                            "--write-schedule", "uniform_balanced"],
        "uniform": [*tokens, "--write-schedule", "uniform"],
        "random": [*tokens, "--model", "ntm", "--write-schedule", "random"],
        "cached": [*tokens, "--write-schedule", "cached", "--write-interval", "2", "--attention-size", "3"],
        "never": ["copy", "--write-schedule", "uniform", "--write-interval", "1000"],
        "continual": ["continual", *continual, "--model", "nutm", "--model-option", "hard=true", "--model-option",
                      "controller=feedforward"],
    }.items():  # fmt: skip
        result = call("train", *arguments, *small, "--evaluation-size", "5", "--folder", tmp_path / name)
        assert result.exit_code == 0, result.output
        if name == "continual":
            assert re.search(r"accuracy: copy [\d.]+%, repeat-copy [\d.]+%, associative-recall [\d.]+%", text(result))
        assert call("plot", tmp_path / name, "--output", tmp_path / "plots" / name).exit_code == 0
        assert drawn(tmp_path / "plots" / name) == {"loss.png", f"{name}.png"}


def test_what_pictures_show_of_a_memory_that_rests() -> None:
    """White between the writes, for schedules within a call and for those of a call each; programs of each head."""
    task = tasks.TokenSequence(length=5)
    batch = task.sample(1)
    for schedule in ("uniform", "cached"):
        made = training.Settings(task="token-sequence", model="nutm", hidden_size=4, num_slots=2, word_size=3,
                                 write_schedule=schedule)  # fmt: skip
        model = training.make_model(made, task)
        assert isinstance(model, training.Scheduled)
        core = next(part for part in model.modules() if isinstance(part, nn.NTM))
        with core.watched() as parts:
            training.outputs(model, task, batch.input)
        acts = model.acts(len(batch.input), task.read_steps)
        views = plots._joined(parts, acts)
        for panel in [*plots._program_panels(views, core), *plots._ntm_panels(views, core.heads)]:
            assert torch.equal(panel.values.isnan().any(0), ~acts)
            low, high = panel.limits
            assert low < high
        assert [panel.title for panel in plots._program_panels(views, core)] == [
            "read head: programs", "write head: programs",
        ]  # fmt: skip
        assert torch.equal(views.weights[-1], parts[-1].weights[-1])


def test_a_task_whose_data_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    result = call("train", "flattened-digits", "--folder", tmp_path / "run")
    assert result.exit_code == 2 and "pip install scikit-learn" in text(result)


def test_help_shows_the_tasks_and_the_defaults_of_the_settings() -> None:
    shown = text(call("train", "--help"))
    assert all(name in shown for name in training.TASKS)
    assert "Default: 0.001." in shown and "Default: doubles." in shown and "Default: None" not in shown


def untrained(folder: Path, **settings: Any) -> Path:
    """A run of no iterations."""
    options = {"task": "copy", "hidden_size": 4, "num_slots": 3, "word_size": 2, "num_read_heads": 2}
    training.Run(training.Settings(**{**options, **settings}), folder)
    return folder


def test_plots_of_runs_with_the_same_name_lie_apart(tmp_path: Path) -> None:
    one, other = untrained(tmp_path / "a" / "copy"), untrained(tmp_path / "b" / "copy", model="ntm", heads="wrr")
    assert call("plot", one, other, "--output", tmp_path / "plots").exit_code == 0
    assert drawn(tmp_path / "plots") == {"loss.png", "a/copy.png", "b/copy.png"}
    lost = untrained(tmp_path / "loss", model="lstm")
    assert call("plot", lost, "--output", tmp_path / "more").exit_code == 0
    assert drawn(tmp_path / "more") == {"loss.png", f"{tmp_path.name}/loss.png"}
    result = call("plot", one, one / ".." / "copy", "--output", tmp_path / "none")
    assert result.exit_code == 2 and "runs: expected different folders, got" in text(result)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("task", training.TASKS)
def test_plot_of_every_task(tmp_path: Path, task: str) -> None:
    run = training.Run(training.Settings(task=task, model="ntm", hidden_size=4), tmp_path / "run")
    trained = training.read_checkpoint(run.folder)
    (tmp_path / "pictures").mkdir()
    plots.sequence(trained.model, trained.fresh(0, {}), task, tmp_path / "pictures" / "one.png", trained.task)
    assert drawn(tmp_path / "pictures") == {"one.png"}


def test_plot_of_a_longer_sequence_and_another_seed(tmp_path: Path) -> None:
    run = training.read_checkpoint(untrained(tmp_path))
    longer = run.fresh(0, {"min_length": "30", "max_length": "30"})
    assert longer.input.shape == (62, 1, 10)
    assert not torch.equal(longer.input, run.fresh(1, {"min_length": 30, "max_length": 30}).input)


def test_a_picture_of_several_write_heads_and_of_one_that_only_writes(tmp_path: Path) -> None:
    task = tasks.Copy(max_length=1)
    batch = task.sample(1)
    for number, model in enumerate(
        [
            nn.DNC(10, 4, 3, 2, num_read_heads=1, num_write_heads=2, output_size=8),
            nn.NTM(10, 4, 3, 2, heads="w", output_size=8, max_shift=0),
        ]
    ):
        plots.sequence(model, batch, "title", tmp_path / f"{number}.png")
    assert drawn(tmp_path) == {"0.png", "1.png"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["max_length"], "option: expected NAME=VALUE, got 'max_length'"),
        (["maximum=3"], "copy: expected options among bits"),
        (["bits=3"], "option: expected input and output sizes [10, 8], as in training, got [5, 3]"),
        (["max_length=abc"], "max_length: expected a valid integer, unable to parse string as an integer, got 'abc'"),
        (["max_length=0"], "max_length: expected a positive integer, got 0"),
    ],
)
def test_errors_of_plot(tmp_path: Path, options: list[str], message: str) -> None:
    run = untrained(tmp_path / "run")
    result = call("plot", run, *(word for o in options for word in ("--option", o)), "--output", tmp_path / "plots")
    assert result.exit_code == 2 and message in text(result)
    assert not (tmp_path / "plots").exists(), "a command that fails leaves nothing behind"


def test_plot_of_a_folder_without_a_run_and_into_a_file(tmp_path: Path) -> None:
    result = call("plot", tmp_path)
    assert result.exit_code == 2 and "folder: expected one that holds a run, got" in text(result)
    result = call("plot", tmp_path, "--seed", "99999999999999999999999")
    assert result.exit_code == 2 and "Invalid value for '--seed'" in text(result)
    (tmp_path / "file").touch()
    result = call("plot", untrained(tmp_path / "run"), "--output", tmp_path / "file")
    assert result.exit_code == 2 and "file: File exists" in text(result)
    (tmp_path / "run" / training.LOG).unlink()
    result = call("plot", tmp_path / "run")
    assert result.exit_code == 2 and "which has no log.jsonl" in text(result)
