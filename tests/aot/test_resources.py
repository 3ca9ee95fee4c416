"""Registers, stack and shared memory of the Triton kernels stay what the table says. `make aot` rewrites the table."""

import hashlib

import pytest

pytest.importorskip("triton")

import triton

from tests.aot import table

pytestmark = pytest.mark.aot


def test_resources_are_those_of_the_table() -> None:
    recorded, launches = table.load(), table.launches()
    rows = recorded["rows"]
    assert rows.keys() == launches.keys(), "the launches changed: run make aot and commit the table"
    assert not [name for name in rows if rows[name]["stack"]], "the table holds a row that spills"

    hashes = {name: table.source_hash(launch) for name, (launch, _) in launches.items()}
    changed = [name for name in rows if rows[name]["source"] != hashes[name]]
    # Three unchanged rows too: others after every change, the same ones until then.
    turn = hashlib.sha256("".join(hashes.values()).encode()).hexdigest()
    unchanged = sorted(set(rows) - set(changed), key=lambda name: hashlib.sha256((turn + name).encode()).digest())

    same_compiler = recorded["triton"] == triton.__version__
    if not same_compiler:
        print(f"the table is of triton {recorded['triton']}, this is {triton.__version__}: only spills are checked")
    for name in changed + unchanged[:3]:
        measured = table.resources(*launches[name])
        assert measured["stack"] == 0, f"{name} spills {measured['stack']} bytes"
        if same_compiler:
            expected = {field: rows[name][field] for field in measured}
            assert measured == expected, f"{name} changed: run make aot and commit the table"
