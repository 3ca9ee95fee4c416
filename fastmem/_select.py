"""Which backend serves a call, and why. Pure functions of the arguments, the installation and the caller's wish."""

import importlib.util
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from fastmem import _env, _native
from fastmem._errors import BackendUnavailable

BACKENDS = ("cpp", "triton", "reference")
_PREFERENCE = {"cpu": ("cpp", "reference"), "cuda": ("triton", "reference")}
_forced: str | None = None


class Choice(NamedTuple):
    """The backend of a call and the reason it was chosen."""

    backend: str
    reason: str


_FIRST_CHOICE = {
    "cpp": Choice("cpp", "first choice on the CPU"),
    "triton": Choice("triton", "first choice on CUDA devices"),
    "reference": Choice("reference", "plain PyTorch, for devices without a kernel of ours"),
}


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Makes every op inside use one backend: "cpp", "triton" or "reference". Holds for the whole process."""
    global _forced
    previous, _forced = _forced, _known(backend)
    try:
        yield
    finally:
        _forced = previous


def requested(backend: str | None) -> str | None:
    """The backend asked for: by argument, else by `use_backend`, else by FASTMEM_BACKEND."""
    return _known(backend) if backend is not None else _forced or _env.backend()


def _known(backend: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend


@cache
def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def cpp_refusal(state: Tensor, bank: Tensor | None = None) -> str | None:
    """Why the C++ kernels cannot serve these tensors; None where they can. `bank` may have a dtype of its own."""
    if state.device.type != "cpu":
        return f"the C++ kernels serve CPU tensors, got {state.device.type}"
    for tensor in (state, bank):
        if tensor is not None and tensor.dtype not in (torch.float32, torch.float64):
            return f"the C++ kernels serve float32 and float64, got {tensor.dtype}"
    return None if _native.module else str(_native.failure)


def cpp_has(op: str) -> bool:
    """Whether the C++ extension, if there is one, has an op."""
    return _native.module is None or hasattr(torch.ops.fastmem_cpu, op)


def triton_refusal(state: Tensor, float64: bool = False) -> str | None:
    """Why the Triton kernels cannot serve these tensors; None where they can. `float64`: they compute in it too."""
    if not triton_installed():
        return "triton is not installed"
    if state.dtype == torch.float64 and not float64:
        return "the Triton kernels accumulate in float32, got float64"
    if state.device.type != "cuda" and not interpreting():
        return f"the Triton kernels serve CUDA tensors (CPU ones under TRITON_INTERPRET=1), got {state.device.type}"
    return None


def choose(op: str, state: Tensor, refusals: dict[str, str | None], backend: str | None) -> Choice:
    """The backend asked for, or the first of the device's preference that does not refuse."""
    backend = requested(backend)
    if backend is not None:
        if refusals.get(backend):
            raise BackendUnavailable(f"{op}: backend {backend!r} was asked for and cannot serve: {refusals[backend]}")
        return Choice(backend, "asked for")
    passed_over: list[str] = []
    for candidate in _PREFERENCE.get(state.device.type, ("reference",)):
        refusal = refusals.get(candidate)
        if refusal is None:
            return Choice(candidate, "; ".join(passed_over)) if passed_over else _FIRST_CHOICE[candidate]
        if candidate == "cpp" and _native.module is None:
            _warn_once(refusal)
        passed_over.append(refusal)
    raise BackendUnavailable(f"{op}: {'; '.join(passed_over)}")


def availability() -> list[tuple[str, bool, str]]:
    """Each backend, whether this machine can run it, and why or why not."""
    if _native.module:
        cpp = (True, f"CPU tensors, float32 and float64, {_native.module.isa()}")
    else:
        cpp = (False, str(_native.failure))
    if not triton_installed():
        triton = (False, "triton is not installed")
    elif torch.cuda.is_available():
        triton = (True, f"CUDA tensors, {torch.cuda.get_device_name()}")
    elif interpreting():
        triton = (True, "CPU tensors by Triton's interpreter, when asked for")
    else:
        triton = (False, "no CUDA device (TRITON_INTERPRET=1 runs the kernels on the CPU, slowly)")
    return [("cpp", *cpp), ("triton", *triton), ("reference", True, "plain PyTorch, any device and float dtype")]


@cache
def _warn_once(reason: str) -> None:
    warnings.warn(f"fastmem runs its slow PyTorch reference on the CPU: {reason}", RuntimeWarning, stacklevel=2)
