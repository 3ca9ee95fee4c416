import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import weighted_read as kernels

from fastmem.reference import weighted_read as reference
from tests.cases import weighted_read as cases
from tests.helpers import assert_close, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("weighted_read", kernels, reference, cases, case, 1, slice(0, 0), 2)


@pytest.mark.parametrize("case", ["plain", "many_heads", "wide"])
def test_float64(case: str) -> None:
    values = list(cases.make(**cases.CASES[case], dtype=torch.float64).values())
    reads = kernels.weighted_read(*values)
    assert_close(reads, reference.weighted_read(*values))
    arguments = [*cotangents([reads]), *values]
    expected = reference.weighted_read_backward(*arguments, [True] * 2)
    for actual, wanted in zip(kernels.weighted_read_backward(*arguments, [True] * 2), expected, strict=True):
        assert_close(actual, wanted)
    check_output_mask(kernels.weighted_read_backward, arguments, 2)


def test_splits_only_change_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(cases.make(slots=70, dtype=torch.float64).values())
    split = kernels.weighted_read(*values)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 1)
    assert_close(kernels.weighted_read(*values), split)


def test_strides_are_honoured() -> None:
    memory, weights = cases.make(slots=9, word=5).values()
    expected = kernels.weighted_read(memory, weights)
    for other in (memory.mT.contiguous().mT, memory.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(kernels.weighted_read(other, weights.mT.contiguous().mT), expected)


def test_nan_stays_in_its_sample() -> None:
    memory, weights = cases.make(slots=5).values()
    clean = kernels.weighted_read(memory, weights)
    memory[1, 2, 3] = float("nan")
    dirty = kernels.weighted_read(memory, weights)
    assert torch.equal(dirty[0], clean[0]) and dirty[1, :, 3].isnan().all()
