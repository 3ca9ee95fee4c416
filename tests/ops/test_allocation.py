import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import allocation as reference
from tests.cases import allocation as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.suite import OpSuite, native

EPS = 1e-6


class TestAllocation(OpSuite):
    op = staticmethod(fastmem.allocation)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("usage", "gates")
    strided = "usage"


BACKENDS = ["reference", pytest.param("cpp", marks=native)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_sum_to_what_the_usages_leave(backend):
    usage = cases.make(3, 9, dtype=torch.float64)["usage"]
    weights = fastmem.allocation(usage, backend=backend)
    assert weights.shape == (3, 1, 9) and (weights >= 0).all()
    assert_close(weights.sum(-1), 1 - (EPS + (1 - EPS) * usage).prod(-1, keepdim=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_less_used_slots_get_more(backend):
    usage = cases.make(3, 30, dtype=torch.float64)["usage"]
    weights = fastmem.allocation(usage, backend=backend)[:, 0]
    assert (weights.gather(-1, usage.argsort(-1)).diff() < 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_full_and_empty_memories(backend):
    full, empty = torch.ones(2, 5, dtype=torch.float64), torch.zeros(2, 5, dtype=torch.float64)
    assert_close(fastmem.allocation(full, backend=backend), torch.zeros(2, 1, 5, dtype=torch.float64), 1e-15)
    ranks = torch.arange(5, dtype=torch.float64)
    assert_close(fastmem.allocation(empty, backend=backend)[0, 0], (1 - EPS) * EPS**ranks, 1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("slots", [6, 24, 25, 300, 512, 513, 600])
def test_equal_usages_go_by_slot_and_nan_comes_last(backend, slots):
    check_equal_usages(backend, slots)


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("slots", [128, 129, 512, 513])  # the most that are compared with each other, and one more
def test_equal_usages_on_every_instruction_set(isa, slots):
    with instruction_set(isa):
        check_equal_usages("cpp", slots)


def check_equal_usages(backend, slots):
    usage = torch.zeros(1, slots, dtype=torch.float64)
    usage[0, 1::3], usage[0, 2::3] = 0.5, -0.0
    usage[0, 3] = torch.nan
    expected = torch.full_like(usage, torch.nan)
    earlier: torch.Tensor | float = 1.0
    for slot in sorted((slot for slot in range(slots) if slot != 3), key=lambda slot: (abs(usage[0, slot]), slot)):
        used = EPS + (1 - EPS) * usage[0, slot]
        expected[0, slot] = (1 - used) * earlier
        earlier *= used
    assert_close(fastmem.allocation(usage, backend=backend)[:, 0], expected, 1e-15)


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("slots", [9, 40])
def test_heads_on_tied_usages_equal_the_reference(isa, slots):
    suite = TestAllocation()
    values = cases.make(4, slots, 3, levels=3, dtype=torch.float64)
    with instruction_set(isa):
        suite.agree(suite.run(values, "cpp"), suite.oracle(values), values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_later_head_sees_what_the_earlier_ones_leave(backend):
    usage = cases.make(2, 9, dtype=torch.float64)["usage"]
    closed, opened = torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    first, second = fastmem.allocation(usage, closed, backend=backend).unbind(1)
    assert torch.equal(first, second)
    first, second = fastmem.allocation(usage, opened, backend=backend).unbind(1)
    expected = fastmem.allocation(usage + (1 - usage) * first, backend=backend)[:, 0]
    assert_close(second, expected)
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_last_gate_has_no_effect(backend):
    suite, values = TestAllocation(), cases.make(dtype=torch.float64)
    changed = {**values, "gates": values["gates"].clone()}
    changed["gates"][:, -1] = torch.nan
    (weights, gradients), (expected, _) = suite.run(changed, backend), suite.run(values, backend)
    assert torch.equal(weights[0], expected[0])
    assert gradients[0].isfinite().all() and not gradients[1][:, -1].any()


def test_slot_permutation_permutes_the_weights():
    values = cases.make(2, 17, dtype=torch.float64)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    permuted = {**values, "usage": values["usage"][:, order]}
    assert_close(fastmem.allocation(**permuted), fastmem.allocation(**values)[..., order])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_nearly_free_slots_keeps_its_digits(backend):
    """Later terms taken as the total less the earlier ones, then divided by the usage, are off by 2e-2 here."""
    suite, values = TestAllocation(), cases.make(4, 64, gated=False)
    values["usage"][:, ::2] = 0
    exact = suite.run({**values, "usage": values["usage"].double()}, "reference")
    (_, actual), (_, expected) = suite.run(values, backend), exact
    assert_close(actual[0].double(), expected[0], 1e-6)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 70), write_heads=st.integers(0, 4), gated=st.booleans(),
    isa=st.sampled_from(isas() or ["none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, write_heads, gated, isa, seed):
    suite = TestAllocation()
    values = cases.make(batch, slots, write_heads, gated, dtype=torch.float64, seed=seed)
    expected = suite.oracle(values)
    suite.agree(suite.run(values, "reference"), expected, values)
    if isa != "none":
        with instruction_set(isa):
            suite.agree(suite.run(values, "cpp"), expected, values)
