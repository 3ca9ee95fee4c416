"""Paired measurements under pytest-benchmark."""

import time

import pytest

from bench import ops
from bench.timing import Contender, spread, threads


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


@pytest.fixture
def paired():
    """Times fastmem as the benchmark, and each rival just before it, in setup; the pairs go to `extra_info`."""

    def run(benchmark, contenders: dict[str, Contender], rounds: int = 30) -> None:
        ours = contenders.pop(ops.OURS)
        samples: dict[str, list[float]] = {name: [] for name in contenders}

        def setup() -> None:
            for name, rival in contenders.items():
                if rival.prepare is not None:
                    rival.prepare()
                start = time.perf_counter()
                rival.call()
                samples[name].append(time.perf_counter() - start)
            if ours.prepare is not None:
                ours.prepare()

        benchmark.pedantic(ours.call, setup=setup, rounds=rounds, warmup_rounds=3)
        mine = benchmark.stats.stats.data
        benchmark.extra_info["rivals"] = {
            name: {
                "seconds": spread(theirs[-rounds:]),
                "ratio": spread([a / b for a, b in zip(theirs[-rounds:], mine, strict=True)]),
            }
            for name, theirs in samples.items()
        }

    return run
