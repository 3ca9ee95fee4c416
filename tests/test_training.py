import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("pydantic")

from pydantic import ValidationError

from fastmem import tasks
from fastmem.nn import DNC, LRUA, NTM, NUTM, CachedUniformWriting, WriteSchedule
from fastmem.training import (
    CHECKPOINT,
    FRESH,
    LOG,
    TASKS,
    Diverged,
    Entry,
    Evaluation,
    Run,
    Scheduled,
    Settings,
    count_parameters,
    evaluate,
    make_model,
    make_optimiser,
    make_task,
    matched_lstm,
    outputs,
    read_checkpoint,
    read_log,
    variant,
)

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


TOKENS: dict[str, Any] = {"task": "token-sequence", "task_options": {"length": 5}, "clip_tensor_norm": 0.01}
HARD = {"hard": True, "controller": "feedforward"}
RUNS: list[dict[str, Any]] = [
    {"model": "dnc"},
    {"model": "ntm", "optimiser": "rmsprop"},
    {"model": "lstm"},
    {"model": "lstm", "optimiser": "rmsprop"},
    {"model": "lrua"},
    {"model": "nutm"},
    {"model": "nutm", "model_options": HARD},
    {"model": "nutm", "model_options": {"core": "dnc"}, **TOKENS, "write_schedule": "uniform"},
    {"model": "dnc", **TOKENS, "write_schedule": "random", "seed": 3},
    {"model": "ntm", **TOKENS, "write_schedule": "cached", "write_interval": 2},
    {"model": "nutm", "model_options": HARD, "task": "continual", "task_options": {"max_length": 3}},
]


@pytest.mark.parametrize("changes", RUNS, ids=str)
def test_a_resumed_run_continues_bit_for_bit(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = Settings(**{**SMALL, **changes})
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
    ends = {3, 6, 9, 12} if settings.curriculum == "phases" else set()
    assert {entry.iteration for entry in entries if entry.evaluated is not None} == {5, 10, 12} | ends
    trained = read_checkpoint(tmp_path / "stopped")
    assert not trained.model.training
    assert all(torch.equal(p, q) for p, q in zip(trained.model.parameters(), whole.model.parameters(), strict=True))


@pytest.mark.parametrize("curriculum", ["uniform", "naive", "look-back", "prediction-gain"])
def test_a_resumed_run_continues_its_curriculum_bit_for_bit(tmp_path: Path, curriculum: str) -> None:
    options = {"bits": 2, "max_length": 6}
    changes = {"task_options": options, "iterations": 25, "evaluate_every": 4, "advance_below": 1e9, "doubles": False}
    settings = Settings(**{**SMALL, **changes}, curriculum=curriculum)
    whole = Run(settings, tmp_path / "whole")
    entries = list(whole.train())
    stopped = Run(settings.model_copy(update={"iterations": 14}), tmp_path / "stopped")
    assert without_seconds(list(stopped.train())[:13]) == without_seconds(entries[:13])
    resumed = Run.resumed(tmp_path / "stopped", iterations=25)
    assert without_seconds(list(resumed.train())) == without_seconds(entries[14:])
    assert equal(whole, resumed)
    levels = [entry.level for entry in entries]
    assert len(set(levels)) > 3 and set(levels) <= {1, 2, 3, 4, 5, 6}
    if curriculum == "naive":
        assert levels == [min(1 + iteration // 4, 6) for iteration in range(25)]


def test_a_curriculum_of_one_level_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"curriculum: expected none, as DynamicNGrams\(.*\) has one level, got 'naive'"
    ):
        Run(Settings(task="dynamic-ngrams", curriculum="naive"), tmp_path)


def test_a_lesson_is_left_by_its_own_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Settings(**{**SMALL, "evaluate_every": 1, "iterations": 4}, curriculum="naive", doubles=False), tmp_path)
    asked = []

    def errors(task: tasks.Task | None = None) -> Evaluation:
        asked.append(task)
        return Evaluation(0.5 if task in (None, run.task.lesson(1)) else 2.0, 0.0, {})

    monkeypatch.setattr(run, "evaluate", errors)
    assert [entry.level for entry in run.train()] == [1, 2, 2, 2]
    assert asked[:2] == [None, tasks.Copy(bits=2, min_length=1, max_length=1)]


def test_gain_is_the_fall_of_the_loss_of_one_batch_per_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Settings(**SMALL, curriculum="prediction-gain"), tmp_path)
    batches, gains = [], []
    monkeypatch.setattr(run.curriculum, "trained", lambda gain: gains.append(gain()))
    sample = tasks.Copy.sample

    def recorded(task: tasks.Copy, *arguments: Any) -> tasks.Batch:
        batches.append(sample(task, *arguments))
        return batches[-1]

    monkeypatch.setattr(tasks.Copy, "sample", recorded)
    entry = next(run.train())
    after = float(tasks.masked_loss(run.model(batches[0].input)[0], batches[0]).detach())
    assert gains == [pytest.approx((entry.loss - after) / len(batches[0].input), abs=1e-6)] and gains[0] > 0


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


