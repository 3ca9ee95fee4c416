from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import ntm_step as kernels

from fastmem.reference import ntm_step as reference
from tests.cases import ntm_step as cases
from tests.helpers import assert_close, converted, cotangents
from tests.kernels.suite import check, check_output_mask

# The logarithm of a zero weight is -inf on purpose, and 0 times that discarded; the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

SAVED = (1, 3)  # new weights and the tape
MORE: dict[str, dict[str, Any]] = {  # than one tile of slots, of words and of heads, and what no other case has
    "tiles": {"heads": "rwr", "batch": 1, "slots": 34, "word": 66},
    "heads": {"heads": "r" * 17 + "w", "batch": 1, "slots": 3, "word": 2},
    "joint": {"heads": "rwrrw", "joint_writes": True, "batch": 1, "slots": 7, "word": 5, "reversed_shift": True},
    "powers": {"in_powers": True, "reach": 0, "slots": 7, "word": 5},
    "rsqrt": {"norm": "rsqrt", "slots": 7, "word": 5},
}


def values(**arguments: Any) -> list[Any]:
    return list(cases.make(**arguments).values())


def backward_arguments(inputs: list[Any], given: range) -> list[Any]:
    """Those of the backward but the mask, with the upstream gradients `given` and no others."""
    outputs = kernels.ntm_step(*inputs)
    upstream = [grad if i in given else None for i, grad in enumerate(cotangents(outputs[:3]))]
    return [*upstream, *(outputs[i] for i in SAVED), *inputs]


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("ntm_step", kernels, reference, cases, case, 3, SAVED, 3)


@pytest.mark.parametrize("case", MORE)
def test_float64(case: str) -> None:
    inputs = values(**MORE[case], dtype=torch.float64)
    arguments = [*backward_arguments(inputs, range(3)), [True] * 3]
    ours = (*kernels.ntm_step(*inputs), *kernels.ntm_step_backward(*arguments))
    exact = (*reference.ntm_step(*inputs), *reference.ntm_step_backward(*arguments))
    for i, (actual, expected) in enumerate(zip(ours, exact, strict=True)):
        assert_close(actual, expected, name=f"result {i}")


@pytest.mark.parametrize("case", ["two_pairs", "two_writers_joint", "read_alone", "odd"])
def test_in_place_equals_functional(case: str) -> None:
    interface, memory, weights, *options = values(**cases.CASES[case])
    *expected, _ = kernels.ntm_step(interface, memory, weights, *options)
    written = memory.clone(), weights.clone(), torch.full_like(expected[2], float("nan"))
    kernels.ntm_step_(interface, *written, *options)
    for actual, wanted in zip(written, expected, strict=True):
        assert torch.equal(actual, wanted)


def test_strides_are_honoured() -> None:
    inputs = values(heads="rwr", slots=7, word=5)
    expected = kernels.ntm_step(*inputs)
    strided = [x.transpose(0, -1).clone().transpose(0, -1) if isinstance(x, torch.Tensor) else x for x in inputs]
    for actual, wanted in zip(kernels.ntm_step(*strided), expected, strict=True):
        assert torch.equal(actual, wanted)
    arguments, plain = (backward_arguments(x, range(3)) for x in (strided, inputs))
    for actual, wanted in zip(
        kernels.ntm_step_backward(*arguments, [True] * 3), kernels.ntm_step_backward(*plain, [True] * 3), strict=True
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("given", range(3))
def test_absent_upstream_gradients_count_as_zero(given: int) -> None:
    arguments = backward_arguments(values(heads="rwr", batch=1, slots=7, word=5), range(given, given + 1))
    expected = reference.ntm_step_backward(*converted(arguments, torch.float64), [True] * 3)
    for a, e in zip(kernels.ntm_step_backward(*arguments, [True] * 3), expected, strict=True):
        assert_close(a.double(), e, 2e-6)
    check_output_mask(kernels.ntm_step_backward, arguments, 3)


def test_nan_stays_in_its_sample() -> None:
    inputs = values(heads="rwr", slots=7, word=5)
    clean = kernels.ntm_step(*inputs)
    inputs[1][1, 2, 3] = float("nan")
    for dirty, expected in zip(kernels.ntm_step(*inputs), clean, strict=True):
        assert torch.equal(dirty[0], expected[0])
        assert dirty[1].isnan().any()
