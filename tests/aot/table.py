"""The table of resources: which specialisations it holds, and how a row is made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from fastmem.kernels import (
    allocation,
    cached_attention,
    content_addressing,
    content_read,
    dnc_step,
    location_addressing,
    memory_write,
    ntm_step,
    program_lookup,
    program_mix,
    sharpen,
    temporal_linkage,
    usage_update,
    weighted_read,
)
from torch import Tensor

from fastmem.reference._interface import interface_size
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
    content_addressing.content_addressing_backward(*[weights, weights, *inputs, [True] * 4])


def read(
    banks: int, slots: int, word: int, heads: int, masks: bool, norm: str, dtype: torch.dtype = torch.float32
) -> None:
    inputs = *_lookup_inputs(banks, 4, slots, word, heads, masks, dtype), norm, 1e-6
    reads, logsumexp = content_read.content_read(*inputs)
    content_read.content_read_backward(*[reads, reads, logsumexp, *inputs, [True] * 4])


def programs(
    batch: int, inputs: int, outputs: int, count: int, dtype: torch.dtype = torch.float32, biases: bool = True
) -> None:
    keys, query, strength = meta(count, 20), meta(batch, 20), meta(batch)
    weights = meta(count, inputs, outputs, dtype=dtype)
    bias = meta(count, outputs, dtype=dtype) if biases else None
    values = meta(batch, inputs), query, strength, keys, weights, bias, "inner", 1e-6
    mixed, program_weights = program_lookup.program_lookup(*values)
    program_lookup.program_lookup_backward(mixed, program_weights, program_weights, *values, [True] * 6)


def mixing(batch: int, inputs: int, outputs: int, count: int, dtype: torch.dtype = torch.float32) -> None:
    weights, biases = meta(count, inputs, outputs, dtype=dtype), meta(count, outputs, dtype=dtype)
    values = meta(batch, inputs), meta(batch, count), weights, biases
    mixed = program_mix.program_mix(*values)
    program_mix.program_mix_backward(mixed, *values, [True] * 4)


def usage(slots: int, read_heads: int, write_heads: int, dtype: torch.dtype = torch.float32) -> None:
    vector, gates = meta(4, slots, dtype=dtype), meta(4, read_heads, dtype=dtype)
    write, read = meta(4, write_heads, slots, dtype=dtype), meta(4, read_heads, slots, dtype=dtype)
    inputs = vector, write, read, gates
    usage_update.usage_update(*inputs)
    usage_update.usage_update_backward(vector, vector, *inputs, [True] * 4)


def allocating(slots: int, heads: int, dtype: torch.dtype = torch.float32) -> None:
    vector, gates, weights = (meta(4, *shape, dtype=dtype) for shape in ((slots,), (heads,), (heads, slots)))
    allocation.allocation(vector, gates, 1e-6)
    allocation.allocation_backward(weights, weights, vector, gates, 1e-6, [True] * 2)


def write(slots: int, word: int, heads: int, retention: bool, dtype: torch.dtype = torch.float32) -> None:
    memory, words = meta(4, slots, word, dtype=dtype), meta(4, heads, word, dtype=dtype)
    kept = meta(4, slots, dtype=dtype) if retention else None
    inputs = memory, meta(4, heads, slots, dtype=dtype), words, words, kept
    memory_write.memory_write(*inputs)
    memory_write.memory_write_backward(memory, *inputs, [True] * 5)


def given_read(slots: int, word: int, heads: int, dtype: torch.dtype = torch.float32) -> None:
    inputs = meta(4, slots, word, dtype=dtype), meta(4, heads, slots, dtype=dtype)
    reads = weighted_read.weighted_read(*inputs)
    weighted_read.weighted_read_backward(reads, *inputs, [True] * 2)


def attention(length: int, width: int, hidden: int, masked: bool, dtype: torch.dtype = torch.float32) -> None:
    mask = meta(4, length, dtype=torch.bool) if masked else None
    keys, cache = meta(4, length, width, dtype=dtype), meta(4, length, hidden, dtype=dtype)
    inputs = meta(4, width, dtype=dtype), keys, cache, meta(width, dtype=dtype), mask
    attended, weights = cached_attention.cached_attention(*inputs)
    cached_attention.cached_attention_backward(attended, None, weights, *inputs, [True] * 4)
    cached_attention.cached_attention_backward(None, weights, weights, *inputs, [True] * 4)


def sharpening(slots: int, in_powers: bool, dtype: torch.dtype = torch.float32) -> None:
    inputs = meta(4, 4, slots, dtype=dtype), meta(4, 4, dtype=dtype), in_powers, 1e-6
    weights = sharpen.sharpen(*inputs)
    sharpen.sharpen_backward(weights, weights, *inputs, [True] * 2)


def location(slots: int, taps: int, in_powers: bool, dtype: torch.dtype = torch.float32) -> None:
    weighting, scalar = meta(4, 4, slots, dtype=dtype), meta(4, 4, dtype=dtype)
    inputs = weighting, weighting, scalar, meta(4, 4, taps, dtype=dtype), scalar, in_powers, in_powers, 1e-6
    weights = location_addressing.location_addressing(*inputs)
    location_addressing.location_addressing_backward(weights, weights, *inputs, [True] * 5)


def ntm(
    slots: int, word: int, heads: str, joint_writes: bool = False, in_powers: bool = False, norm: str = "inner",
    dtype: torch.dtype = torch.float32,
) -> None:  # fmt: skip
    size = len(heads) * (word + 6) + heads.count("w") * 2 * word
    old = meta(4, size, dtype=dtype), meta(4, slots, word, dtype=dtype), meta(4, len(heads), slots, dtype=dtype)
    options: Any = heads, joint_writes, in_powers, in_powers, 1e-6, 20.0, norm, 1e-6
    memory, weights, reads, tape = ntm_step.ntm_step(*old, *options)
    ntm_step.ntm_step_(*old, reads, *options)
    ntm_step.ntm_step_backward(*[memory, weights, reads, weights, tape, *old, *options, [True] * 3])


def step(slots: int, word: int, read_heads: int, write_heads: int, variants: bool, norm: str) -> None:
    state = (
        meta(4, slots, word), meta(4, slots), meta(4, write_heads, slots), meta(4, write_heads, slots, slots),
        meta(4, write_heads, slots), meta(4, read_heads, slots),
    )  # fmt: skip
    interface = meta(4, interface_size(word, read_heads, write_heads, variants, variants))
    inputs = interface, *state, variants, variants, variants, True, False, 0.0, 20.0, norm, 1e-6, 1e-6
    memory, usage, precedence, link, write, read, reads, tape = dnc_step.dnc_step(*inputs)
    upstream = memory, usage, precedence, link, write, read, reads
    arguments: list[Any] = [*upstream, memory, usage, write, read, tape, *inputs, [True] * 7]
    dnc_step.dnc_step_backward(*arguments)


CASES: dict[str, Callable[[], None]] = {
    "linkage N256 R4": lambda: linkage(256, 4),
    "linkage N65 R3": lambda: linkage(65, 3),
    "linkage N1000 R16": lambda: linkage(1000, 16),
    "addressing N256 W64": lambda: addressing(256, 64, 5, False, "inner"),
    "addressing N1000 W20 masks": lambda: addressing(1000, 20, 3, True, "inner"),
    "addressing N63 W33 outer": lambda: addressing(63, 33, 5, False, "outer"),
    "addressing N63 W33 masks width": lambda: addressing(63, 33, 5, True, "width"),
    "addressing N128 W128 masks": lambda: addressing(128, 128, 5, True, "clamp"),
    "read N256 W64": lambda: read(4, 256, 64, 5, False, "inner"),
    "read N1000000 W64 shared bfloat16": lambda: read(1, 1_000_000, 64, 4, False, "inner", torch.bfloat16),
    "read N1000 W20 shared masks": lambda: read(1, 1000, 20, 3, True, "rsqrt"),
    "programs B16 I128 O263 P4": lambda: programs(16, 128, 263, 4),
    "programs B256 I256 O471 P8 bfloat16": lambda: programs(256, 256, 471, 8, torch.bfloat16),
    "programs B3 I63 O32 P2 no biases": lambda: programs(3, 63, 32, 2, biases=False),
    "mix B16 I80 O66 P2": lambda: mixing(16, 80, 66, 2),
    "mix B256 I256 O471 P8 bfloat16": lambda: mixing(256, 256, 471, 8, torch.bfloat16),
    "usage N256 R4": lambda: usage(256, 4, 1),
    "usage N1000 R3 Q2 float64": lambda: usage(1000, 3, 2, torch.float64),
    "allocation N256": lambda: allocating(256, 1),
    "allocation N1000 Q2": lambda: allocating(1000, 2),
    "allocation N65 float64": lambda: allocating(65, 1, torch.float64),
    "write N256 W64": lambda: write(256, 64, 1, False),
    "write N65 W20 Q2 retention": lambda: write(65, 20, 2, True),
    "write N1000 W130 Q3 retention float64": lambda: write(1000, 130, 3, True, torch.float64),
    "weighted read N256 W64": lambda: given_read(256, 64, 4),
    "weighted read N1000 W20": lambda: given_read(1000, 20, 17),
    "weighted read N65 W130 float64": lambda: given_read(65, 130, 3, torch.float64),
    "sharpening N256": lambda: sharpening(256, False),
    "sharpening N65 in powers": lambda: sharpening(65, True),
    "sharpening N65 float64": lambda: sharpening(65, False, torch.float64),
    "location N256": lambda: location(256, 3, False),
    "location N65 reversed in powers": lambda: location(65, 5, True),
    "location N65 float64": lambda: location(65, 3, True, torch.float64),
    "ntm step N128 W20 rw": lambda: ntm(128, 20, "rw"),
    "ntm step N256 W64 rwrw": lambda: ntm(256, 64, "rwrw"),
    "ntm step N65 W130 rrww joint in powers": lambda: ntm(65, 130, "rrww", True, True, "outer"),
    "ntm step N65 W33 rw float64": lambda: ntm(65, 33, "rw", norm="clamp", dtype=torch.float64),
    "attention L5 A16 H95": lambda: attention(5, 16, 95, False),
    "attention L50 A64 H512": lambda: attention(50, 64, 512, False),
    "attention L63 A20 H257 mask": lambda: attention(63, 20, 257, True),
    "attention L10 A130 H256 float64": lambda: attention(10, 130, 256, False, torch.float64),
    "step N256 W64 R4": lambda: step(256, 64, 4, 1, False, "inner"),
    "step N65 W20 R3 Q2 variants": lambda: step(65, 20, 3, 2, True, "outer"),
    "step N128 W128 R4 variants": lambda: step(128, 128, 4, 1, True, "inner"),
    "step N16 W16 R1": lambda: step(16, 16, 1, 1, False, "inner"),
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
