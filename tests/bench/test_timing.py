import os
import subprocess
import sys
import time

import pytest
import torch

from bench.timing import (
    MEMORY_ENVIRONMENT,
    Contender,
    can_measure_peak,
    race,
    sample_cpu,
    sample_wall,
    spread,
    summarise,
    threads,
)


def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_ratios_are_paired_and_prepare_is_not_timed():
    prepared = []

    def prepare():
        prepared.append(0)
        spin(2e-3)

    contenders = {
        "ours": Contender(lambda: spin(1e-3), prepare=prepare, calls=2),
        "theirs": Contender(lambda: spin(3e-3), calls=1),
    }
    with threads(1):
        samples = race(contenders, seconds=0, least_rounds=4)
    assert [len(values) for values in samples.values()] == [4, 4]
    assert len(prepared) == 4 + 3  # and the warm-up
    summary = summarise(samples, "ours")
    assert summary["ours"]["ratio"] == {"median": 1, "low": 1, "high": 1}
    assert 2 < summary["theirs"]["ratio"]["median"] < 4


def test_calls_fill_a_sample():
    contender = Contender(lambda: None)
    race({"fast": contender}, seconds=0, least_rounds=1)
    assert contender.calls == 64


def test_spread():
    assert spread([3.0, 1.0, 2.0]) == {"median": 2, "low": 1.5, "high": 2.5}
    assert spread([2.0]) == {"median": 2, "low": 2, "high": 2}


@pytest.mark.skipif(not can_measure_peak(), reason="needs /proc/self/clear_refs")
def test_peak_sees_temporaries():
    """In a process of its own, as the benchmark measures it."""
    code = (
        "import torch; from bench.timing import Contender, peak_bytes;"
        "print(peak_bytes(Contender(lambda: torch.ones(2**24).sum())))"  # 64 MiB, beyond what malloc keeps
    )
    environment = {**os.environ, **MEMORY_ENVIRONMENT}
    peak = int(subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=True).stdout)
    assert 60 * 2**20 < peak < 72 * 2**20


def test_contenders_that_set_their_threads_are_timed_by_the_wall():
    """The CPU time of two threads that share the work is that of one."""
    sleeping = Contender(lambda: time.sleep(5e-3), prepare=lambda: torch.set_num_threads(1), calls=1)
    with threads(2):
        assert sample_wall(sleeping) >= 5e-3
        torch.set_num_threads(1)
        assert sample_cpu(sleeping) < 5e-3
