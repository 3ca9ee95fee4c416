import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmem
from fastmem.reference import sharpen as reference
from tests.cases import sharpen as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.suite import OpSuite, native

FORMS = {False: "softmax", True: "power"}


def sharpen(
    weights: Tensor, sharpness: Tensor, in_powers: bool, eps: float, *, backend: str | None = None
) -> Tensor:  # fmt: skip
    """The public function by the op's own arguments."""
    return fastmem.sharpen(weights, sharpness, FORMS[in_powers], eps, backend=backend)


class TestSharpen(OpSuite):
    op = staticmethod(sharpen)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("weights", "sharpness")
    strided = "weights"

    def public(self, values):
        return [values["weights"], values["sharpness"], FORMS[values["in_powers"]], values["eps"]]


@pytest.mark.parametrize("form", FORMS.values())
def test_the_result_is_a_distribution_in_the_order_of_the_weights(form):
    made = cases.make(3, 65, 4, dtype=torch.float64)
    weights = fastmem.sharpen(made["weights"], made["sharpness"], form, 1e-100)
    assert_close(weights.sum(-1), torch.ones(3, 4, dtype=torch.float64))
    assert (weights >= 0).all() and torch.equal(weights.argsort(-1), made["weights"].argsort(-1))


@pytest.mark.parametrize("form", FORMS.values())
def test_a_higher_power_is_sharper_and_the_powers_one_and_zero_are_known(form):
    made = cases.make(3, 17, 4, dtype=torch.float64)
    weights, like = made["weights"], made["sharpness"]
    raised = [fastmem.sharpen(weights, torch.full_like(like, power), form, 1e-100) for power in (0, 0.5, 1, 2, 8)]
    for blunter, sharper in itertools.pairwise(raised):
        assert (sharper.amax(-1) > blunter.amax(-1)).all()
    assert_close(raised[0], torch.full_like(weights, 1 / 17))
    assert_close(raised[2], weights / weights.sum(-1, True))


@pytest.mark.parametrize("form", FORMS.values())
def test_scale_does_not_matter_but_for_eps(form):
    made = cases.make(2, 17, 3, dtype=torch.float64)
    weights, sharpness = made["weights"], made["sharpness"].clamp(max=3)
    expected = fastmem.sharpen(weights, sharpness, form, 1e-100)
    assert_close(fastmem.sharpen(7 * weights, sharpness, form, 1e-100), expected)


