import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import program_lookup as kernels
from fastmem.kernels import program_mix

from fastmem.reference import program_lookup as reference
from tests.cases import program_lookup as cases
from tests.helpers import assert_close, converted, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("program_lookup", kernels, reference, cases, case, 2, slice(1, 2), 6)


@pytest.mark.parametrize("given", range(2))
def test_absent_upstream_gradients_count_as_zero(given: int) -> None:
    values = list(cases.make(batch=3).values())
    outputs = kernels.program_lookup(*values)
    upstream = [grad if i == given else None for i, grad in enumerate(cotangents(outputs))]
    arguments = [*upstream, outputs[1], *values]
    exact = [*(None if grad is None else grad.double() for grad in upstream)]
    expected = reference.program_lookup_backward(
        *[*exact, outputs[1].double(), *converted(values, torch.float64), [True] * 6]
    )
    for a, e in zip(kernels.program_lookup_backward(*[*arguments, [True] * 6]), expected, strict=True):
        assert_close(a.double(), e, 2e-6)
    check_output_mask(kernels.program_lookup_backward, arguments, 6)


def test_splits_only_change_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(cases.make(batch=3, inputs=40).values())
    outputs = kernels.program_lookup(*values)
    arguments = [*cotangents(outputs), outputs[1], *values, [True] * 6]
    expected = kernels.program_lookup_backward(*arguments)
    monkeypatch.setattr(program_mix, "MOST_PROGRAMS", 1)
    for actual, wanted in zip(kernels.program_lookup(*values), outputs, strict=True):
        assert_close(actual, wanted, 1e-6)
    for actual, wanted in zip(kernels.program_lookup_backward(*arguments), expected, strict=True):
        assert_close(actual, wanted, 2e-6)


def test_strides_are_honoured() -> None:
    values = cases.make(inputs=5, outputs=7)
    expected = kernels.program_lookup(*values.values())
    weights = values["weights"]
    for other in (weights.mT.contiguous().mT, weights.transpose(0, 1).contiguous().transpose(0, 1)):
        for actual, wanted in zip(
            kernels.program_lookup(*(values | {"weights": other}).values()), expected, strict=True
        ):
            assert torch.equal(actual, wanted)
