"""The table of resources: which specialisations it holds, and how a row is made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from fastmem.kernels import (
    content_addressing,
    content_read,
    location_addressing,
    program_lookup,
    sharpen,
    temporal_linkage,
)
from torch import Tensor

from tests.aot.launches import Launch, launches_of, resources, source_hash

FILE = Path(__file__).with_name("resources.json")
CAPABILITIES = (80, 90, 100)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def linkage(slots: int, read_heads: int) -> None:
    link, vector, weights = meta(4, 1, slots, slots), meta(4, 1, slots), meta(4, read_heads, slots)
    reads = meta(4, 1, read_heads, slots)
    inputs = link, vector, vector, weights
    temporal_linkage.temporal_linkage(*inputs)
    temporal_linkage.temporal_linkage_backward(link, vector, reads, reads, *inputs, [True] * 4)
    temporal_linkage.temporal_linkage_backward(None, None, reads, reads, *inputs, [True] * 4)


def _lookup_inputs(
    banks: int, batch: int, slots: int, word: int, heads: int, masks: bool, dtype: torch.dtype
) -> tuple[Any, ...]:
    keys = meta(batch, heads, word)
    key_mask, slot_mask = (meta(batch, heads, word), meta(batch, slots, dtype=torch.bool)) if masks else (None, None)
    return meta(banks, slots, word, dtype=dtype), keys, meta(batch, heads), key_mask, slot_mask


def addressing(slots: int, word: int, heads: int, masks: bool, norm: str) -> None:
    inputs = *_lookup_inputs(4, 4, slots, word, heads, masks, torch.float32), norm, 1e-6
    weights = content_addressing.content_addressing(*inputs)
    content_addressing.content_addressing_backward(weights, weights, *inputs, [True] * 4)


def read(
    banks: int, slots: int, word: int, heads: int, masks: bool, norm: str, dtype: torch.dtype = torch.float32
) -> None:
    inputs = *_lookup_inputs(banks, 4, slots, word, heads, masks, dtype), norm, 1e-6
    reads, logsumexp = content_read.content_read(*inputs)
    content_read.content_read_backward(reads, reads, logsumexp, *inputs, [True] * 4)


def programs(
    batch: int, inputs: int, outputs: int, count: int, dtype: torch.dtype = torch.float32, biases: bool = True
) -> None:
    keys, query, strength = meta(count, 20), meta(batch, 20), meta(batch)
    weights = meta(count, inputs, outputs, dtype=dtype)
    bias = meta(count, outputs, dtype=dtype) if biases else None
    values = meta(batch, inputs), query, strength, keys, weights, bias, "inner", 1e-6
    mixed, program_weights = program_lookup.program_lookup(*values)
    program_lookup.program_lookup_backward(mixed, None, program_weights, *values, [True] * 6)


def sharpening(slots: int, in_powers: bool, dtype: torch.dtype = torch.float32) -> None:
    inputs = meta(4, 4, slots, dtype=dtype), meta(4, 4, dtype=dtype), in_powers, 1e-6
    weights = sharpen.sharpen(*inputs)
    sharpen.sharpen_backward(weights, weights, *inputs, [True] * 2)


def location(slots: int, taps: int, in_powers: bool, dtype: torch.dtype = torch.float32) -> None:
    weighting, scalar = meta(4, 4, slots, dtype=dtype), meta(4, 4, dtype=dtype)
    inputs = weighting, weighting, scalar, meta(4, 4, taps, dtype=dtype), scalar, in_powers, in_powers, 1e-6
    weights = location_addressing.location_addressing(*inputs)
    location_addressing.location_addressing_backward(weights, weights, *inputs, [True] * 5)


CASES: dict[str, Callable[[], None]] = {
    "linkage N256 R4": lambda: linkage(256, 4),
    "linkage N65 R3": lambda: linkage(65, 3),
    "linkage N1000 R16": lambda: linkage(1000, 16),
    "addressing N256 W64": lambda: addressing(256, 64, 5, False, "inner"),
    "addressing N1000 W20 masks": lambda: addressing(1000, 20, 3, True, "inner"),
    "addressing N63 W33 outer": lambda: addressing(63, 33, 5, False, "outer"),
    "addressing N128 W128 masks": lambda: addressing(128, 128, 5, True, "clamp"),
    "read N256 W64": lambda: read(4, 256, 64, 5, False, "inner"),
    "read N1000000 W64 shared bfloat16": lambda: read(1, 1_000_000, 64, 4, False, "inner", torch.bfloat16),
    "read N1000 W20 shared masks": lambda: read(1, 1000, 20, 3, True, "rsqrt"),
    "programs B16 I128 O263 P4": lambda: programs(16, 128, 263, 4),
    "programs B256 I256 O471 P8 bfloat16": lambda: programs(256, 256, 471, 8, torch.bfloat16),
    "programs B3 I63 O32 P2 no biases": lambda: programs(3, 63, 32, 2, biases=False),
    "sharpening N256": lambda: sharpening(256, False),
    "sharpening N65 in powers": lambda: sharpening(65, True),
    "sharpening N65 float64": lambda: sharpening(65, False, torch.float64),
    "location N256": lambda: location(256, 3, False),
    "location N65 reversed in powers": lambda: location(65, 5, True),
    "location N65 float64": lambda: location(65, 3, True, torch.float64),
}


def launches() -> dict[str, tuple[Launch, int]]:
    """Row name -> specialisation and compute capability. The first case that makes a specialisation names it."""
    rows: dict[str, tuple[Launch, int]] = {}
    seen: set[str] = set()
    for case, call in CASES.items():
        for i, launch in enumerate(launches_of(call)):
            if launch.description() not in seen:
                seen.add(launch.description())
                for capability in CAPABILITIES:
                    rows[f"{launch.kernel.__name__} | {case} | {i} | sm_{capability}"] = launch, capability
    return rows


def row(launch: Launch, capability: int) -> dict[str, Any]:
    return {"source": source_hash(launch), **resources(launch, capability)}


def load() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def save(rows: dict[str, dict[str, Any]]) -> None:
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows[name])}" for name in rows)
    FILE.write_text(f'{{"triton": "{triton.__version__}", "rows": {{\n{lines}\n}}}}\n')
