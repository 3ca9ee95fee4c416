"""The race of whole sequences: its floor, its peers and the processes in which they run."""

import json
import math
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("typer")

from typer import Typer
from typer.testing import CliRunner

from bench import contender, readme, sequence_floor, sequences
from bench.sequence_floor import MIB, Limits, Shape
from bench.timing import can_measure_peak

TINY = Shape(batch=2, steps=3, slots=5, word=4, heads=2, hidden=6)


def test_numbers_of_a_shape_by_hand():
    assert TINY.interface == 2 * 4 + 2 + 4 + 1 + 4 + 4 + 2 + 1 + 1 + 3 * 2
    assert TINY.weights == 24 * (16 + 8 + 6) + 6 * 33 + (6 + 8) * 16
    link, memory = 25 * (4 + 8), 20 * (3 * 2 + 2 * 2 + 5 + 2 * 2)  # 3 lookups, 2 norms, the write, 2 reads
    slots = 5 * (21 + 5 + 15)
    assert TINY.flops() == 2 * (2 * TINY.weights + link + memory + slots)
    assert TINY.state_bytes() == 4 * 2 * (2 * (25 + 20 + 5 * 5) + 12 + 33 + 8)


def test_floor_by_hand():
    """The largest of the race, whose weights lie beyond the second cache: 2615 KiB of them, 9347 KiB of the rest."""
    shape = Shape(batch=4, steps=32, slots=512, word=64, heads=4, hidden=256)
    slow = Limits(flops=1e8, l2=6e10, l3=2.4e10, memory=1.1e10, l2_bytes=2 * MIB)
    assert sequence_floor.floor(shape, slow)["forward"] == shape.flops() / 1e8
    limits = Limits(flops=1e15, l2=6e10, l3=2.4e10, memory=1.1e10, l2_bytes=2 * MIB)
    floor = sequence_floor.floor(shape, limits)
    assert floor["forward"] == pytest.approx(9347.36 * 1024 / 6e10 + 2615 * 1024 / 2.4e10)
    assert floor["tape"] == pytest.approx(2 * 4 * 4 * 512 * (512 + 64) / 1.1e10)
    assert floor["no tape"] == 4 * floor["forward"]
    assert floor["backward"] == min(floor["tape"], floor["no tape"])


