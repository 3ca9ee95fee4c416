import json
import subprocess
import sys

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

import fastmem
from bench import floors, long, main, ops, readme, report, verify
from bench.cases import cases
from bench.machine import ROOT, describe
from bench.timing import threads
from fastmem import cli


def test_info_names_every_op_and_backend():
    result = CliRunner().invoke(cli.app, ["info"], terminal_width=200)
    assert result.exit_code == 0
    for op in fastmem.backends():
        assert op in result.stdout


def test_bench_outside_a_checkout(monkeypatch):
    monkeypatch.setattr(cli, "source_tree", lambda: None)
    result = CliRunner().invoke(cli.app, ["bench"])
    assert result.exit_code == 1
    assert "lives in the source tree" in result.stdout


@pytest.mark.parametrize("package", ["typer", "rich"])
def test_a_missing_package_is_one_sentence(package):
    code = f"import sys; sys.modules['{package}'] = None; from fastmem.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    expected = f"The command line needs {package}, which the extra cli brings: pip install {package}"
    assert done.stderr.strip() == expected


def test_verification_passes_a_right_op_and_fails_a_wrong_one(monkeypatch):
    oracle = verify.Oracle("temporal_linkage", {})
    assert oracle.check("reference")["of_allowed"] <= 1
    plain = torch.ops.fastmem.temporal_linkage

    def wrong(*arguments, backend):
        link, *others = plain(*arguments, backend=backend)
        return link * (1 + 1e-5), *others

    monkeypatch.setattr(torch.ops.fastmem, "temporal_linkage", wrong)
    assert oracle.check("reference")["of_allowed"] > 1
    special = torch.tensor([1.0, torch.nan]).double()
    assert verify._error(torch.tensor([torch.nan, torch.nan]), special) == torch.inf
    assert verify._error(torch.tensor([1.0, 1.0]), special) == torch.inf
    assert verify._error(torch.tensor([1.0, torch.nan]), special) == 0


def test_default_plan_compiles_one_case_an_op():
    for op in verify.OPS:
        assert [case.compiled for case in cases(op)].count(True) == 1
        assert any(case.op == op for case, *_ in main.plan(full=False))


@pytest.fixture(scope="module")
def results():
    """A results file in small: one race of each kind that is quick, and a made-up model."""
    case = next(case for case in cases("program_lookup") if case.shape["batch"] == 1)
    with threads(1):
        rows = [ops.measure(case, mode, "random", False, False, 0.0, 1e11) for mode in ops.modes(case.op)]
    spread = {"median": 1.0, "low": 0.9, "high": 1.1}
    contenders = {name: {"ms": spread, "ratio": spread, "rounds": 3, "mib": 1.0} for name in ("fastmem", "textbook")}
    return {
        **describe(),
        "settings": {"threads": 1, "full": False},
        "backends": {"program_lookup": [["cpp", True, "C++ kernel"]]},
        "verify": [{
            "op": "program_lookup", "backend": "cpp", "cases": 1, "not_served": 0, "value_error": 0.0,
            "gradient_error": 0.0, "of_allowed": 0.0, "failed": ["plain"],
        }],
        "limits": {"gemm_gflops": 100.0},
        "ops": {"rows": rows, "scaling": [
            {"op": case.op, "case": case.name, "mode": "forward", "threads": {"1 thread": contenders["fastmem"]}}
        ]},
        "long": {
            "shape": {"batch": 1, "num_slots": 2, "word_size": 3, "num_read_heads": 4},
            "contenders": {"dnc_step_": {"first_ms": spread, "ratio": 1.03, "subnormal_ratio": 1.2}},
        },
        "model": {
            "shape": {"batch": 1, "num_slots": 2, "word_size": 3, "num_read_heads": 4, "hidden_size": 5},
            "iterations": 3, "contenders": contenders, "losses": {"fastmem": [1.0, 0.5]},
            "final_loss": {"fastmem": 0.5, "textbook": 0.5},
        },
    }  # fmt: skip


def test_floor_is_below_the_measured_time(results):
    for row in results["ops"]["rows"]:
        assert 0 < row["floor_ms"] < row["contenders"]["fastmem"]["ms"]["median"]


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_flops_of_a_product(mode):
    inputs = next(iter(cases("program_lookup"))).inputs("random")
    assert floors.flops("program_lookup", mode, inputs) == 2 * 128 * 263 * 4 * (1 if mode == "forward" else 3)


def test_a_long_run_times_all_of_its_contenders(monkeypatch):
    monkeypatch.setattr(long, "WINDOW", 2)
    monkeypatch.setattr(long, "LATER", 4)
    entries = long.measure()["contenders"]
    assert entries.keys() == long.CONTENDERS.keys()
    assert all(entry["first_ms"]["median"] > 0 and entry["subnormal_ratio"] > 0 for entry in entries.values())


def test_report_needs_nothing_else(results, tmp_path):
    report.write(json.loads(json.dumps(results)), tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") >= 4
    assert "src=" not in page and "<link" not in page and "<script" not in page


def test_readme_section_comes_from_results(results, tmp_path):
    assert readme.figures(tmp_path) == "No results are committed yet."
    (tmp_path / "cpu-avx2.json").write_text(json.dumps(results))
    (tmp_path / "cpu-avx2-ops.json").write_text(json.dumps({"ops": results["ops"]}))
    section = readme.figures(tmp_path)
    assert section.count("| `program_lookup` |") == 2
    assert "1.00x" in section and "dnc_step_ 1.03x" in section


def test_readme_is_in_step():
    text = (ROOT / "README.md").read_text()
    assert readme.regenerated(text) == text, "run `make readme`"
