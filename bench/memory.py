"""Peak memory of every contender, as JSON lines. Runs as a process of its own (`python -m bench.memory ops`).

Its malloc returns freed blocks to the system (timing.MEMORY_ENVIRONMENT), so that no peak hides in memory kept from an
earlier call. torch.compile is left out: it would compile everything a second time.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import torch

from bench import model, ops
from bench.cases import cases
from bench.machine import ROOT
from bench.timing import MEMORY_ENVIRONMENT, can_measure_peak, peak_bytes

MIB = 2**20


def count(full: bool) -> int:
    """The number of rows that of_ops gives."""
    return sum(1 + len(ops.rivals(case.op, mode)) for case in cases(full=full) for mode in ops.modes(case.op))


def of_ops(full: bool) -> Iterator[dict[str, Any]]:
    for case in cases(full=full):
        inputs = case.inputs("random")
        for mode in ops.modes(case.op):
            for name, contender in ops.contenders(case.op, mode, inputs).items():
                peak = peak_bytes(contender) / MIB
                yield {"op": case.op, "case": case.name, "mode": mode, "contender": name, "mib": peak}


def of_model() -> Iterator[dict[str, Any]]:
    for name, contender in model.memory_contenders().items():
        yield {"contender": name, "mib": peak_bytes(contender) / MIB}


def rows(part: str) -> Iterator[dict[str, Any]]:
    """The rows of a part (ops, full or model), measured in a subprocess; none where the system cannot tell peaks."""
    if not can_measure_peak():
        return
    environment = {**os.environ, **MEMORY_ENVIRONMENT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.memory", part]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            yield json.loads(line)
    if process.returncode:
        raise RuntimeError(f"the memory probe ended with status {process.returncode}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in of_model() if sys.argv[1] == "model" else of_ops(full=sys.argv[1] == "full"):
        print(json.dumps(row), flush=True)