def test_limits_are_those_of_a_machine():
    cache = sequence_floor.l2_bytes()
    assert 2**16 <= cache <= 2**30
    assert all(rate > 1e8 for rate in sequence_floor.streams(cache // 4).values())


@pytest.mark.parametrize("name", [contender.OURS, *contender.RIVALS])
def test_who_races_computes_the_same(name, monkeypatch):
    if name not in (contender.OURS, *contender.rivals()):
        pytest.skip(f"{contender.NEEDS[name]} is not installed")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # one graph, without the minute
    output, gradients = contender.Network(name, TINY).values()
    assert output.shape == (3, 2, 16) and all(np.isfinite(gradient).all() for gradient in gradients.values())
    if name == contender.PYPI:
        return  # other parameters
    right, right_gradients = contender.Network(contender.TEXTBOOK, TINY).values()
    assert abs(output - right).max() <= sequences.AGREEMENT
    assert gradients.keys() == right_gradients.keys()
    for key, gradient in gradients.items():
        assert abs(gradient - right_gradients[key]).max() <= sequences.AGREEMENT * abs(right_gradients[key]).max(), key


def test_jax_in_float64_with_full_memories():
    """Longer than its memory has slots, so that allocation sorts what was used."""
    jax = pytest.importorskip("jax")
    from bench.peers.dnc_jax import JaxDNC

    ours = contender.build(contender.OURS, Shape(2, 12, 5, 4, 2, 6))
    ours.network.double()
    ours.inputs = ours.inputs.double()
    right, right_gradients = ours.forward(), ours.gradients()
    with jax.enable_x64(True):
        for checkpoint in (False, True):
            theirs = JaxDNC(ours.network, ours.inputs, checkpoint)
            assert abs(np.asarray(theirs.forward()) - right.numpy()).max() <= 1e-12
            for name, gradient in theirs.gradients().items():
                assert abs(np.asarray(gradient) - right_gradients[name].numpy()).max() <= 1e-12


@pytest.mark.parametrize("entry", [(2e-5, 0.0), (0.0, 2e-5), (math.nan, 0.0), (0.0, math.nan)])
def test_a_difference_is_named(entry):
    found = {"near": {"output": 0.0, "gradient": 9e-6}, "far": dict(zip(("output", "gradient"), entry, strict=True))}
    assert sequences.differing(found) == ["far"]


def test_children_answer():
    names = (contender.OURS, contender.TEXTBOOK)
    with sequences.pinned(), contender.children({name: (name, TINY) for name in names}) as started:
        assert set(sequences.agreement(started)) == {contender.OURS}
        found = sequences.race(started, "backward", seconds=0.0)
        peak = started[contender.TEXTBOOK].ask("peak")
        kept, states = started[contender.TEXTBOOK].ask("kept")
    assert found.keys() == {"fastmem", "textbook", "textbook, flushed"}
    assert all(entry["ms"]["median"] > 0 and entry["rounds"] >= sequences.ROUNDS for entry in found.values())
    assert sequences.fastest(found) in found.keys() - {"fastmem"} and sequences.fastest(found, "eager") is None
    assert kept > states >= 3 * 2 * (25 + 20) * 4  # each step keeps its link and memory
    assert (peak is not None) == can_measure_peak()


def test_a_child_that_fails_is_named():
    failed = pytest.raises(RuntimeError, match="the process of fastmem ended with status 1")
    with contender.children({0: (contender.OURS, TINY)}) as started, failed:
        started[0].ask("no such method")


def test_threads_give_a_row_for_each_large_batch():
    rows = sequences.two_threads({"small": TINY, "large": Shape(8, 3, 5, 4, 2, 6)}, seconds=0.0)
    assert [(row["shape"], row["mode"]) for row in rows] == [("large", "forward"), ("large", "backward")]
    assert torch.get_num_threads() >= 1


@pytest.fixture
def small(monkeypatch):
    """The whole run in small, of two contenders, without the limits of the machine."""
    limits = Limits(flops=1e11, l2=1e11, l3=1e10, memory=1e10, l2_bytes=MIB)
    monkeypatch.setattr(sequences, "SHAPES", {"tiny": Shape(8, 3, 5, 4, 2, 6)})
    monkeypatch.setattr(sequences, "LONG", TINY)
    monkeypatch.setattr(sequences, "LENGTHS", (3, 9))
    monkeypatch.setattr(sequences, "compile_all", lambda shapes: {})
    monkeypatch.setattr(sequences.contender, "rivals", lambda: [contender.TEXTBOOK])
    monkeypatch.setattr(sequence_floor, "measure", lambda: (limits, {}))


def test_the_section_of_the_readme_comes_from_a_run(small, tmp_path):
    assert readme.peers(tmp_path) == "No results are committed yet."
    app = Typer()
    app.command()(sequences.main)
    for more in ([], ["--only", "race"]):
        done = CliRunner().invoke(app, ["--seconds", "0", "--results", str(tmp_path), *more], catch_exceptions=False)
        assert done.exit_code == 0 and "does not race" in done.stdout
    whole, part = sorted(tmp_path.glob("peers-*.json"), key=lambda path: len(path.name))
    assert part.name.endswith("-race.json") and "length" not in json.loads(part.read_text())
    section = readme.peers(tmp_path)
    assert section.count("| tiny | ") == 2 and "tiny is B8 T3 N5 W4 R2 H6" in section
    assert "ms a step at T 9" in section and "tiny forward + backward" in section
    assert {row["steps"] for row in json.loads(whole.read_text())["length"]} == {3, 9}
