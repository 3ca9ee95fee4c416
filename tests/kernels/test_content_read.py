import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import content_read as kernels

from fastmem.reference import content_read as reference
from tests.cases import content_read as cases
from tests.helpers import assert_close, converted, cotangents
from tests.kernels.suite import check, check_output_mask

# Special scores divide by zero on purpose, and the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("content_read", kernels, reference, cases, case, 1, slice(0, 2), 4)


def test_a_shared_bank_with_a_mask_for_each_sample() -> None:
    """Such samples cannot be treated as heads of one sample."""
    values = cases.make(shared=True, batch=3, slots=33, heads=2)
    values["slot_mask"] = torch.rand(3, 33, generator=torch.Generator().manual_seed(0)) < 0.5
    inputs = list(values.values())
    outputs = kernels.content_read(*inputs)
    expected = reference.content_read(*converted(inputs, torch.float64))
    upstream = cotangents(outputs[:1])
    actual = kernels.content_read_backward(*[*upstream, *outputs, *inputs, [True] * 4])
    exact = reference.content_read_backward(
        *[*converted(upstream, torch.float64), *expected, *converted(inputs, torch.float64), [True] * 4]
    )
    for a, e in zip((*outputs, *actual), (*expected, *exact), strict=True):
        assert_close(a.double(), e, 3e-5 if a is actual[0] else 1e-6)
    check_output_mask(kernels.content_read_backward, [*upstream, *outputs, *inputs], 4)


def test_splits_only_change_the_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = list(cases.make(batch=1, slots=70, heads=2).values())
    split = kernels.content_read(*inputs)
    arguments = [cotangents(split[:1])[0], *split, *inputs, [True] * 4]
    expected = kernels.content_read_backward(*arguments)
    monkeypatch.setattr(kernels, "MOST_PROGRAMS", 1)
    for actual, wanted in zip(kernels.content_read(*inputs), split, strict=True):
        assert_close(actual, wanted, 1e-6)
    for actual, wanted in zip(kernels.content_read_backward(*arguments), expected, strict=True):
        assert_close(actual, wanted, 1e-6)


def test_no_finite_score_reads_zero() -> None:
    values = cases.make(batch=2, slots=5, slot_mask=True)
    values["memory"][0] = float("nan")
    inputs = list(values.values())
    reads, logsumexp = kernels.content_read(*inputs)
    assert (reads[0] == 0).all() and (logsumexp[0] == -float("inf")).all() and reads[1].isfinite().all()
    gradients = kernels.content_read_backward(*[torch.ones_like(reads), reads, logsumexp, *inputs, [True] * 4])
    for gradient in gradients[:3]:
        assert (gradient[0] == 0).all() and gradient.isfinite().all()


def test_infinite_scores_are_nan_in_their_row_alone() -> None:
    values = cases.make(batch=1, slots=5, heads=2)
    values["memory"] = values["memory"].abs() + 0.1
    values["keys"] = values["memory"][:, :2].clone()
    values["strengths"][0, 0] = float("inf")
    reads, logsumexp = kernels.content_read(*values.values())
    assert reads[0, 0].isnan().all() and logsumexp[0, 0].isnan()
    assert reads[0, 1].isfinite().all() and logsumexp[0, 1].isfinite()
