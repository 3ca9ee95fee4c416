"""What whole sequences in C++ promise beside their results: groups of samples, bounded memory, and ctrl-C."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from math import sqrt
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmem
from fastmem.ops._sequence import spacing
from tests.cases import dnc_sequence, ntm_sequence
from tests.helpers import run_with_gradients, threads
from tests.ops.sequences import flat
from tests.ops.suite import native

pytestmark = native
OPS = [
    pytest.param(flat(fastmem.dnc_sequence), dnc_sequence, id="dnc"),
    pytest.param(flat(fastmem.ntm_sequence), ntm_sequence, id="ntm"),
]
MIB = 2**20


@contextmanager
def groups_of(size: int) -> Iterator[None]:
    module: Any = fastmem.native.module
    module.set_group_size(size)
    try:
        yield
    finally:
        module.set_group_size(0)


@pytest.mark.parametrize(
    "samples, weights, state, size",
    [
        (16, MIB // 2, MIB // 16, 16),  # everything in the cache at once
        (16, MIB // 2, MIB // 4, 6),  # as many samples as the weights leave room for
        (16, MIB // 2, MIB * 3 // 2, 1),
        (16, MIB // 2, MIB * 2, 16),  # not even one: everything comes from memory, the weights best only once
        (8, MIB * 5 // 2, MIB // 3, 8),
        (1, MIB, MIB, 1),
        (3, MIB, 0, 3),
    ],
)
def test_the_size_of_a_group(samples: int, weights: int, state: int, size: int) -> None:
    module: Any = fastmem.native.module
    assert module.group_size(samples, weights, state, cache_bytes=2 * MIB) == size


@pytest.mark.parametrize("op, cases", OPS)
@pytest.mark.parametrize(
    "case", ["plain", "layernorm", "feedforward", "whole_panels", "programs", "plain_ragged", "feedforward_ragged"]
)
def test_groups_and_threads_change_no_bit(op: Any, cases: Any, case: str) -> None:
    sizes = {"batch": 5, "steps": 11, "dtype": torch.float32, **({"hidden_size": 40} if "ragged" in case else {})}
    values = cases.make(**{**cases.CASES[case.removesuffix("_ragged")], **sizes})
    if "ragged" in case:  # samples that end early, and others in whose rests they would begin a run
        values["step_mask"] = torch.full((11, 5), 7, dtype=torch.uint8)
        values["step_mask"][1::3] = values["step_mask"][2::3] = 1
        values["step_mask"][1:, 1] = values["step_mask"][4:, 3] = 0
    found = []
    for count, size in ((1, 1), (1, 2), (1, 5), (2, 1), (2, 3)):
        with threads(count), groups_of(size):
            outputs, gradients = run_with_gradients(
                lambda *arguments: op(*arguments, backend="cpp"), list(values.values()), 2
            )
        found.append([*outputs, *gradients])
    for others in found[1:]:
        for a, e in zip(others, found[0], strict=True):
            assert torch.equal(a, e)


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 17, 64, 100, 256, 1000, 4095, 4096, 4097, 16384, 100_000])
def test_states_kept_for_the_backward_grow_with_the_root_of_the_steps(steps: int) -> None:
    """Those on the tape and, of one chunk, those before each segment of 4 steps, of one segment, and the gradients.

    A segment has the memories of its steps, and no links. In numbers, of 256 slots of 64.
    """
    between = spacing(steps)
    kept, rebuilt = (steps - 1) // between, (between + 3) // 4 - 1
    links = kept + rebuilt + 1
    memories = links + 4
    link, memory = 256 * 256, 256 * 64
    assert links * link + memories * memory <= (link + memory) * (2 * sqrt(steps) + 10)


@pytest.mark.parametrize("op, cases", OPS)
def test_the_tape_keeps_states_that_far_apart(op: Any, cases: Any) -> None:
    values = cases.make(steps=40, batch=3, slots=6, word=5)
    inputs, *rest = values.values()
    outputs, *_ = op(inputs.requires_grad_(), *rest)
    saved = [tensor for tensor in outputs.grad_fn.saved_tensors if tensor is not None]
    memories = [tensor for tensor in saved if tensor.dim() == 4 and tensor.shape[1:] == (3, 6, 5)]
    assert [len(tensor) for tensor in memories] == [39 // spacing(40)] == [4]


class Stop(Exception):
    """What the handler of a signal raises."""


@contextmanager
def signalled(number: signal.Signals, handler: Any, seconds: float) -> Iterator[None]:
    """The signal comes after so many seconds; it may come after the block too, so wait for it there."""
    before = signal.signal(number, handler)
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.start()
    try:
        yield
    finally:
        timer.join()
        signal.signal(number, before)


def ended_by_it(raised: pytest.ExceptionInfo[BaseException]) -> bool:
    """Whether C++ stopped for the signal. Had it gone on to its end, Python would raise on return, from elsewhere."""
    return any(entry.name == "raise_interrupt" for entry in raised.traceback)


def long_one(steps: int) -> tuple[Tensor, list[Any]]:
    """Inputs of a sequence of many small steps, and the other arguments."""
    values = dnc_sequence.make(steps=steps, batch=2, hidden_size=4, slots=64, word=4)
    inputs, *rest = values.values()
    return inputs, rest


@pytest.mark.parametrize(
    "number, handler, error",
    [(signal.SIGINT, signal.default_int_handler, KeyboardInterrupt), (signal.SIGUSR1, None, Stop)],
)
def test_a_signal_ends_a_long_call(number: signal.Signals, handler: Any, error: type[BaseException]) -> None:
    def stop(*_: Any) -> None:
        raise Stop

    inputs, rest = long_one(400_000)
    given = [value.clone() if isinstance(value, Tensor) else value for value in rest]
    op = flat(fastmem.dnc_sequence)
    with pytest.raises(error) as raised, signalled(number, handler or stop, 0.2):
        op(inputs, *rest)
    assert ended_by_it(raised)
    for after, before in zip(rest, given, strict=True):
        assert not isinstance(before, Tensor) or torch.equal(after, before)
    assert op(inputs[:3], *rest)[0].isfinite().all()  # the next call knows nothing of it


def test_ctrl_c_ends_a_long_backward() -> None:
    inputs, rest = long_one(30_000)
    outputs, *_ = flat(fastmem.dnc_sequence)(inputs.requires_grad_(), *rest)
    with pytest.raises(KeyboardInterrupt) as raised, signalled(signal.SIGINT, signal.default_int_handler, 0.05):
        outputs.sum().backward()
    assert inputs.grad is None and ended_by_it(raised)


def test_ctrl_c_ends_a_call_whose_own_thread_has_done_its_part() -> None:
    inputs, rest = long_one(400_000)
    *tensors, _, config = rest
    mask = torch.full(inputs.shape[:2], 7, dtype=torch.uint8)
    mask[1:, 0] = 0
    in_time = signalled(signal.SIGINT, signal.default_int_handler, 0.5)
    with threads(2), pytest.raises(KeyboardInterrupt) as raised, in_time:
        flat(fastmem.dnc_sequence)(inputs, *tensors, mask, config)
    assert ended_by_it(raised)
