import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import program_lookup as reference
from tests.cases import program_lookup as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.programs import ProgramSuite


class TestProgramLookup(ProgramSuite):
    op = staticmethod(fastmem.program_lookup)
    reference = reference
    cases = cases
    differentiable_outputs = 2
    batched = ("inputs", "query", "strength")


def test_is_a_mix_by_the_softmax_of_the_scores():
    values = cases.make(7, 20, 33, 4, dtype=torch.float64)
    outputs, program_weights = fastmem.program_lookup(**values)
    query, strength, keys = (values[name].unsqueeze(0) for name in ("query", "strength", "keys"))
    assert_close(program_weights, fastmem.content_addressing(keys, query, strength)[0])
    mixed = fastmem.program_mix(values["inputs"], program_weights, values["weights"], values["biases"])
    assert torch.equal(outputs, mixed)


def test_one_program_is_a_linear_layer():
    values = cases.make(7, 20, 33, 1, dtype=torch.float64)
    outputs, program_weights = fastmem.program_lookup(**values)
    assert torch.equal(program_weights, torch.ones(7, 1, dtype=torch.float64))
    assert_close(outputs, values["inputs"] @ values["weights"][0] + values["biases"][0])


def test_a_sharp_query_picks_its_program():
    values = cases.make(3, 20, 33, 3, dtype=torch.float64)
    values = {**values, "query": values["keys"].clone(), "strength": torch.full((3,), 1e6, dtype=torch.float64)}
    outputs, program_weights = fastmem.program_lookup(**values)
    assert torch.equal(program_weights, torch.eye(3, dtype=torch.float64))
    picked = torch.einsum("bi,bio->bo", values["inputs"], values["weights"]) + values["biases"]
    assert_close(outputs, picked)


def test_program_permutation_changes_nothing_but_the_order():
    values = cases.make(9, 20, 33, 5, dtype=torch.float64)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(0))
    permuted = {**values, **{name: values[name][order] for name in ("keys", "weights", "biases")}}
    outputs, program_weights = fastmem.program_lookup(**permuted)
    expected, expected_weights = fastmem.program_lookup(**values)
    assert_close(outputs, expected)
    assert_close(program_weights, expected_weights[:, order])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_infinite_scores(backend):
    values = cases.make(3, 8, 8, 3, dtype=torch.float64)
    values["keys"] = values["keys"].abs()
    values["query"] = values["query"].abs()
    clean = fastmem.program_lookup(**values)
    values["strength"][0] = -torch.inf  # no finite score: no program
    values["strength"][1] = torch.inf
    outputs, gradients = TestProgramLookup().run(values, backend)
    for a, e in zip(outputs, clean, strict=True):
        assert not a[0].any()
        assert a[1].isnan().all()
        assert_close(a[2], e[2])
    for gradient in gradients[:3]:
        assert not gradient[0].any()
        assert gradient[2].isfinite().all()


def test_norm_and_eps_are_checked():
    with pytest.raises(ValueError, match="norm: expected one of inner, outer, rsqrt, clamp, width, got 'l2'"):
        fastmem.program_lookup(**{**cases.make(), "norm": "l2"})
    with pytest.raises(ValueError, match="eps: expected a finite number of at least 0, got -1"):
        fastmem.program_lookup(**{**cases.make(), "eps": -1})


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 70), inputs=st.integers(0, 40), outputs=st.integers(0, 70), programs=st.integers(0, 5),
    key=st.integers(0, 5), biases=st.booleans(), isa=st.sampled_from(isas() or ["none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, inputs, outputs, programs, key, biases, isa, seed):
    suite = TestProgramLookup()
    values = cases.make(batch, inputs, outputs, programs, key, biases, dtype=torch.float64, seed=seed)
    expected = suite.oracle(values)
    if isa == "none":
        return suite.agree(suite.run(values), expected, values)
    with instruction_set(isa):
        suite.agree(suite.run(values), expected, values)
