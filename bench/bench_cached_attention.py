"""`pytest bench/bench_cached_attention.py`: the races of the main job under pytest-benchmark."""

import pytest

from bench import ops
from bench.cases import Case, cases

OP = "cached_attention"
RACES = [
    pytest.param(case, source, id=f"{case.name}, {source}") for case in cases(OP, full=True) for source in case.sources
]


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("mode", ops.modes(OP))
@pytest.mark.parametrize(("case", "source"), RACES)
def test_cached_attention(benchmark, paired, case: Case, source: str, mode: str, backend: str) -> None:
    paired(benchmark, ops.contenders(OP, mode, case.inputs(source), backend=backend))
