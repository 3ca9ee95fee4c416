"""Inputs as a trained DNC makes them: sharp and broad weights, uneven usage, every slot written.

bench/recorded/n<N>.npz holds, for a DNC trained and run with N slots, what fixes its interface vectors: the outputs of
the controller at each step, and the linear layer that turns them into interface vectors, all in float16. The states are
rebuilt here by running the memory's recurrence in plain PyTorch, with subnormal numbers as they come, long enough to
fill every slot and go on. bench/record.py made the files.
"""

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from bench.peers import dnc_textbook
from fastmem.reference._interface import interface_shapes, joined, split

FOLDER = Path(__file__).with_name("recorded")
HEADS = 4
APART = 7  # steps between two states of one run that stand for different samples


class Moment(NamedTuple):
    """A state of the run before a step, and what that step does to it."""

    before: dnc_textbook.Memory
    after: dnc_textbook.Memory
    fields: dnc_textbook.Interface
    vector: Tensor  # the fields as the controller gave them


def interface_vectors(slots: int) -> Tensor:
    """[T, B, 4 W + 3 W + 23]"""
    with np.load(FOLDER / f"n{slots}.npz") as file:
        hidden, weight, bias = (torch.from_numpy(file[name]).float() for name in ("hidden", "weight", "bias"))
    return torch.nn.functional.linear(hidden, weight, bias)


@lru_cache(maxsize=2)
def moments(slots: int, allocated: bool = False, count: int = 2) -> list[Moment]:
    """The last `count` moments of the run, APART steps from each other, latest first.

    `allocated` holds the allocation gate at 1, as in a network whose gate has saturated. Then nothing but allocation
    writes, and its weights, products of many usages, fill the link with subnormal numbers; the share of content writing
    that our shortly trained networks keep hides them.
    """
    vectors = interface_vectors(slots)
    steps, batch, size = vectors.shape
    word = (size - 5 * HEADS - 3) // (HEADS + 3)
    kept = {steps - 1 - index * APART for index in range(count)}
    state = dnc_textbook.empty(batch, slots, word, HEADS, vectors)
    found: list[Moment] = []
    with torch.no_grad():
        for time, vector in enumerate(vectors):
            fields = dnc_textbook.parse(vector, HEADS, word)
            if allocated:
                fields = fields._replace(allocation_gate=torch.ones_like(fields.allocation_gate))
            after, _ = dnc_textbook.step(fields, state)
            if time in kept:
                found.insert(0, Moment(state, after, fields, vector))
            state = after
    return found


def _batched(batch: int, slots: int, parts: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    together = tuple(torch.cat(tensors)[:batch].contiguous() for tensors in zip(*parts, strict=True))
    if together[0].shape[0] < batch:
        raise ValueError(f"batch: the run with {slots} slots holds {together[0].shape[0]} samples, got {batch}")
    return together


def _check_word(memory: Tensor, slots: int, word: int) -> None:
    if memory.shape[-1] != word:
        raise ValueError(f"word: the run with {slots} slots has words of {memory.shape[-1]}, got {word}")


def temporal_linkage(batch: int, slots: int, read_heads: int = HEADS, allocated: bool = False) -> tuple[Tensor, ...]:
    return _batched(batch, slots, [
        (m.before.link, m.before.precedence, m.after.write_weights, m.before.read_weights[:, :read_heads])
        for m in moments(slots, allocated)
    ])  # fmt: skip


def content_addressing(batch: int, slots: int, word: int, heads: int = HEADS + 1) -> tuple[Tensor, ...]:
    """The read heads' keys, and the write head's as the last, on the memory after the write."""
    inputs = _batched(batch, slots, [
        (
            m.after.memory,
            torch.cat([m.fields.read_keys, m.fields.write_key], dim=1)[:, :heads],
            torch.cat([m.fields.read_strengths, m.fields.write_strength], dim=1)[:, :heads],
        )
        for m in moments(slots)
    ])  # fmt: skip
    _check_word(inputs[0], slots, word)
    return inputs


content_read = content_addressing


def usage_update(batch: int, slots: int, read_heads: int = HEADS) -> tuple[Tensor, ...]:
    return _batched(batch, slots, [
        (
            m.before.usage, m.before.write_weights, m.before.read_weights[:, :read_heads],
            m.fields.free_gates[:, :read_heads],
        )
        for m in moments(slots)
    ])  # fmt: skip


def allocation(batch: int, slots: int, gated: bool = False) -> tuple[Tensor, ...]:
    """One write head, which needs no gates."""
    return _batched(batch, slots, [(m.after.usage,) for m in moments(slots)])


def dnc_step(batch: int, slots: int, word: int, read_heads: int = HEADS) -> tuple[Tensor, ...]:
    """Where fewer read heads are asked for, the first ones."""
    by_head = ("read_keys", "read_strengths", "free_gates", "read_modes")

    def interface(vector: Tensor) -> Tensor:
        fields = split(vector, interface_shapes(word, HEADS, 1))
        return joined(fields._replace(**{name: getattr(fields, name)[:, :read_heads] for name in by_head}))

    found = moments(slots)
    _check_word(found[0].after.memory, slots, word)
    return _batched(batch, slots, [
        (interface(m.vector), *m.before[:-1], m.before.read_weights[:, :read_heads]) for m in found
    ])  # fmt: skip
