import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import program_mix as kernels

from fastmem.reference import program_mix as reference
from tests.cases import program_mix as cases
from tests.helpers import assert_close, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("program_mix", kernels, reference, cases, case, 1, slice(0, 0), 4)


@pytest.mark.parametrize("biases", [True, False])
def test_unwanted_gradients(biases: bool) -> None:
    values = list(cases.make(batch=3, biases=biases).values())
    check_output_mask(kernels.program_mix_backward, [*cotangents([kernels.program_mix(*values)]), *values], 4)


@pytest.mark.parametrize("size", ["inputs", "outputs"])
def test_no_inputs_or_no_outputs(size: str) -> None:
    """Without inputs the biases are left, and what they give to the program weights."""
    values = list(cases.make(**{size: 0}).values())
    outputs = kernels.program_mix(*values)
    assert_close(outputs, reference.program_mix(*values), 1e-6)
    arguments = [*cotangents([outputs]), *values, [True] * 4]
    expected = reference.program_mix_backward(*arguments)
    for actual, wanted in zip(kernels.program_mix_backward(*arguments), expected, strict=True):
        assert_close(actual, wanted, 1e-6)


def test_splits_only_change_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(cases.make(batch=3, inputs=40).values())
    outputs = kernels.program_mix(*values)
    arguments = [*cotangents([outputs]), *values, [True] * 4]
    expected = kernels.program_mix_backward(*arguments)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 1)
    assert_close(kernels.program_mix(*values), outputs, 1e-6)
    for actual, wanted in zip(kernels.program_mix_backward(*arguments), expected, strict=True):
        assert_close(actual, wanted, 2e-6)


def test_strides_are_honoured() -> None:
    values = cases.make(inputs=5, outputs=7)
    expected = kernels.program_mix(*values.values())
    weights, mixture = values["weights"], values["program_weights"]
    for other in (weights.mT.contiguous().mT, weights.transpose(0, 1).contiguous().transpose(0, 1)):
        changed = values | {"weights": other, "program_weights": mixture.mT.contiguous().mT}
        assert torch.equal(kernels.program_mix(*changed.values()), expected)
