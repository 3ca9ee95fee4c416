import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import usage_update as kernels

import fastmem
from fastmem.reference import usage_update as reference
from tests.cases import usage_update as cases
from tests.helpers import assert_close, converted, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("usage_update", kernels, reference, cases, case, 2, slice(0, 0), 4)


@pytest.mark.parametrize("case", ["small", "zeros_and_ones"])
def test_float64(case: str) -> None:
    inputs = list(cases.make(**cases.CASES[case], dtype=torch.float64).values())
    outputs, expected = fastmem.usage_update(*inputs, backend="triton"), reference.usage_update(*inputs)
    arguments = *cotangents(outputs), *inputs, [True] * 4
    for a, e in zip(
        (*outputs, *kernels.usage_update_backward(*arguments)),
        (*expected, *reference.usage_update_backward(*arguments)),
        strict=True,
    ):
        assert_close(a, e)


def test_several_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = list(cases.make(slots=37, write_heads=2, dtype=torch.float64).values())
    monkeypatch.setattr(kernels, "BLOCK", 16)
    outputs = kernels.usage_update(*inputs)
    arguments = *cotangents(outputs), *inputs, [True] * 4
    for a, e in zip(
        (*outputs, *kernels.usage_update_backward(*arguments)),
        (*reference.usage_update(*inputs), *reference.usage_update_backward(*arguments)),
        strict=True,
    ):
        assert_close(a, e)


def test_full_slots_are_tied() -> None:
    """No rounding takes anything from them."""
    inputs = list(cases.make(**cases.CASES["full"]).values())
    new_usage, _ = kernels.usage_update(*inputs)
    assert torch.equal(new_usage, inputs[0])


def test_strides_are_honoured() -> None:
    inputs = list(cases.make(slots=5, write_heads=2).values())
    strided = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in inputs]
    expected = kernels.usage_update(*inputs)
    for actual, wanted in zip(kernels.usage_update(*strided), expected, strict=True):
        assert torch.equal(actual, wanted)
    upstream = cotangents(expected)
    for actual, wanted in zip(
        kernels.usage_update_backward(*(grad.mT.contiguous().mT for grad in upstream), *strided, [True] * 4),
        kernels.usage_update_backward(*upstream, *inputs, [True] * 4),
        strict=True,
    ):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("given", range(2))
def test_absent_upstream_gradients_count_as_zero(given: int) -> None:
    inputs = list(cases.make(slots=9, write_heads=2).values())
    upstream = [grad if i == given else None for i, grad in enumerate(cotangents(kernels.usage_update(*inputs)))]
    actual = kernels.usage_update_backward(*upstream, *inputs, [True] * 4)
    exact = [None if grad is None else grad.double() for grad in upstream]
    expected = reference.usage_update_backward(*exact, *converted(inputs, torch.float64), [True] * 4)
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.double(), e, 1e-6)
    check_output_mask(kernels.usage_update_backward, [*upstream, *inputs], 4)


def test_nan_stays_in_its_sample() -> None:
    inputs = list(cases.make(slots=5).values())
    clean = kernels.usage_update(*inputs)
    inputs[2][1, 0, 2] = float("nan")
    for dirty, expected in zip(kernels.usage_update(*inputs), clean, strict=True):
        assert torch.equal(dirty[0], expected[0])
        assert dirty[1].isnan().tolist() == [False, False, True, False, False]