@pytest.mark.parametrize("form", FORMS.values())
def test_slot_permutation_permutes_the_results(form):
    made = cases.make(2, 37, 3, dtype=torch.float64)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0))
    expected = fastmem.sharpen(made["weights"], made["sharpness"], form)[..., order]
    assert_close(fastmem.sharpen(made["weights"][..., order], made["sharpness"], form), expected)


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("in_powers", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_zero_and_one(isa, in_powers, dtype):
    """Zeros among others, one-hot weights, and nothing but zeros; sharpness exactly 1 too."""
    values = cases.make(3, 9, 4, in_powers, dtype=dtype)
    values["weights"][0, :, ::2] = 0
    values["weights"][1] = torch.nn.functional.one_hot(torch.arange(4), 9).to(dtype)
    values["weights"][2] = 0
    values["sharpness"][:, 0] = 1
    suite = TestSharpen()
    with instruction_set(isa):
        actual = suite.run(values, "cpp")
    expected = suite.oracle({k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()})
    assert actual[0][0].isfinite().all() and all(gradient.isfinite().all() for gradient in actual[1])
    if in_powers:
        assert torch.equal(actual[0][0][1], values["weights"][1]) and not actual[0][0][2].any()
    else:
        assert_close(actual[0][0][2].double(), torch.full((4, 9), 1 / 9, dtype=torch.float64), 1e-7)
    doubled = ((actual[0][0].double(),), [gradient.double() for gradient in actual[1]])
    # A slope of sharpness / eps carries the rounding of weight + eps.
    suite.agree(doubled, expected, values, 1e-12 if dtype == torch.float64 else 1e-5)


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("in_powers", FORMS)
def test_special_values_stay_in_their_head(isa, in_powers):
    values = cases.make(2, 19, 4, in_powers)
    with instruction_set(isa):
        clean = sharpen(**values, backend="cpp")
    values["weights"][0, 0, 18] = float("nan")
    values["weights"][0, 1, 3] = float("inf")
    values["weights"][0, 2, 4] = -1.0
    values["sharpness"][1, 0] = float("nan")
    poisoned = torch.tensor([[True, True, True, False], [True, False, False, False]])
    with instruction_set(isa):
        weights = sharpen(**values, backend="cpp")
    assert weights[poisoned].isnan().all() and torch.equal(weights[~poisoned], clean[~poisoned])


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_powers_that_vanish_against_eps_leave_nothing(isa, dtype):
    """eps over the peak's power is past the largest number there is."""
    for weight, sharpness in ((1e-30, 1.5), (1e-20, 80.0), (1e-6, 121.0)):
        weights = torch.full((1, 1, 9), weight, dtype=dtype)
        with instruction_set(isa):
            actual = fastmem.sharpen(weights, torch.full((1, 1), sharpness, dtype=dtype), "power", backend="cpp")
        assert (actual >= 0).all() and (actual <= 1e-20).all(), (weight, sharpness)


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("form", FORMS.values())
def test_a_huge_sharpness_leaves_the_peak(isa, form):
    weights = torch.softmax(torch.linspace(-1, 1.7, 7), 0).view(1, 1, 7)
    with instruction_set(isa):
        actual = fastmem.sharpen(weights, torch.full((1, 1), 1e10), form, 1e-30, backend="cpp")
    peak = [0, 0, 0, 0, 0, 0, 1 if form == "softmax" else 0]  # in powers eps outweighs what is left of the peak
    assert actual.flatten().tolist() == peak


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize(("slots", "total", "sharpness"), [(128, 0.13, 9.0), (1000, 1.0, 12.0), (24, 1.0, 25.0)])
def test_powers_of_which_eps_is_a_part_are_exact(isa, slots, total, sharpness):
    weights = total * torch.softmax(torch.randn(1, 1, slots, generator=torch.Generator().manual_seed(0)), -1)
    eps = float((weights.double() ** sharpness).sum())  # as much as the powers
    power = torch.full((1, 1), sharpness)
    with instruction_set(isa):
        actual = fastmem.sharpen(weights, power, "power", eps, backend="cpp")
    expected = reference.sharpen(weights.double(), power.double(), True, eps)
    assert_close(actual.double().sum(), expected.sum(), 4e-7)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=native)])
def test_to_the_power_of_zero(backend):
    """All are 1 then, those of 0 too, which do not change with the power; autograd of plain PyTorch agrees."""
    values = {"weights": torch.tensor([[[0.0, 0.5, 0.5]]]).double(), "sharpness": torch.zeros(1, 1).double()}
    suite, options = TestSharpen(), {"in_powers": True, "eps": 1e-9}
    expected = suite.oracle({**values, **options})
    suite.agree(suite.run({**values, **options}, backend), expected, values)
    assert all(gradient.isfinite().all() for gradient in expected[1])


def test_links_that_hold_nothing_become_uniform():
    assert_close(fastmem.sharpen(torch.zeros(1, 1, 8), torch.full((1, 1), 5.0)), torch.full((1, 1, 8), 0.125))


def test_form_and_eps_are_checked():
    weights, sharpness, _, _ = cases.make().values()
    with pytest.raises(ValueError, match="form: expected one of softmax, power, got 'log'"):
        fastmem.sharpen(weights, sharpness, "log")
    for eps in (0, -1.0, float("inf"), float("nan"), "x"):
        with pytest.raises(ValueError, match="eps: expected a finite number above 0, got"):
            fastmem.sharpen(weights, sharpness, eps=eps)
    with pytest.raises(ValueError, match="eps: expected a finite number above 0, got 0"):
        torch.ops.fastmem.sharpen(weights, sharpness, False, 0.0)
    for in_powers, form in FORMS.items():
        expected = fastmem.sharpen(weights, sharpness, form, cases.EPS[in_powers])
        assert torch.equal(fastmem.sharpen(weights, sharpness, form), expected)


def test_explain_takes_the_arguments_of_the_public_function():
    weights, sharpness, _, _ = cases.make().values()
    assert fastmem.explain("sharpen", weights, sharpness, "power") == fastmem.explain(
        fastmem.sharpen, weights, sharpness
    )
    with pytest.raises(ValueError, match="form: expected one of"):
        fastmem.explain(fastmem.sharpen, weights, sharpness, "log")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 140), heads=st.integers(0, 9), in_powers=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, heads, in_powers, seed):
    suite = TestSharpen()
    values = cases.make(batch, slots, heads, in_powers, dtype=torch.float64, seed=seed)
    suite.agree(suite.run(values), suite.oracle(values), values)
