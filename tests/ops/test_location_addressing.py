import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmem
from fastmem.reference import location_addressing as reference
from tests.cases import location_addressing as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.suite import OpSuite, native
from tests.ops.test_sharpen import FORMS


def location_addressing(
    content: Tensor,
    previous: Tensor,
    gate: Tensor,
    shift: Tensor,
    sharpness: Tensor,
    reversed_shift: bool,
    in_powers: bool,
    eps: float,
    *,
    backend: str | None = None,
) -> Tensor:
    """The public function by the op's own arguments."""
    return fastmem.location_addressing(
        content, previous, gate, shift, sharpness, reversed_shift, FORMS[in_powers], eps, backend=backend
    )


class TestLocationAddressing(OpSuite):
    op = staticmethod(location_addressing)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("content", "previous", "gate", "shift", "sharpness")
    strided = "content"

    def public(self, values):
        *others, in_powers, eps = values.values()
        return [*others, FORMS[in_powers], eps]


def one_hot(slot, slots, *shape):
    return torch.nn.functional.one_hot(torch.full(shape, slot), slots).double()


def tensors(*arguments, **keywords):
    """The five tensors, in double precision."""
    return [v for v in cases.make(*arguments, **keywords, dtype=torch.float64).values() if isinstance(v, Tensor)]


@pytest.mark.parametrize("form", FORMS.values())
def test_the_result_is_a_distribution(form):
    weights = fastmem.location_addressing(*tensors(3, 65, 4), False, form, 1e-100)
    assert (weights >= 0).all()
    assert_close(weights.sum(-1), torch.ones(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("form", FORMS.values())
@pytest.mark.parametrize(("reversed_shift", "moves"), [(False, (-2, -1, 0, 1, 2)), (True, (2, 1, 0, -1, -2))])
def test_each_tap_moves_a_sharp_focus_by_its_step(reversed_shift, moves, form):
    """Gate 0 keeps the previous focus; the taps lead from -S to S, or back where reversed; the slots are a ring."""
    content, _, gate, _, sharpness = tensors(1, 9, 1)
    for tap, move in enumerate(moves):
        shift = one_hot(tap, 5, 1, 1)
        for slot in (0, 4, 8):
            previous = one_hot(slot, 9, 1, 1)
            weights = fastmem.location_addressing(
                content, previous, 0 * gate, shift, sharpness, reversed_shift, form, 1e-100
            )
            assert_close(weights, one_hot((slot + move) % 9, 9, 1, 1))


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("form", FORMS.values())
def test_gates_of_zero_and_one_take_one_source(backend, form):
    content, previous, gate, shift, sharpness = tensors(2, 17, 3)
    for value, source in ((0.0, previous), (1.0, content)):
        weights, gradients = [], []
        for others in (content, previous), (source, source):
            leaf = torch.full_like(gate, value).requires_grad_()
            leaves = [other.clone().requires_grad_() for other in others]
            weights.append(fastmem.location_addressing(*leaves, leaf, shift, sharpness, False, form, backend=backend))
            gradients.append(torch.autograd.grad(weights[-1].square().sum(), [*leaves, leaf]))
        assert_close(*weights)
        by_content, by_previous, by_gate = gradients[0]
        assert not (by_previous if value else by_content).any(), "what the gate shuts out gets no gradient"
        assert by_gate.all(), "yet the gate may open again"
        assert_close(by_content if value else by_previous, gradients[1][0] + gradients[1][1])


def test_without_reach_and_gate_it_is_sharpening():
    content, previous, gate, shift, sharpness = tensors(2, 17, 3, 0)
    for form in FORMS.values():
        actual = fastmem.location_addressing(content, previous, gate**0, shift**0, sharpness, False, form)
        assert_close(actual, fastmem.sharpen(content, sharpness, form))


def test_a_reversed_shift_is_the_shift_reversed():
    *others, shift, sharpness = tensors(2, 17, 3, 2)
    assert_close(
        fastmem.location_addressing(*others, shift, sharpness, True),
        fastmem.location_addressing(*others, shift.flip(-1), sharpness),
    )


def test_rotation_of_the_slots_rotates_the_result():
    content, previous, *others = tensors(2, 17, 3, 2)
    expected = fastmem.location_addressing(content, previous, *others).roll(5, -1)
    assert_close(fastmem.location_addressing(content.roll(5, -1), previous.roll(5, -1), *others), expected)


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("in_powers", FORMS)
def test_special_values_stay_in_their_head(isa, in_powers):
    for name in TestLocationAddressing.batched:
        values = cases.make(2, 19, 4, in_powers=in_powers)
        with instruction_set(isa):
            clean = location_addressing(**values, backend="cpp")
            values[name][0, 1].fill_(float("nan"))
            values[name][1, 2].fill_(float("inf"))
            weights = location_addressing(**values, backend="cpp")
        poisoned = torch.zeros(2, 4, dtype=torch.bool)
        poisoned[0, 1] = poisoned[1, 2] = True
        assert weights[poisoned].isnan().all(), name
        assert torch.equal(weights[~poisoned], clean[~poisoned]), name


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("in_powers", FORMS)
@pytest.mark.parametrize("reversed_shift", [False, True])
def test_sharp_inputs(isa, in_powers, reversed_shift):
    """One-hot weights, gates of 0 and 1 and a sharpness of 1: most shifted weights are exactly 0."""
    values = cases.make(2, 9, 4, 1, reversed_shift, in_powers, dtype=torch.float64)
    values["content"][0] = one_hot(8, 9, 4)
    values["previous"][:] = one_hot(0, 9, 2, 4)
    values["gate"][:] = torch.tensor([0.0, 1.0, 0.0, 1.0])
    values["sharpness"][:, :2] = 1
    suite = TestLocationAddressing()
    with instruction_set(isa):
        suite.agree(suite.run(values, "cpp"), suite.oracle(values), values)
    suite.agree(suite.run(values, "reference"), suite.oracle(values), values)


def test_options_are_checked():
    values = [v for v in cases.make().values() if isinstance(v, Tensor)]
    with pytest.raises(ValueError, match="form: expected one of softmax, power, got 'log'"):
        fastmem.location_addressing(*values, form="log")
    with pytest.raises(ValueError, match="eps: expected a finite number above 0, got 0"):
        fastmem.location_addressing(*values, eps=0)
    with pytest.raises(ValueError, match=r"shift: expected shape .* odd number T of taps, got T=2"):
        fastmem.location_addressing(*values[:3], values[3][..., :2], values[4])
    for in_powers, form in FORMS.items():
        expected = location_addressing(*values, False, in_powers, cases.EPS[in_powers])
        assert torch.equal(fastmem.location_addressing(*values, form=form), expected)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 140), heads=st.integers(0, 9), reach=st.integers(0, 4),
    reversed_shift=st.booleans(), in_powers=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, heads, reach, reversed_shift, in_powers, seed):
    suite = TestLocationAddressing()
    values = cases.make(batch, slots, heads, reach, reversed_shift, in_powers, dtype=torch.float64, seed=seed)
    suite.agree(suite.run(values), suite.oracle(values), values)
