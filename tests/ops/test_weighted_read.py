import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import weighted_read as reference
from tests.cases import weighted_read as cases
from tests.helpers import assert_close
from tests.ops.suite import OpSuite


class TestWeightedRead(OpSuite):
    op = staticmethod(fastmem.weighted_read)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("memory", "weights")
    strided = "memory"


def test_a_sharp_weight_reads_its_row_exactly():
    memory = cases.make(slots=9, word=20)["memory"]
    weights = torch.eye(9).expand(2, -1, -1)
    assert torch.equal(fastmem.weighted_read(memory, weights), memory)


def test_slot_permutation_leaves_the_reads():
    values = cases.make(slots=17, dtype=torch.float64)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    permuted = fastmem.weighted_read(values["memory"][:, order], values["weights"][..., order])
    assert_close(permuted, fastmem.weighted_read(**values))


def test_weights_of_a_content_read_give_its_reads():
    memory = cases.make(slots=33, word=20, dtype=torch.float64)["memory"]
    keys, strengths = memory[:, :3] + 0.1, torch.full((2, 3), 2.0, dtype=torch.float64)
    reads, _ = fastmem.content_read(memory, keys, strengths)
    assert_close(fastmem.weighted_read(memory, fastmem.content_addressing(memory, keys, strengths)), reads)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 70), word=st.integers(0, 40), heads=st.integers(0, 9),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, word, heads, seed):
    suite = TestWeightedRead()
    values = cases.make(batch, slots, word, heads, dtype=torch.float64, seed=seed)
    suite.agree(suite.run(values), suite.oracle(values), values)
