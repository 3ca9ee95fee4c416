import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import sharpen as kernels

from fastmem.reference import sharpen as reference
from tests.cases import sharpen as cases
from tests.helpers import assert_close, cotangents
from tests.kernels.suite import check, check_output_mask

# The logarithm of a zero weight is -inf on purpose, and 0 times that discarded; the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("sharpen", kernels, reference, cases, case, 1, slice(0, 1), 2)


@pytest.mark.parametrize("in_powers", [False, True])
@pytest.mark.parametrize("block", [8, 512])
def test_float64_in_one_tile_and_in_several(in_powers: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCK", block)
    weights, sharpness, *form = cases.make(slots=21, in_powers=in_powers, dtype=torch.float64).values()
    weights[0, 0, :7] = 0
    sharpness[0] = torch.tensor([1.0, 2.0, 0.0, 50.0])
    new_weights = kernels.sharpen(weights, sharpness, *form)
    assert_close(new_weights, reference.sharpen(weights, sharpness, *form))
    arguments = [*cotangents([new_weights]), new_weights, weights, sharpness, *form]
    actual = kernels.sharpen_backward(*arguments, [True] * 2)
    for a, e in zip(actual, reference.sharpen_backward(*arguments, [True] * 2), strict=True):
        assert_close(a, e)
    check_output_mask(kernels.sharpen_backward, arguments, 2)


@pytest.mark.parametrize("in_powers", [False, True])
def test_nothing_but_zeros(in_powers: bool) -> None:
    weights, sharpness, *form = cases.make(slots=5, in_powers=in_powers, dtype=torch.float64).values()
    weights.zero_()
    new_weights = kernels.sharpen(weights, sharpness, *form)
    assert torch.equal(new_weights, torch.full_like(weights, 0.0 if in_powers else 0.2))
    arguments = [*cotangents([new_weights]), new_weights, weights, sharpness, *form]
    actual = kernels.sharpen_backward(*arguments, [True] * 2)
    for a, e in zip(actual, reference.sharpen_backward(*arguments, [True] * 2), strict=True):
        assert_close(a, e)


def test_the_share_of_eps_is_exact_where_it_is_large() -> None:
    """Weights so small, raised so high, that eps outweighs their sum."""
    weights, sharpness, *form = cases.make(slots=5, in_powers=True).values()
    weights, sharpness = 0.03 + 0.001 * weights, torch.full_like(sharpness, 12.0)
    exact = reference.sharpen(weights.double(), sharpness.double(), *form)
    assert exact.sum(-1).max() < 0.1
    relative = kernels.sharpen(weights, sharpness, *form).double() / exact
    assert_close(relative, torch.ones_like(relative), 1e-6)


def test_the_powers_zero_and_infinity() -> None:
    weights = torch.tensor([[[0.5, 0.25, 0.0], [1.0, 0.0, 0.0], [0.3, 0.3, 0.3], [0.0, 0.0, 0.0]]])
    for power in (0.0, float("inf")):
        sharpness = torch.full((1, 4), power)
        new_weights = kernels.sharpen(weights, sharpness, True, 1e-16)
        assert torch.equal(new_weights, reference.sharpen(weights, sharpness, True, 1e-16))


def test_the_power_zero_has_the_gradient_of_the_plain_formula() -> None:
    """To it a zero weight is a constant: its logarithm counts as 0."""
    weights = torch.tensor([[[0.5, 0.25, 0.0]]], dtype=torch.float64)
    sharpness = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    logs = torch.where(weights > 0, weights, 1.0).log()
    powers = (sharpness.unsqueeze(-1) * logs).exp()
    new_weights = powers / (powers.sum(-1, keepdim=True) + 1e-16)
    (upstream,) = cotangents([new_weights])
    (expected,) = torch.autograd.grad(new_weights, sharpness, upstream)
    arguments = upstream, new_weights.detach(), weights, sharpness.detach(), True, 1e-16
    grad_weights, grad_sharpness = kernels.sharpen_backward(*arguments, [True] * 2)
    assert not grad_weights.any()
    assert_close(grad_sharpness, expected)


def test_strides_are_honoured() -> None:
    weights, sharpness, *form = cases.make(slots=5).values()
    strided = weights.transpose(0, 2).clone().transpose(0, 2), sharpness.T.clone().T
    assert torch.equal(kernels.sharpen(*strided, *form), kernels.sharpen(weights, sharpness, *form))


@pytest.mark.parametrize("in_powers", [False, True])
def test_nan_stays_in_its_head(in_powers: bool) -> None:
    weights, sharpness, *form = cases.make(slots=5, in_powers=in_powers).values()
    clean = kernels.sharpen(weights, sharpness, *form)
    weights[1, 2, 3] = sharpness[0, 1] = float("nan")
    expected = clean.clone()
    expected[1, 2] = expected[0, 1] = float("nan")
    assert torch.equal(kernels.sharpen(weights, sharpness, *form).nan_to_num(-1), expected.nan_to_num(-1))
