from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import dnc_step as kernels

from fastmem.reference import dnc_step as reference
from tests.cases import dnc_step as cases
from tests.helpers import assert_close, assert_no_worse, converted, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp

SAVED = (0, 1, 4, 5, 7)  # new memory, usage, write weights and read weights, and the tape
ALL = {"masked": True, "deallocates": True, "sharpened": True, "mask_floor": 0.1}
VARIANTS = ["masked", "deallocates", "sharpened", "width", "clipped"]


def values(**arguments: Any) -> list[Any]:
    return list(cases.make(**arguments).values())


def backward_arguments(inputs: list[Any], given: range) -> list[Any]:
    """Those of the backward but the mask, with the upstream gradients `given` and no others."""
    outputs = kernels.dnc_step(*inputs)
    upstream = [grad if i in given else None for i, grad in enumerate(cotangents(outputs[:7]))]
    return [*upstream, *(outputs[i] for i in SAVED), *inputs]


@pytest.mark.parametrize("case", [*cases.INTERPRETED, *VARIANTS])
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("dnc_step", kernels, reference, cases, case, 7, SAVED, 7)


def test_several_tiles_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """More slots than a tile of any kind, more heads than a block of them, and a word in pieces."""
    monkeypatch.setattr(kernels, "BLOCK", 16)
    monkeypatch.setattr(kernels, "BLOCK_COUNT", 16)
    inputs = values(batch=1, slots=35, word=18, read_heads=17, write_heads=2, norm="clamp", **ALL)
    exact, plain = reference.dnc_step(*converted(inputs, torch.float64)), reference.dnc_step(*inputs)
    for triple in zip(kernels.dnc_step(*inputs), exact, plain, strict=True):
        assert_no_worse(*triple, factor=2)
    arguments = [*backward_arguments(inputs, range(7)), [True] * 7]
    ours, plain_gradients = kernels.dnc_step_backward(*arguments), reference.dnc_step_backward(*arguments)
    exact_gradients = reference.dnc_step_backward(*converted(arguments, torch.float64))
    for triple in zip(ours, exact_gradients, plain_gradients, strict=True):
        assert_no_worse(*triple, factor=3)


@pytest.mark.parametrize("case", [*cases.INTERPRETED, *VARIANTS])
def test_in_place_equals_functional(case: str) -> None:
    interface, *rest = values(**cases.CASES[case])
    state, options = rest[:6], rest[6:]
    expected = kernels.dnc_step(interface, *state, *options)[:7]
    written = [*(tensor.clone() for tensor in state), torch.full_like(expected[6], float("nan"))]
    kernels.dnc_step_(interface, *written, *options)
    for actual, wanted in zip(written, expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("given", range(7))
def test_absent_upstream_gradients_count_as_zero(given: int) -> None:
    inputs = values(batch=2, slots=5, word=3, read_heads=2, write_heads=2, **ALL)
    arguments = backward_arguments(inputs, range(given, given + 1))
    arguments.append([True] * 7)
    expected = reference.dnc_step_backward(*converted(arguments, torch.float64))
    for a, e in zip(kernels.dnc_step_backward(*arguments), expected, strict=True):
        assert_close(a.double(), e, 2e-6)


@pytest.mark.parametrize("detach", [False, True])
def test_unwanted_gradients_are_empty(detach: bool) -> None:
    inputs = values(batch=1, slots=5, word=3, detach_usage_write=detach)
    check_output_mask(kernels.dnc_step_backward, backward_arguments(inputs, range(7)), 7)


def test_any_layout_of_the_state() -> None:
    inputs = values(batch=2, slots=5, word=3, write_heads=2)
    expected = kernels.dnc_step(*inputs)
    strided: list[Any] = [torch.stack([x, x], -1)[..., 0] if isinstance(x, torch.Tensor) else x for x in inputs]
    for actual, wanted in zip(kernels.dnc_step(*strided), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # exp overflows in a sigmoid that ends at 0
def test_nothing_is_clipped_without_a_bound() -> None:
    inputs = values(slots=5, word=3, scale=30.0, clip=float("inf"))
    exact = reference.dnc_step(*converted(inputs, torch.float64))
    for triple in zip(kernels.dnc_step(*inputs), exact, reference.dnc_step(*inputs), strict=True):
        assert_no_worse(*triple, factor=2)


def test_nan_stays_in_its_sample() -> None:
    inputs = values(batch=2, slots=5, word=3)
    clean = kernels.dnc_step(*inputs)
    inputs[1][1, 2] = float("nan")
    for dirty, expected in zip(kernels.dnc_step(*inputs), clean, strict=True):
        assert torch.equal(dirty[0], expected[0])
