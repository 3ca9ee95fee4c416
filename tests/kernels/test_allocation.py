import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import allocation as kernels

import fastmem
from fastmem.reference import allocation as reference
from tests.cases import allocation as cases
from tests.helpers import assert_close, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("case", [*cases.INTERPRETED, "tied"])
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("allocation", kernels, reference, cases, case, 1, slice(0, 1), 2)


def agree(usage: torch.Tensor, gates: torch.Tensor | None, eps: float) -> None:
    weights = fastmem.allocation(usage, gates, eps, backend="triton")
    assert_close(weights, reference.allocation(usage, gates, eps))
    arguments = *cotangents([weights]), weights, usage, gates, eps, [True] * 2
    for a, e in zip(kernels.allocation_backward(*arguments), reference.allocation_backward(*arguments), strict=True):
        assert_close(a, e)


@pytest.mark.parametrize("levels", [0, 3])
def test_several_blocks_in_float64(monkeypatch: pytest.MonkeyPatch, levels: int) -> None:
    monkeypatch.setattr(kernels, "BLOCK_COUNT", 16)
    monkeypatch.setattr(kernels, "BLOCK_SCAN", 16)
    agree(*cases.make(slots=37, levels=levels, dtype=torch.float64).values())
    agree(*cases.make(slots=32, levels=levels, gated=False, dtype=torch.float64).values())


def test_nan_comes_last_and_stays_in_its_sample() -> None:
    usage, _, eps = cases.make(slots=9, levels=3, dtype=torch.float64).values()
    usage[1, [2, 5]] = torch.nan
    agree(usage, None, eps)
    assert kernels.allocation(usage, None, eps).isnan().nonzero().tolist() == [[1, 0, 2], [1, 0, 5]]


def test_strides_and_unwanted_gradients() -> None:
    usage, gates, eps = cases.make(slots=9).values()
    weights = kernels.allocation(usage, gates, eps)
    assert torch.equal(kernels.allocation(usage.mT.contiguous().mT, gates.mT.contiguous().mT, eps), weights)
    arguments = [*cotangents([weights]), weights, usage, gates]
    scattered = [value.transpose(0, -1).contiguous().transpose(0, -1) for value in arguments]
    for actual, wanted in zip(
        kernels.allocation_backward(*scattered, eps, [True] * 2),
        kernels.allocation_backward(*arguments, eps, [True] * 2),
        strict=True,
    ):
        assert torch.equal(actual, wanted)
    check_output_mask(kernels.allocation_backward, [*arguments, eps], 2)
