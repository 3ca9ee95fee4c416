import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import usage_update as reference
from tests.cases import usage_update as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.suite import OpSuite, native


class TestUsageUpdate(OpSuite):
    op = staticmethod(fastmem.usage_update)
    reference = reference
    cases = cases
    differentiable_outputs = 2
    batched = ("usage", "write_weights", "read_weights", "free_gates")
    strided = "usage"


BACKENDS = ["reference", pytest.param("cpp", marks=native)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_usage_and_retention_stay_in_range(backend):
    usage = torch.zeros(2, 9, dtype=torch.float64)
    for step in range(40):
        values = cases.make(2, 9, 3, 2, dtype=torch.float64, seed=step)
        usage, retention = fastmem.usage_update(**{**values, "usage": usage}, backend=backend)
        for result in (usage, retention):
            assert (result >= 0).all() and (result <= 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_closed_gates_keep_and_an_open_gate_frees_what_was_read(backend):
    values = cases.make(2, 9, 3, dtype=torch.float64)
    values["read_weights"] = torch.nn.functional.one_hot(torch.tensor([[4, 1, 4]] * 2), 9).double()
    values["write_weights"][:, 0, 2] = 1
    kept, retention = fastmem.usage_update(**{**values, "free_gates": torch.zeros(2, 3).double()}, backend=backend)
    assert torch.equal(retention, torch.ones(2, 9).double())
    assert torch.equal(kept[:, 2], torch.ones(2).double())
    assert (kept >= values["usage"]).all()
    freed, retention = fastmem.usage_update(**{**values, "free_gates": torch.ones(2, 3).double()}, backend=backend)
    assert not freed[:, [1, 4]].any() and not retention[:, [1, 4]].any()
    others = [0, 2, 3, 5, 6, 7, 8]
    assert torch.equal(freed[:, others], kept[:, others])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_small_write_on_a_free_slot_keeps_its_digits(backend):
    values = cases.make(1, 3, 1, 2)
    values["usage"], values["free_gates"] = torch.zeros(1, 3), torch.zeros(1, 1)
    values["write_weights"] = torch.tensor([[[1e-9, 0, 1e-9], [0, 1e-9, 1e-9]]])
    usage, _ = fastmem.usage_update(**values, backend=backend)
    assert torch.equal(usage, torch.tensor([[1e-9, 1e-9, 2e-9]]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_slots_stay_full_and_equal(backend, dtype):
    """Rounding would rank them, and allocation take a later one of slots that are equally full and equally freed."""
    values = cases.make(4, 33, 2, 3, dtype=dtype)
    values["usage"] = torch.ones(4, 33, dtype=dtype)
    values["read_weights"] = values["read_weights"][..., :1].expand(-1, -1, 33)
    usage, retention = fastmem.usage_update(**values, backend=backend)
    assert torch.equal(usage, retention)
    assert torch.equal(fastmem.allocation(usage, backend=backend).argmax(-1), torch.zeros(4, 1, dtype=torch.long))


def test_permutations_of_slots_and_heads():
    values = cases.make(2, 17, 3, 2, dtype=torch.float64)
    expected = fastmem.usage_update(**values)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    permuted = {name: value if name == "free_gates" else value[..., order] for name, value in values.items()}
    for a, e in zip(fastmem.usage_update(**permuted), expected, strict=True):
        assert_close(a, e[..., order])
    permuted = {name: value if name == "usage" else value.flip(1) for name, value in values.items()}
    for a, e in zip(fastmem.usage_update(**permuted), expected, strict=True):
        assert_close(a, e)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 70), read_heads=st.integers(0, 9), write_heads=st.integers(0, 4),
    sharp=st.booleans(), isa=st.sampled_from(isas() or ["none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, read_heads, write_heads, sharp, isa, seed):
    suite = TestUsageUpdate()
    values = cases.make(batch, slots, read_heads, write_heads, sharp, dtype=torch.float64, seed=seed)
    expected = suite.oracle(values)
    suite.agree(suite.run(values, "reference"), expected, values)
    if isa != "none":
        with instruction_set(isa):
            suite.agree(suite.run(values, "cpp"), expected, values)
