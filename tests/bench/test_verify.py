import torch

from bench import verify
from fastmem.reference import program_lookup as reference


def test_the_reference_serves_low_precision_within_the_rule() -> None:
    """Low-precision banks and programs on a CPU, which the suite of the ops leaves to the reference."""
    rows = [row for row in verify.rows(["reference"]) if "float16" in row["case"]]
    assert len(rows) == 6
    assert all(row["ok"] is True for row in rows), rows


def test_the_plain_formula_and_a_backend_compute_the_same_draws(monkeypatch) -> None:
    """Draws of the plain formula alone would let its bad luck excuse a backend."""
    plain: set[tuple[float, ...]] = set()
    backend: set[tuple[float, ...]] = set()
    formula = reference.program_lookup

    def recorded(seen):
        def function(inputs, *rest, **_):
            if inputs.dtype == torch.float32:
                seen.add(tuple(inputs.flatten().tolist()))
            return formula(inputs, *rest)

        return function

    monkeypatch.setattr(reference, "program_lookup", recorded(plain))
    oracle = verify.Oracle("program_lookup", {})
    monkeypatch.setattr(torch.ops.fastmem, "program_lookup", recorded(backend))
    assert oracle.check("cpp")["of_allowed"] <= 1
    assert len(plain) == verify.DRAWS
    assert plain == backend
