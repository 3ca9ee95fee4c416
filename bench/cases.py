"""The shapes that are raced, one list for the main job and for pytest-benchmark.

`shape` holds keyword arguments of tests/cases/<op>.make. "recorded" inputs are the states of a trained DNC and
"allocated" ones those of the same run with its allocation gate at 1, so that the link is full of subnormal numbers
(bench/recorded.py); "random" ones come from make. Where a case is not `recorded`, only random inputs are raced.
"""

import importlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bench import recorded


@dataclass(frozen=True)
class Case:
    op: str
    shape: dict[str, Any]
    recorded: bool = True
    compiled: bool = False  # torch.compile takes long: raced in the main job's default run too
    full: bool = False  # only with --full

    @property
    def name(self) -> str:
        sizes = [
            value if isinstance(value, str) else f"{LETTERS[key]}{value}"
            for key, value in self.shape.items()
            if key in LETTERS
        ]
        return " ".join([*sizes, "shared"] if self.shape.get("shared") else sizes)

    @property
    def sources(self) -> tuple[str, ...]:
        if not self.recorded:
            return ("random",)
        return ("recorded", "allocated", "random") if self.op == "temporal_linkage" else ("recorded", "random")

    def inputs(self, source: str) -> tuple[Tensor, ...]:
        """The tensors of the op, in positional order, without masks."""
        if source != "random":
            allocated = {"allocated": True} if source == "allocated" else {}
            return getattr(recorded, self.op)(**self.shape, **allocated)
        made = importlib.import_module(f"tests.cases.{self.op}").make(**self.shape)
        return tuple(value for value in made.values() if isinstance(value, Tensor))


LETTERS = {
    "batch": "B", "slots": "N", "word": "W", "heads": "A", "read_heads": "R",
    "inputs": "I", "outputs": "O", "programs": "P", "length": "L", "attention": "A", "hidden": "H",
}  # fmt: skip


def _linkage(batch: int, slots: int, **options: bool) -> Case:
    return Case("temporal_linkage", {"batch": batch, "slots": slots, "read_heads": 4}, **options)


def _content(op: str, batch: int, slots: int, word: int, **options: Any) -> Case:
    shape = {"batch": batch, "slots": slots, "word": word, "heads": 5}
    return Case(op, {**shape, "shared": True} if options.pop("shared", False) else shape, **options)


def _programs(op: str, batch: int, inputs: int, outputs: int, programs: int, **options: bool) -> Case:
    # A dense product costs the same whatever the numbers are, so random inputs stand for recorded ones.
    shape = {"batch": batch, "inputs": inputs, "outputs": outputs, "programs": programs}
    return Case(op, shape, recorded=False, **options)


def _usage(batch: int, slots: int, **options: bool) -> Case:
    return Case("usage_update", {"batch": batch, "slots": slots, "read_heads": 4}, **options)


def _allocation(batch: int, slots: int, **options: bool) -> Case:
    return Case("allocation", {"batch": batch, "slots": slots, "gated": False}, **options)


def _memory(op: str, batch: int, slots: int, word: int, **options: bool) -> Case:
    # What a product costs does not depend on the numbers: random inputs stand for recorded ones here too.
    heads = {"heads": 4} if op == "weighted_read" else {}
    return Case(op, {"batch": batch, "slots": slots, "word": word, **heads}, recorded=False, **options)


def _weightings(op: str, batch: int, slots: int, **options: bool) -> Case:
    # Logarithms and exponentials cost the same whatever the weights are, so random inputs stand for recorded ones.
    return Case(op, {"batch": batch, "slots": slots, "heads": 4}, recorded=False, **options)


def _attention(batch: int, length: int, attention: int, hidden: int, **options: bool) -> Case:
    # A tanh costs the same whatever the numbers are, so random inputs stand for recorded ones.
    shape = {"batch": batch, "length": length, "attention": attention, "hidden": hidden}
    return Case("cached_attention", shape, recorded=False, **options)


def _dnc_step(batch: int, slots: int, word: int, read_heads: int, **options: bool) -> Case:
    return Case("dnc_step", {"batch": batch, "slots": slots, "word": word, "read_heads": read_heads}, **options)


def _ntm_step(batch: int, slots: int, word: int, heads: str, **options: bool) -> Case:
    # Pairs of a read head and a write head. No product, logarithm or exponential depends on what the numbers are.
    shape = {"batch": batch, "slots": slots, "word": word, "heads": heads}
    return Case("ntm_step", shape, recorded=False, **options)


CASES = [
    _linkage(16, 64, full=True),
    _linkage(16, 128),
    _linkage(8, 256, compiled=True),
    _linkage(4, 512),
    _linkage(1, 256, full=True),
    _content("content_addressing", 8, 128, 32),
    _content("content_addressing", 8, 256, 64, compiled=True),
    _content("content_addressing", 8, 512, 64),
    _content("content_addressing", 1, 512, 64),
    _content("content_read", 8, 256, 64, compiled=True),
    _content("content_read", 8, 512, 64, full=True),
    _content("content_read", 16, 4096, 64, shared=True, recorded=False),
    _content("content_read", 16, 65536, 64, shared=True, recorded=False, full=True),
    _programs("program_lookup", 1, 128, 263, 4),
    _programs("program_lookup", 16, 64, 32, 2, full=True),
    _programs("program_lookup", 16, 128, 263, 4, compiled=True),
    _programs("program_lookup", 64, 128, 263, 4),
    _programs("program_lookup", 64, 256, 471, 8, full=True),
    _programs("program_lookup", 256, 256, 471, 8),
    _programs("program_mix", 1, 128, 263, 4, full=True),
    _programs("program_mix", 16, 128, 263, 4, compiled=True),
    _programs("program_mix", 64, 256, 471, 8, full=True),
    _usage(16, 128, full=True),
    _usage(8, 256, compiled=True),
    _usage(8, 512, full=True),
    _allocation(16, 128, full=True),
    _allocation(8, 256, compiled=True),
    _allocation(8, 512, full=True),
    _allocation(1, 512, full=True),
    _memory("memory_write", 1, 512, 64, full=True),
    _memory("memory_write", 8, 128, 32, full=True),
    _memory("memory_write", 8, 256, 64, compiled=True),
    _memory("memory_write", 8, 512, 64, full=True),
    _memory("weighted_read", 1, 512, 64, full=True),
    _memory("weighted_read", 8, 128, 32, full=True),
    _memory("weighted_read", 8, 256, 64, compiled=True),
    _memory("weighted_read", 8, 512, 64, full=True),
    _weightings("sharpen", 16, 128, compiled=True),
    _weightings("sharpen", 8, 512, full=True),
    _weightings("location_addressing", 16, 128, compiled=True),
    _weightings("location_addressing", 8, 512, full=True),
    _attention(64, 5, 16, 95, compiled=True),
    _attention(64, 10, 16, 256),
    _attention(16, 50, 64, 512, full=True),
    _dnc_step(16, 64, 16, 1),
    _dnc_step(16, 128, 32, 4, compiled=True),
    _dnc_step(8, 256, 64, 4),
    _dnc_step(4, 512, 64, 4),
    _ntm_step(1, 128, 20, "rw", full=True),
    _ntm_step(16, 128, 20, "rw", compiled=True),
    _ntm_step(16, 128, 20, "rwrwrwrw"),
    _ntm_step(8, 512, 64, "rw", full=True),
]


def cases(op: str | None = None, full: bool = False) -> list[Case]:
    return [case for case in CASES if (op is None or case.op == op) and (full or not case.full)]
