from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import ntm_step as kernels
from torch import Tensor
from torch.nn.functional import softplus

from fastmem import native
from fastmem.reference.content_addressing import content_addressing
from fastmem.reference.location_addressing import location_addressing
from fastmem.reference.memory_write import memory_write
from fastmem.reference.weighted_read import weighted_read
from tests.cases.sharpen import EPS
from tests.helpers import assert_close, assert_no_worse, converted, cotangents, run_with_gradients
from tests.kernels.suite import SEEDS, check_output_mask

# The logarithm of a zero weight is -inf on purpose, and 0 times that discarded; the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def make(
    heads: str = "rw",
    batch: int = 4,
    slots: int = 7,
    word: int = 5,
    reach: int = 1,
    joint_writes: bool = False,
    reversed_shift: bool = False,
    in_powers: bool = False,
    clip: float = 20.0,
    norm: str = "inner",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    size = len(heads) * (word + 2 * reach + 4) + heads.count("w") * 2 * word
    tensors = 2 * normal(batch, size), normal(batch, slots, word), normal(batch, len(heads), slots).softmax(-1)
    options = heads, joint_writes, reversed_shift, in_powers, EPS[in_powers], clip, norm, 1e-6
    return [*(tensor.to(dtype) for tensor in tensors), *options]