@pytest.mark.parametrize("changes", [{}, {"clip_value": 1.0}])
def test_a_gradient_that_is_no_number_stops_the_run_before_its_step(tmp_path: Path, changes: dict[str, Any]) -> None:
    run = Run(Settings(**SMALL, **changes), tmp_path)
    next(run.model.parameters()).register_hook(lambda g: g * float("nan") if run.iteration == 9 else g)
    message = r"the norm of the gradient is nan at iteration 10 with seed 0; .*checkpoint.pt, of iteration 5"
    with pytest.raises(Diverged, match=message):
        list(run.train())
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    assert Run.resumed(tmp_path).iteration == 5


def test_a_parameter_that_is_no_number_is_never_saved(tmp_path: Path) -> None:
    run = Run(Settings(**SMALL), tmp_path)
    with torch.no_grad():
        next(run.model.parameters()).fill_(torch.inf)
    message = r"a parameter is not finite at iteration 0 with seed 0; .*checkpoint.pt, of iteration 0"
    with pytest.raises(Diverged, match=message):
        run.save()
    assert all(parameter.isfinite().all() for parameter in read_checkpoint(tmp_path).model.parameters())


def test_an_output_that_is_no_number_is_wrong() -> None:
    batch = tasks.Copy(bits=2, min_length=3, max_length=3).sample(4)
    assert tasks.bit_errors(torch.full_like(batch.target, torch.nan), batch) == 6


def test_accuracy_is_the_share_of_right_bits(tmp_path: Path) -> None:
    options = {"bits": 2, "min_length": 3, "max_length": 3}
    for entry in Run(Settings(**{**SMALL, "task_options": options}), tmp_path).train():
        assert entry.accuracy == pytest.approx(1 - entry.bit_errors / 6)


def test_a_solved_task_ends_the_run_and_stays_solved(tmp_path: Path) -> None:
    run = Run(Settings(**{**SMALL, "solved_at": 1e9}), tmp_path)
    assert [entry.iteration for entry in run.train()] == [1, 2, 3, 4, 5]
    assert list(Run.resumed(tmp_path, iterations=20).train()) == []
    assert [entry.iteration for entry in Run.resumed(tmp_path, solved_at=-1.0).train()] == [6, 7, 8, 9, 10, 11, 12]


def test_the_generator_of_the_caller_is_left_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state()
    run = Run(Settings(**SMALL), tmp_path)
    list(run.train())
    read_checkpoint(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(run.settings.seed)
    model = make_model(run.settings, run.task)
    first = Run(run.settings, tmp_path / "again").model
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), first.parameters(), strict=True))


def test_a_count_means_what_it_meant_in_training(tmp_path: Path) -> None:
    options = {"count": "normalised", "min_repeats": 1, "max_repeats": 5}
    run = Run(Settings(**{**SMALL, "task": "repeat-copy", "task_options": options}), tmp_path)
    changes = {"min_repeats": 8, "max_repeats": 8}
    pinned = variant(run.settings, changes)
    assert isinstance(pinned, tasks.RepeatCopy) and pinned.count_range == (1, 5)
    mixed = variant(Settings(**{**SMALL, "task": "sequencing", "task_options": {}}), changes | {"max_repeats": 14})
    assert isinstance(mixed, tasks.Sequencing) and mixed.count_range == (1, 9)
    fresh = read_checkpoint(tmp_path).fresh(0, changes)
    expected = pinned.sample(1, torch.Generator().manual_seed(FRESH))
    assert torch.equal(fresh.input, expected.input)
    assert float(fresh.input[..., -1].max()) == pytest.approx((8 - 3) / 2**0.5)


