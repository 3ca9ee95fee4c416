import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import memory_write as kernels

from fastmem.reference import memory_write as reference
from tests.cases import memory_write as cases
from tests.helpers import assert_close, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("memory_write", kernels, reference, cases, case, 1, slice(0, 0), 5)


@pytest.mark.parametrize("case", ["plain", "one_head", "several_heads", "wide"])
def test_float64(case: str) -> None:
    values = list(cases.make(**cases.CASES[case], dtype=torch.float64).values())
    memory = kernels.memory_write(*values)
    assert_close(memory, reference.memory_write(*values))
    arguments = [*cotangents([memory]), *values]
    expected = reference.memory_write_backward(*arguments, [True] * 5)
    for actual, wanted in zip(kernels.memory_write_backward(*arguments, [True] * 5), expected, strict=True):
        assert_close(actual, wanted)
    check_output_mask(kernels.memory_write_backward, arguments, 5)


def test_gradient_where_two_heads_erase_everything() -> None:
    values = cases.make(slots=5, word=3, write_heads=3, retention=True, dtype=torch.float64)
    values["write_weights"][:, :2, 0] = 1
    values["erase"][:, :2] = 1
    values["retention"][:, 1] = 0
    arguments = [torch.ones_like(values["memory"]), *values.values(), [True] * 5]
    expected = reference.memory_write_backward(*arguments)
    for actual, wanted in zip(kernels.memory_write_backward(*arguments), expected, strict=True):
        assert_close(actual, wanted)


def test_in_place_equals_functional() -> None:
    memory, *others = cases.make(slots=33, write_heads=2, retention=True).values()
    expected = kernels.memory_write(memory, *others)
    wide = torch.nn.functional.pad(memory, (0, 3), value=7.0)
    assert kernels.memory_write_(wide[..., :12], *others) is None
    assert torch.equal(wide[..., :12], expected) and (wide[..., 12:] == 7).all()


def test_in_place_writes_a_column_of_any_stride() -> None:
    memory, *others = cases.make(word=1, retention=True).values()
    expected = kernels.memory_write(memory, *others)
    wide = torch.cat([memory, memory], -1)
    kernels.memory_write_(wide[..., 1:].as_strided((2, 16, 1), (32, 2, 5), 1), *others)
    assert torch.equal(wide[..., 1:], expected) and torch.equal(wide[..., :1], memory)


def test_strides_are_honoured() -> None:
    inputs = list(cases.make(slots=5, write_heads=2, retention=True).values())
    expected = kernels.memory_write(*inputs)
    scattered = [torch.stack([tensor, tensor], -1)[..., 0] for tensor in inputs]
    swapped = [tensor.transpose(0, 1).clone().transpose(0, 1) for tensor in inputs]
    for other in (scattered, swapped):
        assert torch.equal(kernels.memory_write(*other), expected)
    gradients = kernels.memory_write_backward(expected, *inputs, [True] * 5)
    grad = torch.stack([expected, expected], -1)[..., 0]
    for a, e in zip(kernels.memory_write_backward(grad, *swapped, [True] * 5), gradients, strict=True):
        assert torch.equal(a, e)


def test_nan_stays_in_its_sample() -> None:
    inputs = list(cases.make(slots=5, write_heads=2).values())
    clean = kernels.memory_write(*inputs)
    inputs[0][1, 2, 3] = float("nan")
    dirty = kernels.memory_write(*inputs)
    assert torch.equal(dirty[0], clean[0]) and dirty[1, 2, 3].isnan()
