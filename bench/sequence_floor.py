"""The least time that a step of a DNC can take within its sequence, by limits of this machine measured in the same run.

Operations are counted from the equations, the backward as twice the forward, at the rate of a large float32 matrix
product, which the small products of a DNC never reach. Bytes are what a step must read and write when one row of the
batch comes after another: its link and memory, its vectors, and the weights once for all rows. What is visited again
and again is charged at the rate of the cache that holds it: the state by the size of one row, the weights by their own.

forward = max(operations, bytes). Forward + backward is the smaller of two ways:
tape    = max(3 operations, 3 bytes, link and memory of every step written once to main memory and read back once)
no tape = 4 times the forward: the states are computed a second time instead.
"""

import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.floors import gemm_rate
from bench.timing import cpu_clock

FLOAT = 4  # bytes
MIB = 2**20
INPUTS = OUTPUTS = 16


@dataclass(frozen=True)
class Shape:
    batch: int
    steps: int
    slots: int
    word: int
    heads: int
    hidden: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.steps} N{self.slots} W{self.word} R{self.heads} H{self.hidden}"

    @property
    def interface(self) -> int:
        return self.word * (self.heads + 3) + 5 * self.heads + 3

    @property
    def weights(self) -> int:
        """Numbers in the weights of the LSTM, the interface and the output."""
        read = self.heads * self.word
        lstm = 4 * self.hidden * (INPUTS + read + self.hidden)
        return lstm + self.hidden * self.interface + (self.hidden + read) * OUTPUTS

    @property
    def row(self) -> int:
        """Numbers in the link and the memory of one row of the batch."""
        return self.slots * (self.slots + self.word)

    def flops(self) -> int:
        """Of one forward step."""
        link = self.slots**2 * (4 + 4 * self.heads)  # the update, and two products a head
        memory = self.slots * self.word * (2 * (self.heads + 3) + 5 + 2 * self.heads)  # lookups, norms; write; reads
        # Usage, precedence and mixing of the weights; the product and differences of allocation; a softmax a lookup.
        slots = self.slots * (7 * self.heads + 7 + 5 + 5 * (self.heads + 1))
        return self.batch * (2 * self.weights + link + memory + slots)

    def state_bytes(self) -> int:
        """Moved by one forward step for the rows: link, memory and weightings in and out, vectors of the controller."""
        weightings = (3 + self.heads) * self.slots  # usage, precedence, written, read
        vectors = 2 * self.hidden + self.interface + self.heads * self.word
        return FLOAT * self.batch * (2 * (self.row + weightings) + vectors)


@dataclass(frozen=True)
class Limits:
    flops: float  # a second
    l2: float  # bytes a second
    l3: float
    memory: float
    l2_bytes: int

    def rate(self, size: int) -> float:
        """Of what is visited again and again and takes so many bytes."""
        return self.l2 if size <= self.l2_bytes else self.l3


def floor(shape: Shape, limits: Limits) -> dict[str, float]:
    """Seconds a step."""
    weights = FLOAT * shape.weights
    flops = shape.flops() / limits.flops
    moved = shape.state_bytes() / limits.rate(FLOAT * shape.row) + weights / limits.rate(weights)
    forward = max(flops, moved)
    tape = max(3 * forward, 2 * FLOAT * shape.batch * shape.row / limits.memory)
    return {"forward": forward, "backward": min(tape, 4 * forward), "tape": tape, "no tape": 4 * forward}


def l2_bytes() -> int:
    """Of the cache of one core; 1 MiB where Linux does not tell."""
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if (index / "level").read_text().strip() == "2":
            size = re.fullmatch(r"(\d+)K", (index / "size").read_text().strip())
            return 2**10 * int(size.group(1)) if size else MIB
    return MIB


def streams(size: int) -> dict[str, float]:
    """Bytes a second of a = b + s c and of a = b over buffers of `size` bytes together."""
    found = {}
    clock = cpu_clock()
    for name, buffers in (("triad", 3), ("copy", 2)):
        a, b, *c = (torch.ones(size // (FLOAT * buffers)) for _ in range(buffers))
        calls = math.ceil(64 * MIB / size)
        seconds = []
        for _ in range(9):
            start = clock()
            for _ in range(calls):
                torch.add(b, *c, alpha=0.5, out=a) if c else a.copy_(b)
            seconds.append((clock() - start) / calls)
        found[name] = size / statistics.median(seconds[1:])
    return found


def measure() -> tuple[Limits, dict[str, Any]]:
    """The limits, and all that was measured for them; of each level the fastest stream counts."""
    cache = l2_bytes()
    sizes = {"l2": [cache * 3 // 8], "l3": [6 * MIB, 24 * MIB, 48 * MIB], "memory": [1024 * MIB]}
    measured = {level: {size: streams(size) for size in chosen} for level, chosen in sizes.items()}
    rates = {level: max(rate for found in of.values() for rate in found.values()) for level, of in measured.items()}
    limits = Limits(gemm_rate(), **rates, l2_bytes=cache)
    streamed = [
        {"level": level, "mib": size / MIB, **{f"{name}_gbs": rate / 1e9 for name, rate in found.items()}}
        for level, of in measured.items()
        for size, found in of.items()
    ]
    return limits, {"gemm_gflops": limits.flops / 1e9, "l2_mib": cache / MIB, "streams": streamed}