def test_what_is_no_run_of_this_version_is_named(tmp_path: Path) -> None:
    run = Run(Settings(**SMALL), tmp_path)
    list(run.train())
    good = torch.load(tmp_path / CHECKPOINT)
    other = {name: value[..., :1] for name, value in good["model"].items()}
    for state in ({**good, "model": other}, {n: v for n, v in good.items() if n != "model"}, [1], {"weight": 1}):
        torch.save(state, tmp_path / CHECKPOINT)
        for read in (Run.resumed, read_checkpoint):
            with pytest.raises(ValueError, match=r"folder: expected a run by this version, got .*checkpoint.pt: "):
                read(tmp_path)
    torch.save(good, tmp_path / CHECKPOINT)
    (tmp_path / LOG).write_text('{"iteration": 1, "colour": "red"}\n')
    with pytest.raises(ValueError, match=r"folder: expected a run by this version, got .*log.jsonl: "):
        Run.resumed(tmp_path)


def test_half_a_run_is_named(tmp_path: Path) -> None:
    list(Run(Settings(**SMALL), tmp_path).train())
    (tmp_path / LOG).rename(tmp_path / "log")
    with pytest.raises(ValueError, match=r"expected one that holds a run, got .*, which has no log.jsonl"):
        Run.resumed(tmp_path)
    (tmp_path / "log").rename(tmp_path / LOG)
    (tmp_path / CHECKPOINT).unlink()
    with pytest.raises(ValueError, match=r"expected one that holds a run, got .*, which has no checkpoint.pt"):
        Run.resumed(tmp_path)
    with pytest.raises(ValueError, match=r"expected a new one or --resume, got .*, which holds log.jsonl"):
        Run(Settings(**SMALL), tmp_path)


def test_a_run_stopped_at_its_start_resumes(tmp_path: Path) -> None:
    Run(Settings(**SMALL), tmp_path)
    (tmp_path / LOG).unlink()  # it is made after the checkpoint
    assert len(list(Run.resumed(tmp_path).train())) == 12


def test_solved_at_nothing_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(Settings(**{**SMALL, "solved_at": 0.0}), tmp_path)
    monkeypatch.setattr(run, "evaluate", lambda: Evaluation(0.0, 1.0, {}))
    assert len(list(run.train())) == 5


@pytest.mark.parametrize(
    ("given", "value", "tensor_norm", "norm"),
    [
        ({}, None, None, 10.0),
        ({"clip_norm": 5.0}, None, None, 5.0),
        ({"clip_value": 3.0}, 3.0, None, None),
        ({"clip_value": 3.0, "clip_norm": 5.0}, 3.0, None, 5.0),
        ({"clip_tensor_norm": 5.0}, None, 5.0, None),
        ({"clip_tensor_norm": 5.0, "clip_norm": 3.0}, None, 5.0, 3.0),
    ],
)
def test_clipping(
    tmp_path: Path, given: dict[str, float], value: float | None, tensor_norm: float | None, norm: float | None
) -> None:
    settings = Settings(**SMALL, **given)
    assert (settings.clip_value, settings.clip_tensor_norm, settings.clip_norm) == (value, tensor_norm, norm)
    assert Settings(**settings.model_dump()) == settings
    run = Run(Settings(**SMALL, clip_value=1e-3), tmp_path)
    next(run.train())
    largest = max(
        float(parameter.grad.abs().max()) for parameter in run.model.parameters() if parameter.grad is not None
    )
    assert largest == pytest.approx(1e-3)


