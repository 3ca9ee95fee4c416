import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import content_addressing as kernels

from fastmem.reference import content_addressing as reference
from tests.cases import content_addressing as cases
from tests.helpers import assert_close, converted, cotangents
from tests.kernels.suite import check, check_output_mask

# Special scores divide by zero on purpose, and the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
INFINITY, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("content_addressing", kernels, reference, cases, case, 1, slice(0, 1), 4)


def test_many_heads_and_long_words() -> None:
    """More heads than one block, and a word in several pieces."""
    values = list(cases.make(batch=1, slots=18, word=70, heads=18, key_mask=True).values())
    weights = kernels.content_addressing(*values)
    expected = reference.content_addressing(*converted(values, torch.float64))
    assert_close(weights.double(), expected, 1e-6)
    (upstream,) = cotangents([weights])
    actual = kernels.content_addressing_backward(*[upstream, weights, *values, [True] * 4])
    exact = reference.content_addressing_backward(
        *[upstream.double(), expected, *converted(values, torch.float64), [True] * 4]
    )
    for a, e in zip(actual, exact, strict=True):
        assert_close(a.double(), e, 2e-6)
    check_output_mask(kernels.content_addressing_backward, [upstream, weights, *values], 4)


def test_several_tiles_of_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(cases.make(batch=1, slots=40, heads=2, key_mask=True).values())
    weights = kernels.content_addressing(*values)
    arguments = [cotangents([weights])[0], weights, *values, [True] * 4]
    expected = kernels.content_addressing_backward(*arguments)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 1)
    for actual, wanted in zip(kernels.content_addressing_backward(*arguments), expected, strict=True):
        assert_close(actual, wanted, 1e-6)


def test_special_scores() -> None:
    values = cases.make(batch=4, slots=5, word=3, heads=2, slot_mask=True)
    values["slot_mask"][:] = True
    values["slot_mask"][0, 1] = False
    values["memory"][0, 1] = NAN
    values["slot_mask"][1] = False
    values["keys"][2, 0, 0] = NAN
    # The first head of sample 3 points away from every row: all its scores are -inf.
    values["memory"][3] = values["memory"][3].abs() + 0.1
    values["keys"][3] = values["memory"][3, :2]
    values["keys"][3, 0] *= -1
    values["strengths"][3] = INFINITY
    arguments = list(values.values())
    weights = kernels.content_addressing(*arguments)
    assert_close(weights.double(), reference.content_addressing(*converted(arguments, torch.float64)), 1e-6)
    assert (weights[0, :, 1] == 0).all() and (weights[1] == 0).all() and (weights[3, 0] == 0).all()
    assert weights[2, 0].isnan().all() and weights[2, 1].isfinite().all() and weights[3, 1].isnan().all()

    upstream = torch.randn_like(weights)
    memory, keys, strengths, _ = kernels.content_addressing_backward(*[upstream, weights, *arguments, [True] * 4])
    assert (memory[0, 1] == 0).all() and memory[0].isfinite().all()
    for gradient in (memory[1], keys[1], strengths[1], keys[3, 0], strengths[3, 0]):
        assert (gradient == 0).all()
    assert keys[2, 1].isfinite().all() and keys[2, 0].isnan().all()


def test_strides_are_honoured() -> None:
    values = cases.make(slots=9, word=5)
    expected = kernels.content_addressing(*values.values())
    memory = values["memory"]
    for other in (memory.mT.contiguous().mT, memory.transpose(0, 1).contiguous().transpose(0, 1)):
        assert torch.equal(kernels.content_addressing(*(values | {"memory": other}).values()), expected)
