"""The measurement of schedules of writing and of stored programs, tiny."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from typer import Typer
from typer.testing import CliRunner

from bench import readme, variants
from bench.sequence_floor import MIB, Shape
from fastmem.nn import DNC, WriteSchedule

TINY = Shape(batch=2, steps=20, slots=5, word=4, heads=2, hidden=6)


def test_what_is_kept_by_hand():
    """Rows of an access and kept states for the writes; gates, cell and tops for every step."""
    net = variants.network(DNC, TINY)
    inputs = torch.randn(TINY.steps, TINY.batch, variants.INPUTS)
    row = TINY.interface + 5 * (1 + 1 + 1 + 2) + 5 * (1 + 1 + 2)  # interface, state, what the step records
    control, top = 4 * 6 + 6, 6 + 2 * 4
    state = sum(part.numel() for name, part in net.initial_state(1)._asdict().items() if name not in ("memory", "link"))
    for schedule, accesses in ((None, 20), (WriteSchedule("uniform", interval=5), 4)):
        found = variants.kept(net, inputs, partial(net, inputs, write_schedule=schedule))
        kept = (accesses - 1) // 8
        assert found["memory_mib"] * MIB == 4 * (2 * (accesses * row + kept * TINY.row) + TINY.row)  # and the first
        mask = 0 if schedule is None else 20 * 2
        assert found["rest_mib"] * MIB == 4 * 2 * (21 * top + 20 * control + state) + mask


def test_measures_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(variants, "SCHEDULED", TINY)
    monkeypatch.setattr(variants, "NETWORKS", {name: (kind, TINY) for name, (kind, _) in variants.NETWORKS.items()})
    app = Typer()
    app.command()(variants.main)
    result = CliRunner().invoke(app, ["--seconds", "0", "--results", str(tmp_path)])
    assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("variants-*.json")
    found = json.loads(path.read_text())
    assert [row["schedule"] for row in found["schedules"]][:2] == [variants.DENSE, variants.RESTING]
    assert {row["network"] for row in found["programs"]} == {"NTM", "DNC"}
    text = readme.variants_found(tmp_path)
    assert all(name in text for name in ("every 10th |", "every 10th, cached", "P = 4", "never"))
