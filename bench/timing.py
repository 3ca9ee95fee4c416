"""Paired, interleaved timing, and peak resident memory.

All contenders run in one process, round after round (A B C, C B A, A B C, ...), so that whatever slows the machine
slows all of them; what is compared is the ratio within a round. With one thread the clock is the CPU time of the
process, because other programs on the same machine would otherwise be counted in; with several threads it is wall
time, because CPU time would hide that they work side by side.
"""

import ctypes
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmem import native

SAMPLE_SECONDS = 10e-3  # long against the clock and against the first call, which finds its data cold
MOST_CALLS = 64


@dataclass
class Contender:
    call: Callable[[], Any]
    prepare: Callable[[], Any] | None = None  # untimed, before every sample: restores what the call changes
    calls: int = 0  # calls per sample; chosen at warm-up when 0


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def flushed_subnormals(on: bool) -> Iterator[None]:
    torch.set_flush_denormal(on)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def settle_malloc() -> None:
    """Frees one large block, after which glibc keeps freed blocks of up to that size instead of returning them.

    A process that has freed a tensor of 31 MiB is in this state. In any other, temporaries of some MiB cost page faults
    each time. Races are run in the state that malloc is in by itself, and those of the largest temporaries in this one
    too, which is kinder to rivals.
    """
    torch.empty(31 * 2**18).fill_(0)


def cpu_clock() -> Callable[[], float]:
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def sample_cpu(contender: Contender) -> float:
    """Seconds per call, by the clock that the number of threads asks for."""
    return _sample(contender, cpu_clock())


def sample_wall(contender: Contender) -> float:
    """Seconds of wall time per call, for contenders that differ in the number of threads and set it in `prepare`."""
    return _sample(contender, time.perf_counter)


def _sample(contender: Contender, clock: Callable[[], float]) -> float:
    if contender.prepare is not None:
        contender.prepare()
    start = clock()
    for _ in range(contender.calls):
        contender.call()
    return (clock() - start) / contender.calls


def sample_cuda(contender: Contender) -> float:
    """Seconds per call between two events on the stream, so that the calls queue up as they do in a model."""
    if contender.prepare is not None:
        contender.prepare()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(contender.calls):
        contender.call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / contender.calls


def _warm_up(contender: Contender, sample: Callable[[Contender], float]) -> None:
    calls = contender.calls
    contender.calls = 1
    for _ in range(3):
        seconds = sample(contender)
    contender.calls = calls or max(1, min(MOST_CALLS, round(SAMPLE_SECONDS / max(seconds, 1e-7))))


def race(
    contenders: dict[str, Contender],
    seconds: float = 2.0,
    least_rounds: int = 5,
    most_rounds: int = 200,
    sample: Callable[[Contender], float] = sample_cpu,
) -> dict[str, list[float]]:
    """Seconds per call of each contender, one entry a round. The budget counts wall time and comes after warm-up."""
    for contender in contenders.values():
        _warm_up(contender, sample)
    samples: dict[str, list[float]] = {name: [] for name in contenders}
    order = list(contenders)
    collecting = gc.isenabled()
    gc.disable()
    try:
        end = time.perf_counter() + seconds
        for done in range(most_rounds):
            if done >= least_rounds and time.perf_counter() > end:
                break
            for name in order if done % 2 == 0 else reversed(order):
                samples[name].append(sample(contenders[name]))
    finally:
        if collecting:
            gc.enable()
    return samples


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "low": low, "high": high}


def summarise(samples: dict[str, list[float]], ours: str) -> dict[str, dict[str, Any]]:
    """Milliseconds of each contender and its paired ratio to `ours`: how many times the time of `ours` it takes."""
    return {
        name: {
            "ms": spread([1e3 * value for value in values]),
            "ratio": spread([theirs / mine for theirs, mine in zip(values, samples[ours], strict=True)]),
            "rounds": len(values),
        }
        for name, values in samples.items()
    }


def _resident(field: str) -> int:
    with open("/proc/self/status") as status:
        match = re.search(rf"{field}:\s+(\d+) kB", status.read())
    return int(match.group(1)) * 1024 if match else 0


# Freed blocks of this size go back to the system at once, so that a peak cannot hide in memory kept by malloc.
MEMORY_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def can_measure_peak() -> bool:
    return os.access("/proc/self/clear_refs", os.W_OK)


def return_freed_memory() -> None:
    """Gives the system all that is free, for a process that was timed without MEMORY_ENVIRONMENT. glibc only.

    What malloc will hand out of its heap has to come from the system then, and counts in a peak. From here on large
    blocks bypass the heap.
    """
    libc = ctypes.CDLL(None)
    trim_threshold, mmap_threshold = -1, -3
    for parameter in (trim_threshold, mmap_threshold):
        libc.mallopt(parameter, 65536)
    libc.malloc_trim(0)


def saved(run: Callable[[], Iterable[Tensor]], given: Iterable[Tensor]) -> list[tuple[int, torch.Size]]:
    """Bytes and shape of all that the graph of `run` keeps for its backward, but for what is given or returned."""
    found: dict[int, tuple[int, torch.Size]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = (storage.nbytes(), tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        results = run()
    for tensor in (*given, *results):
        found.pop(tensor.untyped_storage().data_ptr(), None)
    return [*found.values()]


def peak_bytes(contender: Contender) -> int:
    """Resident peak of one warm call minus what was resident before it. Linux only; see MEMORY_ENVIRONMENT."""
    sample_cpu(Contender(contender.call, contender.prepare, calls=1))
    gc.collect()
    native.empty_cache()
    if contender.prepare is not None:
        contender.prepare()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # resets the resident peak of this process
    before = _resident("VmRSS")
    contender.call()
    return max(0, _resident("VmHWM") - before)