def formula(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The step head by head, by the references of its ops."""
    word = memory.shape[2]
    taps = (interface.shape[1] - 2 * word * heads.count("w")) // len(heads) - word - 3
    sizes = [size for kind in heads for size in (word, 1, 1, taps, 1, *([word, word] if kind == "w" else []))]
    raw = iter(part.unsqueeze(1) for part in interface.clamp(-clip, clip).split(sizes, -1))
    new_weights, reads, pending = [], [], []
    for i, kind in enumerate(heads):
        key, strength, gate, shift, sharpness = (next(raw) for _ in range(5))
        content = content_addressing(memory, key, softplus(strength).squeeze(-1), None, None, norm, eps)
        head = location_addressing(
            content, weights[:, i : i + 1], gate.sigmoid().squeeze(-1), shift.softmax(-1),
            1 + softplus(sharpness).squeeze(-1), reversed_shift, in_powers, sharpen_eps,
        )  # fmt: skip
        new_weights.append(head)
        if kind == "r":
            reads.append(weighted_read(memory, head))
            continue
        erase, values = next(raw).sigmoid(), next(raw)
        if joint_writes:
            pending.append((head, erase, values))
        else:
            memory = memory_write(memory, head, erase, values, None)
    if pending:
        write_weights, erase, values = (torch.cat(parts, 1) for parts in zip(*pending, strict=True))
        memory = memory_write(memory, write_weights, erase, values, None)
    return memory, torch.cat(new_weights, 1), torch.cat([memory[:, :0], *reads], 1)


def run(inputs: list[Any]) -> list[Tensor]:
    """New state, reads and gradients."""
    *outputs, tape = kernels.ntm_step(*inputs)
    arguments: list[Any] = [*cotangents(outputs), outputs[1], tape, *inputs, [True] * 3]
    return [*outputs, *kernels.ntm_step_backward(*arguments)]


def run_formula(inputs: list[Any]) -> list[Tensor]:
    outputs, gradients = run_with_gradients(formula, inputs, 3)
    return [*outputs, *gradients]


CASES: dict[str, dict[str, Any]] = {
    "read_write": {},
    "write_read": {"heads": "wr"},
    "two_pairs": {"heads": "rwrw", "batch": 1},
    "two_reads": {"heads": "rrw", "batch": 1},
    "only_writes": {"heads": "w", "slots": 33, "batch": 1},
    "only_reads": {"heads": "rr"},
    "joint": {"heads": "rwrrw", "joint_writes": True, "batch": 1},
    "joint_first": {"heads": "wwr", "joint_writes": True, "batch": 1},
    "reversed": {"reversed_shift": True, "reach": 2},
    "powers": {"in_powers": True, "reach": 0},
    "clipped": {"clip": 1.0},
    "outer": {"norm": "outer"},
    "rsqrt": {"norm": "rsqrt"},
    "clamp": {"norm": "clamp"},
    "one_slot": {"slots": 1, "word": 1, "heads": "wr"},
    "long_words": {"word": 66, "slots": 34, "batch": 1, "heads": "rwr"},
}


@pytest.mark.parametrize("case", CASES)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    drawn = [make(**CASES[case], seed=seed) for seed in SEEDS]
    rooms = [
        [run(inputs) for inputs in drawn],
        [run_formula(converted(inputs, torch.float64)) for inputs in drawn],
        [run_formula(inputs) for inputs in drawn],
    ]
    for i in range(6):
        ours, exact, plain = (torch.cat([row[i].flatten() for row in room]) for room in rooms)
        assert_no_worse(ours, exact, plain, factor=2 if i < 3 else 3, name=f"result {i}")


@pytest.mark.parametrize("case", CASES)
def test_float64(case: str) -> None:
    inputs = make(**CASES[case], dtype=torch.float64)
    for i, (actual, expected) in enumerate(zip(run(inputs), run_formula(inputs), strict=True)):
        assert_close(actual, expected, name=f"result {i}")


@pytest.mark.skipif(native.module is None, reason="compares with the C++ op")
@pytest.mark.parametrize("case", ["two_pairs", "joint", "only_reads"])
def test_tape_is_that_of_the_cpu_op(case: str) -> None:
    inputs = make(**CASES[case], dtype=torch.float64)
    assert_close(kernels.ntm_step(*inputs)[3], torch.ops.fastmem_cpu.ntm_step(*inputs)[3])


def test_more_heads_than_one_block_of_heads() -> None:
    inputs = make("r" * 17 + "w", batch=1, slots=3, word=2, dtype=torch.float64)
    for actual, expected in zip(run(inputs), run_formula(inputs), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("case", ["two_pairs", "joint", "only_reads", "long_words"])
def test_in_place_equals_functional(case: str) -> None:
    inputs = make(**CASES[case])
    interface, memory, weights, *options = inputs
    *expected, _ = kernels.ntm_step(*inputs)
    padded = torch.nn.functional.pad(memory, (0, 3))[..., : memory.shape[2]]
    for state in ((memory.clone(), weights.clone()), (padded, weights.transpose(0, 1).clone().transpose(0, 1))):
        reads = torch.full_like(expected[2], float("nan"))
        kernels.ntm_step_(*[interface, *state, reads, *options])
        for actual, wanted in zip((*state, reads), expected, strict=True):
            assert torch.equal(actual, wanted)


def test_strides_are_honoured() -> None:
    *tensors, heads, joint_writes, reversed_shift, in_powers, sharpen_eps, clip, norm, eps = make("rwr")
    options = heads, joint_writes, reversed_shift, in_powers, sharpen_eps, clip, norm, eps
    strided = [tensor.transpose(0, -1).clone().transpose(0, -1) for tensor in tensors]
    for actual, wanted in zip(run([*strided, *options]), run([*tensors, *options]), strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("given", range(3))
def test_absent_upstream_gradients_count_as_zero(given: int) -> None:
    inputs = make("rwr", batch=1, dtype=torch.float64)
    *outputs, tape = kernels.ntm_step(*inputs)
    upstream = cotangents(outputs)
    present: list[Any] = [grad if i == given else None for i, grad in enumerate(upstream)]
    zeros: list[Any] = [grad if i == given else torch.zeros_like(grad) for i, grad in enumerate(upstream)]
    arguments: list[Any] = [outputs[1], tape, *inputs]
    actual = kernels.ntm_step_backward(*[*present, *arguments, [True] * 3])
    expected = kernels.ntm_step_backward(*[*zeros, *arguments, [True] * 3])
    for a, e in zip(actual, expected, strict=True):
        assert_close(a, e)
    check_output_mask(kernels.ntm_step_backward, [*present, *arguments], 3)


@pytest.mark.parametrize("empty", [{"batch": 0}, {"slots": 0}])
def test_empty(empty: dict[str, Any]) -> None:
    inputs = make(**empty)
    for actual, expected in zip(run(inputs), run_formula(inputs), strict=True):
        assert actual.shape == expected.shape
        assert not actual.any()


def test_nan_stays_in_its_sample() -> None:
    inputs = make("rwr")
    clean = run(inputs)
    inputs[1][1, 2, 3] = float("nan")
    for dirty, expected in zip(run(inputs), clean, strict=True):
        assert torch.equal(dirty[0], expected[0])
        assert dirty[1].isnan().any()
