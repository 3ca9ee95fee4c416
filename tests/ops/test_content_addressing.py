from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import content_addressing as reference
from tests.cases import content_addressing as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.content import ContentSuite
from tests.ops.suite import native

INFINITY, NAN = float("inf"), float("nan")


class TestContentAddressing(ContentSuite):
    op = staticmethod(fastmem.content_addressing)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("memory", "keys", "strengths")
    strided = "memory"


def test_weights_are_a_distribution_over_the_slots_that_take_part():
    values = cases.make(3, 65, 20, 5, slot_mask=True, dtype=torch.float64)
    weights = fastmem.content_addressing(**values)
    shown = values["slot_mask"].unsqueeze(1).expand_as(weights)
    assert (weights >= 0).all() and not weights[~shown].any()
    assert not weights[0].any(), "a sample without slots has weights 0"
    assert_close(weights[1:].sum(-1), torch.ones(2, 5, dtype=torch.float64))


def test_a_copy_of_a_row_is_found_and_its_scale_does_not_matter():
    values = cases.make(2, 40, 16, 3)
    values["keys"] = 5 * values["memory"][:, 7:10]
    values["strengths"] = torch.full((2, 3), 200.0)
    weights = fastmem.content_addressing(**values)
    assert (weights.argmax(-1) == torch.tensor([7, 8, 9])).all() and (weights.amax(-1) > 0.99).all()


def test_slot_and_batch_permutation_permute_the_weights():
    values = cases.make(3, 37, 12, 4, key_mask=True, slot_mask=True, dtype=torch.float64)
    weights = fastmem.content_addressing(**values)
    order, samples = torch.randperm(37), torch.tensor([2, 0, 1])
    slots = {**values, "memory": values["memory"][:, order], "slot_mask": values["slot_mask"][:, order]}
    assert_close(fastmem.content_addressing(**slots), weights[..., order])
    batch: dict[str, Any] = {k: v[samples] if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    assert torch.equal(fastmem.content_addressing(**batch), weights[samples])


@native
@pytest.mark.parametrize("isa", isas())
def test_infinite_scores_and_nan_stay_in_their_row(isa):
    values = cases.make(2, 20, 8, 4, dtype=torch.float64)
    values["memory"] = values["memory"].abs() + 0.1
    values["keys"] = values["keys"].abs() + 0.1  # every cosine is positive
    clean = fastmem.content_addressing(**values, backend="reference")
    values["strengths"] = values["strengths"].clone()
    values["strengths"][0, :3] = torch.tensor([INFINITY, -INFINITY, NAN])
    with instruction_set(isa):
        weights, (grad_memory, grad_keys, grad_strengths) = TestContentAddressing().run(values, "cpp")
    assert weights[0][0, 0].isnan().all() and weights[0][0, 2].isnan().all()
    assert not weights[0][0, 1].any() and not grad_keys[0, 1].any() and grad_strengths[0, 1] == 0
    assert grad_memory[0].isnan().all() and not grad_memory[1].isnan().any()
    for b, a in ((0, 3), (1, 0), (1, 1), (1, 2), (1, 3)):
        assert_close(weights[0][b, a], clean[b, a])
        assert grad_keys[b, a].isfinite().all()


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("key_mask", [False, True])
@pytest.mark.parametrize("norm", cases.DEFAULT_EPS)
def test_zero_rows_and_keys(norm, key_mask, isa):
    """The gradient there is finite and that of the table in the reference."""
    values = cases.make(2, 9, 5, 3, key_mask=key_mask, norm=norm, dtype=torch.float64)
    values["memory"][:, 2:5] = 0
    values["keys"][:, 1] = 0
    suite = TestContentAddressing()
    with instruction_set(isa):
        results = suite.run(values, "cpp")
    assert all(gradient.isfinite().all() for gradient in results[1])
    suite.agree(results, suite.oracle(values), values)


@native
@pytest.mark.parametrize("isa", isas())
def test_hidden_slots_may_hold_anything(isa):
    values = cases.make(3, 37, 12, 4, key_mask=True, slot_mask=True, dtype=torch.float64)
    suite = TestContentAddressing()
    expected = suite.run(values, "reference")
    hidden = ~values["slot_mask"].unsqueeze(-1)
    for poison in (NAN, INFINITY):
        poisoned = {**values, "memory": values["memory"].masked_fill(hidden, poison)}
        with instruction_set(isa):
            suite.agree(suite.run(poisoned, "cpp"), expected, values)


def test_norm_and_eps_are_checked():
    values = cases.make()
    with pytest.raises(ValueError, match="norm: expected one of inner, outer, rsqrt, clamp, width, got 'l2'"):
        fastmem.content_addressing(**{**values, "norm": "l2"})
    with pytest.raises(ValueError, match="eps: expected a finite number of at least 0, got -1"):
        fastmem.content_addressing(**{**values, "eps": -1.0})
    with pytest.raises(TypeError, match=r"slot_mask: expected dtype torch\.bool"):
        fastmem.content_addressing(**{**values, "slot_mask": torch.ones(2, 16)})
    for norm, eps in cases.DEFAULT_EPS.items():
        explicit = fastmem.content_addressing(**{**values, "norm": norm, "eps": eps})
        assert torch.equal(fastmem.content_addressing(**{**values, "norm": norm, "eps": None}), explicit)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 140), word=st.integers(0, 70), heads=st.integers(0, 12),
    key_mask=st.booleans(), slot_mask=st.booleans(), norm=st.sampled_from(list(cases.DEFAULT_EPS)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, word, heads, key_mask, slot_mask, norm, seed):
    suite = TestContentAddressing()
    values = cases.make(batch, slots, word, heads, key_mask, slot_mask, norm, dtype=torch.float64, seed=seed)
    suite.agree(suite.run(values), suite.oracle(values), values, 1e-11)
