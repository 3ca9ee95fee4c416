import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import content_read as reference
from tests.cases import content_read as cases
from tests.cases.content_addressing import DEFAULT_EPS
from tests.helpers import assert_close, threads
from tests.ops.content import ContentSuite

NAN = float("nan")


class TestContentRead(ContentSuite):
    op = staticmethod(fastmem.content_read)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("memory", "keys", "strengths")
    autocast_keeps = ("memory",)
    strided = "memory"

    def inputs(self, case, dtype=torch.float64, **overrides):
        low = "bank_dtype" in cases.CASES[case]
        return super().inputs(case, torch.float32 if low else dtype, **overrides)

    def agree(self, actual, expected, values, bound=1e-12):
        super().agree(actual, expected, values, bound if values["memory"].itemsize > 2 else 1e-2)


def test_equals_addressing_and_a_product():
    values = cases.make(batch=3, slots=200, word=20, heads=6, key_mask=True, slot_mask=True, dtype=torch.float64)
    reads, logsumexp = fastmem.content_read(**values)
    weights = fastmem.content_addressing(**values)
    assert_close(reads, weights @ values["memory"])
    assert (logsumexp[0] == -float("inf")).all() and not reads[0].any()
    assert not logsumexp.requires_grad


@pytest.mark.parametrize("shared", [False, True])
def test_chunks_give_the_whole_with_any_number_of_threads(shared):
    """Long enough for many chunks; the results must not depend on who reads which."""
    suite = TestContentRead()
    values = cases.make(shared=shared, batch=3, slots=5000, word=40, heads=7, slot_mask=True, dtype=torch.float64)
    with threads(1):
        one = suite.run(values)
    with threads(2):
        two = suite.run(values)
    for a, b in zip(one[0] + tuple(one[1]), two[0] + tuple(two[1]), strict=True):
        assert torch.equal(a, b)
    suite.agree(one, suite.oracle(values), values)


def test_a_shared_bank_equals_its_copies():
    suite = TestContentRead()
    values = cases.make(shared=True, batch=4, slots=300, word=20, heads=3, dtype=torch.float64)
    copies = {**values, "memory": values["memory"].expand(4, -1, -1)}
    (outputs, gradients), (expected, expected_gradients) = suite.run(values), suite.run(copies)
    expected_gradients[0] = expected_gradients[0].sum(0, keepdim=True)
    suite.agree((outputs, gradients), (expected, expected_gradients), values)


@pytest.mark.parametrize("mask_batch", [1, 3])
def test_a_shared_bank_under_slot_masks_of_its_own_or_one_for_all(mask_batch):
    suite = TestContentRead()
    values = cases.make(shared=True, batch=3, slots=2000, word=20, heads=3, dtype=torch.float64)
    values["slot_mask"] = torch.rand(mask_batch, 2000, generator=torch.Generator().manual_seed(0)) < 0.7
    suite.agree(suite.run(values), suite.oracle(values), values)
    poisoned = values["memory"].clone()
    poisoned[:, ~values["slot_mask"].any(0)] = NAN
    suite.agree(suite.run({**values, "memory": poisoned}), suite.run(values), values)


def test_slot_permutation_changes_nothing():
    values = cases.make(batch=2, slots=150, word=12, heads=4, dtype=torch.float64)
    shuffled = {**values, "memory": values["memory"][:, torch.randperm(150)]}
    for a, e in zip(fastmem.content_read(**shuffled), fastmem.content_read(**values), strict=True):
        assert_close(a, e)


def test_infinite_scores_and_nan_stay_in_their_row():
    values = cases.make(batch=2, slots=300, word=8, heads=4, dtype=torch.float64)
    values["memory"], values["keys"] = values["memory"].abs() + 0.1, values["keys"].abs() + 0.1
    clean = fastmem.content_read(**values)
    values["strengths"] = values["strengths"].clone()
    values["strengths"][0, :3] = torch.tensor([float("inf"), -float("inf"), NAN])
    (reads, logsumexp), (_, grad_keys, _) = TestContentRead().run(values)
    assert reads[0, 0].isnan().all() and reads[0, 2].isnan().all() and logsumexp[0, [0, 2]].isnan().all()
    assert not reads[0, 1].any() and logsumexp[0, 1] == -float("inf") and not grad_keys[0, 1].any()
    assert_close(reads[1], clean[0][1])
    assert_close(reads[0, 3], clean[0][0, 3])
    assert grad_keys[1].isfinite().all() and grad_keys[0, 3].isfinite().all()


def test_vmap_keeps_a_shared_bank_shared():
    values = [cases.make(shared=True, batch=3, slots=33, word=20, dtype=torch.float64, seed=seed) for seed in (0, 1)]
    memory, keys, strengths = (torch.stack([one[name] for one in values]) for name in ("memory", "keys", "strengths"))
    rest = (None, None, "inner", 1e-6)
    shared = torch.vmap(fastmem.content_read, (None, 0, 0, None, None, None, None))(memory[0], keys, strengths, *rest)
    own = torch.vmap(fastmem.content_read, (0, 0, 0, None, None, None, None))(memory, keys, strengths, *rest)
    for i in range(2):
        for outputs, bank in ((shared, memory[0]), (own, memory[i])):
            for a, e in zip(outputs, fastmem.content_read(bank, keys[i], strengths[i], *rest), strict=True):
                assert_close(a[i], e)


def test_wrong_banks_are_named():
    values = cases.make(batch=3)
    with pytest.raises(ValueError, match="memory: expected a first size of 1 or 3, got 2"):
        fastmem.content_read(**{**values, "memory": values["memory"][:2]})
    with pytest.raises(TypeError, match=r"keys: expected dtype torch\.float32, got torch\.float64"):
        fastmem.content_read(**{**cases.make(dtype=torch.float64), "memory": cases.make()["memory"].bfloat16()})
    with pytest.raises(fastmem.BackendUnavailable, match=r"cpp.*float32 and float64, got torch\.bfloat16"):
        fastmem.content_read(**{**cases.make(), "memory": cases.make()["memory"].bfloat16()}, backend="cpp")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 140), word=st.integers(0, 70), heads=st.integers(0, 12),
    key_mask=st.booleans(), slot_mask=st.booleans(), shared=st.booleans(), norm=st.sampled_from(list(DEFAULT_EPS)),
)  # fmt: skip
def test_any_sizes(batch, slots, word, heads, key_mask, slot_mask, shared, norm):
    suite = TestContentRead()
    values = cases.make(shared, None, batch, slots=slots, word=word, heads=heads, key_mask=key_mask,
                        slot_mask=slot_mask, norm=norm, dtype=torch.float64)  # fmt: skip
    suite.agree(suite.run(values), suite.oracle(values), values, 1e-11)