def test_clipping_tensor_by_tensor(tmp_path: Path) -> None:
    plain, clipped = (
        Run(Settings(**SMALL, **given), tmp_path / name)
        for name, given in (("plain", {"clip_norm": 1e9}), ("clipped", {"clip_tensor_norm": 0.1}))
    )
    scaled = []
    for run in (plain, clipped):
        next(run.train())
    for before, after in zip(plain.model.parameters(), clipped.model.parameters(), strict=True):
        assert before.grad is not None and after.grad is not None
        norm = before.grad.norm()
        scaled.append(bool(norm > 0.1))
        torch.testing.assert_close(after.grad, before.grad * (0.1 / (norm + 1e-6)).clamp(max=1))
    assert any(scaled) and not all(scaled)


def test_options_of_models_and_optimisers() -> None:
    options = {"masked": "true", "mask_floor": "0.1", "controller": "gru", "num_write_heads": "2"}
    dnc = make_model(Settings(**SMALL, model_options=options, num_layers=2), tasks.Copy())
    assert isinstance(dnc, DNC) and dnc.num_layers == 2 and dnc.controller == "gru"
    assert dnc.masked is True and dnc.mask_floor == 0.1 and dnc.num_write_heads == 2 and dnc.deallocates is False
    assert make_model(Settings(**SMALL, model_options={"clip": "none"}), tasks.Copy()).clip is None
    ntm = make_model(Settings(**SMALL, model="ntm", heads="rrw", model_options={"max_shift": 2}), tasks.Copy())
    assert isinstance(ntm, NTM) and ntm.heads == "rrw" and ntm.max_shift == 2
    optimiser = make_optimiser(
        Settings(**SMALL, optimiser="rmsprop", optimiser_options={"alpha": "0.95", "centered": "true"}), dnc
    )
    group = optimiser.param_groups[0]
    assert (group["alpha"], group["centered"], group["momentum"], group["eps"]) == (0.95, True, 0.9, 1e-8)


