import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import program_mix as reference
from tests.cases import program_mix as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.programs import ProgramSuite
from tests.ops.suite import native


class TestProgramMix(ProgramSuite):
    op = staticmethod(fastmem.program_mix)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("inputs", "program_weights")


def test_equals_the_published_order():
    """Every sample applies a map of its own, as published."""
    values = cases.make(7, 20, 33, 4, dtype=torch.float64)
    maps = torch.einsum("bp,pio->bio", values["program_weights"], values["weights"])
    expected = torch.einsum("bi,bio->bo", values["inputs"], maps) + values["program_weights"] @ values["biases"]
    assert_close(fastmem.program_mix(**values), expected)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cpp", marks=native)])
def test_one_program_alone_is_a_linear_layer(backend):
    """Whatever the others hold, short of what is not a number."""
    values = cases.make(7, 20, 33, 4, dtype=torch.float64)
    values["program_weights"] = torch.eye(4, dtype=torch.float64)[2].expand(7, 4)
    expected = values["inputs"] @ values["weights"][2] + values["biases"][2]
    assert_close(fastmem.program_mix(**values, backend=backend), expected)


def test_is_linear_in_the_program_weights():
    values = cases.make(7, 20, 33, 4, dtype=torch.float64)
    others = -3 * cases.make(7, 20, 33, 4, dtype=torch.float64, seed=1)["program_weights"]
    both = fastmem.program_mix(**{**values, "program_weights": values["program_weights"] + others})
    apart = fastmem.program_mix(**values) + fastmem.program_mix(**{**values, "program_weights": others})
    assert_close(both, apart)


def test_program_permutation_changes_nothing():
    values = cases.make(9, 20, 33, 5, dtype=torch.float64)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    permuted = {
        "inputs": values["inputs"], "program_weights": values["program_weights"][:, order],
        "weights": values["weights"][order], "biases": values["biases"][order],
    }  # fmt: skip
    assert_close(fastmem.program_mix(**permuted), fastmem.program_mix(**values))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 70), inputs=st.integers(0, 40), outputs=st.integers(0, 70), programs=st.integers(0, 5),
    biases=st.booleans(), isa=st.sampled_from(isas() or ["none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, inputs, outputs, programs, biases, isa, seed):
    suite = TestProgramMix()
    values = cases.make(batch, inputs, outputs, programs, biases, dtype=torch.float64, seed=seed)
    expected = suite.oracle(values)
    if isa == "none":
        return suite.agree(suite.run(values), expected, values)
    with instruction_set(isa):
        suite.agree(suite.run(values), expected, values)
