"""Low-precision banks and programs on a CPU, which the suite of the ops leaves to the reference."""

from bench import verify


def test_the_reference_serves_low_precision_within_the_rule() -> None:
    rows = [row for row in verify.rows(["reference"]) if "float16" in row["case"]]
    assert len(rows) == 4
    assert all(row["ok"] is True for row in rows), rows
