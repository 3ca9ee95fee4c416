"""What `make gpu` measures: errors and times of the ops on a CUDA device, into bench/results/gpu-<arch>.json.

Without a device it says so and succeeds; with --probe it looks for one only, before anything is built, and ends with
status 3 where there is none. Times are between CUDA events, contenders interleaved; every figure comes with the hashes
of the kernel sources that gave it.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    print("GPU benchmark skipped: torch finds no CUDA device here.")
    sys.exit(3 if "--probe" in sys.argv else 0)
if "--probe" in sys.argv:
    sys.exit(0)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # it runs as a script

from bench import floors, machine, ops, verify
from bench.cases import cases
from bench.timing import Contender, race, sample_cuda, spread, summarise

SOURCES = ("kernels/*.py",)


def hashes() -> dict[str, str]:
    paths = sorted(path for pattern in SOURCES for path in machine.ROOT.glob(pattern))
    return {str(path.relative_to(machine.ROOT)): hashlib.sha256(path.read_bytes()).hexdigest()[:16] for path in paths}


def driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def peak_mib(contender: Contender) -> float:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    contender.call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def measure(seconds: float = 1.0) -> list[dict[str, Any]]:
    rows = []
    for case in cases(full=True):
        inputs = tuple(tensor.cuda() for tensor in case.inputs("random"))
        for mode in ops.modes(case.op):
            racing = ops.contenders(case.op, mode, inputs, case.name if case.compiled else "")
            floor = Contender(floors.traffic(case.op, mode, inputs))
            samples = race({**racing, ops.FLOOR: floor}, seconds, sample=sample_cuda)
            least = samples.pop(ops.FLOOR)
            summary = summarise(samples, ops.OURS)
            for name, contender in racing.items():
                summary[name]["mib"] = peak_mib(contender)
            rows.append({
                "op": case.op, "case": case.name, "mode": mode, "traffic_ms": 1e3 * spread(least)["median"],
                "contenders": summary,
            })  # fmt: skip
            print(f"{case.op} {case.name} {mode}: {1e3 * summary[ops.OURS]['ms']['median']:.1f} us", flush=True)
    return rows


def main() -> int:
    major, minor = torch.cuda.get_device_capability()
    arch = f"sm_{major}{minor}"
    errors = list(verify.rows(["triton"], "cuda"))
    failed = [f"{row['op']} {row['case']}" for row in errors if row["ok"] is False]
    results = machine.describe()
    results["machine"] |= {"gpu": torch.cuda.get_device_name(), "arch": arch, "driver": driver()}
    results["versions"]["cuda"] = torch.version.cuda
    results |= {"sources": hashes(), "errors": errors, "rows": measure()}
    path = machine.ROOT / "bench" / "results" / f"gpu-{arch}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"Wrote {path}." + (f" Failed against float64: {', '.join(failed)}." if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
