import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")

from pydantic import ValidationError

from fastmem import tasks
from fastmem.training import CHECKPOINT, LOG, TASKS, Diverged, Entry, Run, Settings, evaluate, make_task, read_log

SMALL: dict[str, Any] = {
    "task": "copy",
    "task_options": {"bits": 2, "max_length": 2},
    "hidden_size": 8,
    "num_slots": 4,
    "word_size": 4,
    "num_read_heads": 1,
    "iterations": 12,
    "batch_size": 4,
    "evaluate_every": 5,
    "evaluation_size": 20,
}


def equal(a: Run, b: Run) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.model.parameters(), b.model.parameters(), strict=True))


def without_seconds(entries: list[Entry]) -> list[Entry]:
    return [entry._replace(seconds=0) for entry in entries]


@pytest.mark.parametrize("model", ["dnc", "ntm", "lstm"])
@pytest.mark.parametrize("optimiser", ["adam", "rmsprop"])
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, model: str, optimiser: str) -> None:
    settings = Settings(**SMALL, model=model, optimiser=optimiser)
    whole = Run(settings, tmp_path / "whole")
    entries = list(whole.train())
    stopped = Run(settings, tmp_path / "stopped")
    for entry in stopped.train():
        if entry.iteration == 7:  # as ctrl-C: between two evaluations
            break
    stopped.save()
    resumed = Run.resumed(tmp_path / "stopped")
    assert resumed.iteration == 7
    rest = list(resumed.train())
    assert without_seconds(rest) == without_seconds(entries[7:])
    assert equal(whole, resumed)
    assert without_seconds(read_log(tmp_path / "stopped")) == without_seconds(entries)
    assert [entry.iteration for entry in entries if entry.evaluated is not None] == [5, 10, 12]


def test_a_run_that_was_killed_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    settings = Settings(**SMALL)
    whole = Run(settings, tmp_path / "whole")
    entries = list(whole.train())
    killed = Run(settings, tmp_path / "killed")
    for entry in killed.train():
        if entry.iteration == 8:
            break
    with open(tmp_path / "killed" / LOG, "a") as log:
        log.write('{"iteration": 9, "lo')  # the line that was being written
    resumed = Run.resumed(tmp_path / "killed")
    assert resumed.iteration == 5
    list(resumed.train())
    assert equal(whole, resumed)
    assert without_seconds(read_log(tmp_path / "killed")) == without_seconds(entries)


def test_more_iterations_and_nothing_left_to_do(tmp_path: Path) -> None:
    whole = Run(Settings(**SMALL), tmp_path / "whole")
    list(whole.train())
    first = Run(Settings(**{**SMALL, "iterations": 5}), tmp_path / "run")
    list(first.train())
    assert list(Run.resumed(tmp_path / "run").train()) == []
    longer = Run.resumed(tmp_path / "run", iterations=12)
    list(longer.train())
    assert equal(whole, longer)


def test_a_loss_that_is_no_number_stops_the_run_and_says_where(tmp_path: Path) -> None:
    run = Run(Settings(**SMALL, seed=3), tmp_path)
    entries = []
    with pytest.raises(Diverged, match=r"the loss is nan at iteration 7 with seed 3; .*checkpoint.pt, of iteration 5"):
        for entry in run.train():
            entries.append(entry)
            if entry.iteration == 6:
                with torch.no_grad():
                    next(run.model.parameters()).fill_(torch.nan)
    assert all(parameter.isfinite().all() for parameter in torch.load(tmp_path / CHECKPOINT)["model"].values())


def test_a_solved_task_ends_the_run(tmp_path: Path) -> None:
    run = Run(Settings(**{**SMALL, "solved_at": 1e9}), tmp_path)
    assert [entry.iteration for entry in run.train()] == [1, 2, 3, 4, 5]


def test_training_learns(tmp_path: Path) -> None:
    options = {"bits": 1, "max_length": 1}
    run = Run(Settings(**{**SMALL, "task_options": options, "iterations": 150, "learning_rate": 1e-2}), tmp_path)
    entries = list(run.train())
    assert entries[-1].loss < 0.1 * entries[0].loss
    assert entries[-1].evaluated == 0


def test_evaluation_counts_wrong_bits_of_fresh_sequences() -> None:
    task = tasks.Copy(bits=4, min_length=3, max_length=3)

    class Zeros(torch.nn.Module):
        def forward(self, input: torch.Tensor) -> tuple[torch.Tensor, None]:
            return torch.zeros(*input.shape[:2], 4), None

    wrong = evaluate(Zeros(), task, 250, seed=0)
    assert 5.5 < wrong < 6.5  # half of the twelve bits are ones
    assert wrong == evaluate(Zeros(), task, 250, seed=0) != evaluate(Zeros(), task, 250, seed=1)


def test_log_is_one_json_object_a_line(tmp_path: Path) -> None:
    list(Run(Settings(**SMALL), tmp_path).train())
    lines = (tmp_path / LOG).read_text().splitlines()
    assert len(lines) == 12
    assert set(json.loads(lines[0])) == {"iteration", "loss", "bit_errors", "seconds", "evaluated"}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_named(name: str) -> None:
    assert make_task(name, {}).sample(2).input.shape[1] == 2


def test_options_come_as_strings() -> None:
    assert make_task("copy", {"max_length": "7", "delimiters": "end"}) == tasks.Copy(max_length=7, delimiters="end")
    assert make_task("key-value", {"two_way": "true"}) == tasks.KeyValue(two_way=True)


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task: expected one of copy, .*, got 'cpoy'"):
        make_task("cpoy", {})
    with pytest.raises(ValueError, match=r"copy: expected options among bits, .*, delimiters, got maximum"):
        make_task("copy", {"maximum": 3})
    for options in ({"max_length": "many"}, {"max_length": 0}):
        with pytest.raises(ValidationError):
            make_task("copy", options)
    for wrong in ({"model": "gpt"}, {"batch_size": 0}, {"learning_rate": -1.0}, {"colour": "red"}):
        with pytest.raises(ValidationError):
            Settings(**{**SMALL, **wrong})
    with pytest.raises(ValueError, match="folder: expected one that holds a run"):
        Run.resumed(tmp_path / "nothing")
    Run(Settings(**SMALL), tmp_path / "run")
    with pytest.raises(ValueError, match="folder: expected a new one or --resume"):
        Run(Settings(**SMALL), tmp_path / "run")
