"""What a results file says about where its figures come from."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import fastmem

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "numpy", "dnc", "jax")


def processor() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def isa() -> str:
    """The widest instruction set that the C++ kernels use here, else the one PyTorch names."""
    built = fastmem.native.build_info()
    return built["instruction set"] if built else torch.backends.cpu.get_cpu_capability().lower()


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def commit() -> dict[str, Any]:
    """The commit measured, and whether sources differ from it (results and documents do not count)."""
    changed = _git("status", "--porcelain", "--", "csrc", "kernels", "fastmem", "bench/*.py", "bench/peers")
    return {"commit": _git("rev-parse", "HEAD"), "changed": None if changed is None else bool(changed)}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    return {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "architecture": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "instruction set": isa(),
        },
        "versions": {
            "fastmem": fastmem.__version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in PACKAGES},
            "extension": fastmem.native.build_info(),
        },
        **commit(),
        "load": os.getloadavg()[0],  # of the minute before: above 1 the figures were taken on a busy machine
        "malloc": {name: value for name, value in os.environ.items() if name.startswith("MALLOC_")},
    }