def test_options_of_a_core() -> None:
    options = {"num_programs": "3", "core": "dnc", "num_write_heads": "2", "program_norm": "width", "norm": "outer"}
    nutm = make_model(Settings(**SMALL, model="nutm", model_options=options), tasks.Copy())
    assert isinstance(nutm, NUTM) and isinstance(nutm.core, DNC)
    assert nutm.core.num_write_heads == 2 and nutm.core.num_read_heads == 1 and nutm.core.norm == "outer"
    assert nutm.core.interface.config.num_programs == 3 and nutm.core.interface.config.norm == "width"
    of_an_ntm = make_model(Settings(**SMALL, model="nutm", heads="rrw"), tasks.Copy())
    assert isinstance(of_an_ntm, NUTM) and of_an_ntm.core.heads == "rrw"
    lrua = make_model(Settings(**SMALL, model="lrua", model_options={"decay": "0.9"}), tasks.Copy())
    assert isinstance(lrua, LRUA) and lrua.decay == 0.9
    for core, wrong, message in (
        ("ntm", {"masked": True}, "nutm: expected options among num_programs, key_size, core, .*, got masked"),
        ("dnc", {"max_shift": 2}, "nutm: expected options among .*, masked, .*, got max_shift"),
        ("gpu", {}, "core: expected one of ntm, dnc, lrua, got 'gpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            make_model(Settings(**SMALL, model="nutm", model_options={"core": core, **wrong}), tasks.Copy())


def scheduled(**settings: Any) -> Scheduled:
    torch.manual_seed(0)
    made = make_model(Settings(**{**SMALL, **settings}), tasks.TokenSequence())
    assert isinstance(made, Scheduled)
    return made


@pytest.mark.parametrize("options", [{}, {"model": "ntm"}, {"model": "lrua"}, {"model": "nutm"}], ids=str)
def test_a_schedule_covers_what_is_read(options: dict[str, Any]) -> None:
    model, task = scheduled(**options, write_schedule="uniform"), tasks.TokenSequence(length=14)
    input = task.sample(3).input
    read, state = model.net(input[:15], write_schedule=WriteSchedule("uniform"))
    answer, _ = model.net(input[15:], state)
    assert torch.equal(outputs(model, task, input), torch.cat([read, answer]))
    assert model.acts(30, 15).nonzero().flatten().tolist() == [2, 5, 8, 11, 14, *range(15, 30)]
    whole = model.net(input, write_schedule="uniform")[0]
    assert torch.equal(outputs(model, tasks.Copy(), input), whole)
    assert model.acts(30).sum() == model.acts(30, 30).sum() == 5
    interval = scheduled(**options, write_schedule="uniform", write_interval=7)
    assert interval.acts(30, 15).nonzero().flatten().tolist() == [6, 13, *range(15, 30)]


def test_a_random_schedule_is_drawn_once_by_the_seed_of_the_run() -> None:
    acts = [scheduled(write_schedule="random", seed=seed).acts(60, 40)[:40] for seed in (0, 1)]
    assert not torch.equal(*acts) and all(1 < chosen.sum() < 20 for chosen in acts)
    assert torch.equal(acts[1], WriteSchedule("random", seed=1).steps(40, 4))


@pytest.mark.parametrize("options", [{}, {"model": "nutm"}, {"model": "nutm", "model_options": {"core": "dnc"}}])
def test_cached_writing_covers_what_is_read(options: dict[str, Any]) -> None:
    model = scheduled(**options, write_schedule="cached", write_interval=3, attention_size=5)
    task = tasks.TokenSequence(length=14)
    input = task.sample(3).input
    assert isinstance(model.net, CachedUniformWriting) and len(model.net.score) == 5
    read, state = model.net(input[:15])
    assert torch.equal(outputs(model, task, input), torch.cat([read, model.net.net(input[15:], state)[0]]))
    assert model.acts(30, 15).nonzero().flatten().tolist() == [2, 5, 8, 11, 14, *range(15, 30)]
    assert torch.equal(outputs(model, tasks.Copy(), input), model.net(input)[0])


def test_programs_are_kept_apart(tmp_path: Path) -> None:
    gradients: dict[float, Any] = {}
    for diversity in (0.0, 0.1, 0.2):
        run = Run(Settings(**SMALL, model="nutm", diversity=diversity), tmp_path / str(diversity))
        entry = next(run.train())
        keys = run.model.core.interface.keys  # type: ignore[union-attr]
        gradients[diversity] = entry.loss, keys.grad
    assert gradients[0.0][0] == gradients[0.1][0] == gradients[0.2][0], "the loss is that of the task"
    first, second = (gradients[weight][1] - gradients[0.0][1] for weight in (0.1, 0.2))
    assert first.abs().max() > 0
    torch.testing.assert_close(2 * first, second, atol=1e-6, rtol=1e-3)


def test_what_a_network_draws_follows_the_seed(tmp_path: Path) -> None:
    runs = [Run(Settings(**SMALL, model="nutm", model_options=HARD), tmp_path / name) for name in "ab"]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    entries = [without_seconds(list(run.train())) for run in runs]
    assert entries[0] == entries[1] and equal(*runs)
    assert torch.equal(torch.get_rng_state(), before)
    found = [runs[0].evaluate() for _ in range(2)]
    assert found[0] == found[1] and runs[0].model.training, "the largest weight, which is not drawn"


def test_continual_learning(tmp_path: Path) -> None:
    changes = {"task": "continual", "task_options": {"max_length": 2, "sort_items": 3, "sort_outputs": 2}}
    settings = Settings(**{**SMALL, **changes, "iterations": 9, "evaluate_every": 100})
    assert settings.curriculum == "phases"
    run = Run(settings, tmp_path)
    entries = list(run.train())
    assert [entry.level for entry in entries] == [1, 1, 2, 2, 3, 3, 4, 4, 4]
    found = {entry.iteration: entry.accuracies for entry in entries if entry.accuracies}
    assert [*found] == [2, 4, 6, 8, 9]
    names = ["copy", "repeat-copy", "associative-recall", "priority-sort"]
    assert all(shares is not None and [*shares] == names for shares in found.values())
    assert isinstance(run.task, tasks.Continual)
    last = evaluate(run.model, run.task.tasks["copy"], 20, FRESH)
    assert found[9] is not None and found[9]["copy"] == last.accuracy
    assert entries[-1].evaluated == run.evaluate().errors != last.errors
    longer = Run.resumed(tmp_path, iterations=12)
    assert [entry.level for entry in longer.train()] == [4, 4, 4], "a phase stays as long as it was"


def test_few_shot_learning_by_presentation(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    options = {"classes": 3, "length": 15}
    run = Run(Settings(**{**SMALL, "task": "few-shot-digits", "task_options": options, "model": "lrua"}), tmp_path)
    entries = list(run.train())
    assert all((entry.accuracies is None) == (entry.evaluated is None) for entry in entries)
    assert entries[-1].accuracies is not None
    assert [*entries[-1].accuracies] == [f"presentation {number}" for number in (1, 2, 3, 5)]
    fresh = run.task.held_out().sample(20, torch.Generator().manual_seed(FRESH))
    assert isinstance(run.task, tasks.FewShot)
    shares = run.task.accuracy_by_presentation(run.model(fresh.input)[0], fresh)
    assert [*entries[-1].accuracies.values()] == pytest.approx([*shares.values()])


def test_options_survive_the_checkpoint(tmp_path: Path) -> None:
    settings = Settings(
        **SMALL, model_options={"sharpened": "true", "clip": 5.0}, optimiser="rmsprop", optimiser_options={"eps": 1e-4}
    )
    run = Run(settings, tmp_path)
    list(run.train())
    resumed = Run.resumed(tmp_path)
    assert resumed.settings == settings and equal(run, resumed)


@pytest.mark.parametrize("model", ["dnc", "ntm", "nutm", "lrua"])
@pytest.mark.parametrize("num_layers", [1, 3])
def test_an_lstm_of_the_same_size(tmp_path: Path, model: str, num_layers: int) -> None:
    options: dict[str, Any] = {"model_options": {"controller": "gru"}, "write_schedule": "random"}
    settings = Settings(**{**SMALL, "hidden_size": 40}, model=model, **options)
    wanted = count_parameters(settings)
    assert wanted == Run(settings, tmp_path).parameters
    lstm = matched_lstm(settings, num_layers)
    assert lstm.model == "lstm" and lstm.num_layers == num_layers and lstm.task == settings.task
    found = abs(count_parameters(lstm) - wanted)
    for width in (lstm.hidden_size - 1, lstm.hidden_size + 1):
        assert found <= abs(count_parameters(lstm.model_copy(update={"hidden_size": width})) - wanted)
    Run(lstm, tmp_path / "lstm")


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

    found = evaluate(Zeros(), task, 250, seed=0)
    assert 5.5 < found.errors < 6.5  # half of the twelve bits are ones
    assert found.accuracy == pytest.approx(1 - found.errors / 12) and found.accuracies == {}
    assert found == evaluate(Zeros(), task, 250, seed=0) != evaluate(Zeros(), task, 250, seed=1)


def test_log_is_one_json_object_a_line(tmp_path: Path) -> None:
    list(Run(Settings(**SMALL), tmp_path).train())
    lines = (tmp_path / LOG).read_text().splitlines()
    assert len(lines) == 12
    assert set(json.loads(lines[0])) == {*Entry._fields}


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_be_named(name: str) -> None:
    assert make_task(name, {}).sample(2).input.shape[1] == 2


def test_options_come_as_strings() -> None:
    assert make_task("copy", {"max_length": "7", "delimiters": "end"}) == tasks.Copy(max_length=7, delimiters="end")
    assert make_task("key-value", {"two_way": "true"}) == tasks.KeyValue(two_way=True)
    assert make_task("repeat-copy", {"count_range": "1,9"}) == tasks.RepeatCopy(count_range=(1, 9))
    assert make_task("token-sequence", {"rule": "max", "classes": "none"}) == tasks.TokenSequence("max")
    sequencing = {"subtasks": "copy,priority-sort", "order": "listed"}
    assert make_task("sequencing", sequencing) == tasks.Sequencing(("copy", "priority-sort"), "listed")


@pytest.mark.parametrize(
    ("options", "task"),
    [
        ({"task": "token-sequence", "task_options": {"length": 3}}, tasks.TokenSequence(length=3)),
        ({"task": "sinusoid", "task_options": {"steps_in": 3, "steps_out": 4}}, tasks.Sinusoid(3, 4)),
    ],
)
def test_a_task_judges_its_own_outputs(tmp_path: Path, options: dict[str, Any], task: tasks.Task) -> None:
    run = Run(Settings(**{**SMALL, **options}), tmp_path)
    batch = task.sample(4, torch.Generator().manual_seed(0))
    output = run.model(batch.input)[0].detach()
    entry = next(run.train())
    assert entry.loss == pytest.approx(float(task.loss(output, batch)))
    assert entry.bit_errors == pytest.approx(float(task.errors(output, batch)))
    assert entry.accuracy == pytest.approx(float(task.accuracy(output, batch)), abs=1e-6)
    assert Run.resumed(tmp_path).task == read_checkpoint(tmp_path).task == task


def test_evaluation_and_pictures_take_data_that_is_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    drawn, sample = [], tasks.FlattenedDigits.sample

    def recorded(task: tasks.FlattenedDigits, *arguments: Any) -> tasks.Batch:
        drawn.append(task.part)
        return sample(task, *arguments)

    monkeypatch.setattr(tasks.FlattenedDigits, "sample", recorded)
    run = Run(Settings(**{**SMALL, "task": "flattened-digits", "task_options": {}, "evaluate_every": 2}), tmp_path)
    for entry in run.train():
        if entry.evaluated is not None:
            break
    read_checkpoint(tmp_path).fresh(0, {})
    assert drawn == ["train", "train", "test", "test"]


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task: expected one of copy, .*, got 'cpoy'"):
        make_task("cpoy", {})
    with pytest.raises(ValueError, match=r"copy: expected options among bits, .*, delimiters, got maximum"):
        make_task("copy", {"maximum": 3})
    for options in ({"max_length": "many"}, {"max_length": 0}):
        with pytest.raises(ValidationError):
            make_task("copy", options)
    for name in ("learning_rate", "clip_norm", "clip_value", "advance_below", "solved_at"):
        for value in (float("inf"), float("nan")):
            with pytest.raises(ValidationError, match="finite number"):
                Settings(**SMALL, **{name: value})
    for name, option in (("copy", "bits"), ("token-sequence", "classes")):
        with pytest.raises(ValueError, match=f"{option}: expected at most 2147483647, got 2147483648"):
            make_task(name, {option: "2147483648"})
    for wrong in ({"model": "gpt"}, {"batch_size": 0}, {"learning_rate": -1.0}, {"colour": "red"}, {"seed": -1}):
        with pytest.raises(ValidationError):
            Settings(**{**SMALL, **wrong})
    unfit: list[tuple[dict[str, Any], str]] = [
        ({"model": "lstm", "write_schedule": "uniform"}, "write_schedule: expected dense, as an lstm has no memory"),
        ({"write_interval": 3}, "write_interval: expected none, as the write schedule is dense, got 3"),
        ({"write_schedule": "random", "write_interval": 3}, "as the write schedule is random, got 3"),
        (
            {"attention_size": 3, "write_schedule": "uniform"},
            "attention_size: expected 16, as only a cached write schedule uses it, got 3",
        ),
        ({"diversity": 0.5}, "diversity: expected 0.1, as only a nutm uses it, got 0.5"),
    ]
    for given, message in unfit:
        with pytest.raises(ValidationError, match=message):
            Settings(**{**SMALL, **given})
    with pytest.raises(ValueError, match="part: expected train, as what is held out is for evaluations, got test"):
        Run(Settings(task="flattened-digits", task_options={"part": "test"}), tmp_path)
    with pytest.raises(ValueError, match="one layer of a recurrent controller"):
        make_model(Settings(**SMALL, num_layers=2, write_schedule="cached"), tasks.Copy())
    with pytest.raises(ValueError, match="folder: expected one that holds a run"):
        Run.resumed(tmp_path / "nothing")
    Run(Settings(**SMALL), tmp_path / "run")
    with pytest.raises(ValueError, match="folder: expected a new one or --resume"):
        Run(Settings(**SMALL), tmp_path / "run")
