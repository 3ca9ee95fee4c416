from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import temporal_linkage as kernels

from fastmem.reference import temporal_linkage as reference
from tests.cases import temporal_linkage as cases
from tests.helpers import assert_close, converted, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


def values(**arguments: Any) -> list[Any]:
    return list(cases.make(**arguments).values())


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("temporal_linkage", kernels, reference, cases, case, 4, slice(0, 0), 4)


def test_in_place_equals_functional() -> None:
    link, precedence, *weights = values(batch=1, slots=65, read_heads=2, write_heads=2)
    expected = kernels.temporal_linkage(link, precedence, *weights)
    link, precedence = (
        torch.nn.functional.pad(link, (0, 3))[..., :65],
        precedence.transpose(0, 1).clone().transpose(0, 1),
    )
    reads = kernels.temporal_linkage_(link, precedence, *weights)
    for actual, wanted in zip((link, precedence, *reads), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_strides_are_honoured() -> None:
    inputs = values(batch=2, slots=5, read_heads=2, write_heads=2)
    strided = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in inputs]
    rows = [inputs[0].transpose(0, 1).clone().transpose(0, 1), *inputs[1:]]
    expected = kernels.temporal_linkage(*inputs)
    for other in (strided, rows):
        for actual, wanted in zip(kernels.temporal_linkage(*other), expected, strict=True):
            assert torch.equal(actual, wanted)


@pytest.mark.parametrize("given", range(4))
def test_absent_upstream_gradients_count_as_zero(given: int) -> None:
    inputs = values(batch=1, slots=9, read_heads=2, write_heads=2)
    upstream = [grad if i == given else None for i, grad in enumerate(cotangents(kernels.temporal_linkage(*inputs)))]
    actual = kernels.temporal_linkage_backward(*[*upstream, *inputs, [True] * 4])
    exact = [None if grad is None else grad.double() for grad in upstream]
    expected = reference.temporal_linkage_backward(*[*exact, *converted(inputs, torch.float64), [True] * 4])
    for a, e in zip(actual, expected, strict=True):
        assert_close(a.double(), e, 1e-6)
    check_output_mask(kernels.temporal_linkage_backward, [*upstream, *inputs], 4)


def test_nan_stays_in_its_sample() -> None:
    inputs = values(batch=2, slots=5)
    clean = kernels.temporal_linkage(*inputs)
    inputs[0][1, 0, 2, 3] = float("nan")
    for dirty, expected in zip(kernels.temporal_linkage(*inputs), clean, strict=True):
        assert torch.equal(dirty[0], expected[0])
