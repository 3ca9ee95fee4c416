from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import program_lookup as reference
from tests.cases import program_lookup as cases
from tests.helpers import assert_close, instruction_set, isas, threads
from tests.ops.suite import OpSuite, native


class TestProgramLookup(OpSuite):
    op = staticmethod(fastmem.program_lookup)
    reference = reference
    cases = cases
    differentiable_outputs = 2
    batched = ("inputs", "query", "strength")
    autocast_keeps = ("weights", "biases")
    strided = "weights"

    def inputs(self, case: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> dict[str, Any]:
        """Low-precision programs go with float32 only; more samples, as the error rule compares two largest errors."""
        if "program_dtype" in cases.CASES[case]:
            return super().inputs(case, torch.float32, **{"batch": 16, **overrides})
        return super().inputs(case, dtype, **overrides)

    def test_nan_stays_in_its_sample(self) -> None:
        values = self.inputs("plain", torch.float32)
        clean = self.run(values)
        for name in self.batched:
            poisoned = {**values, name: values[name].clone()}
            poisoned[name][1] = float("nan")
            outputs, gradients = self.run(poisoned)
            assert outputs[0][1].isnan().all()
            for a, e in zip((*outputs, *gradients[:3]), (*clean[0], *clean[1][:3]), strict=True):
                assert torch.equal(a[[0, 2, 3]], e[[0, 2, 3]])


def mixed_by_hand(values: dict[str, Any], program_weights: torch.Tensor) -> torch.Tensor:
    """Every sample applies a map of its own, as published."""
    maps = torch.einsum("bp,pio->bio", program_weights, values["weights"])
    return torch.einsum("bi,bio->bo", values["inputs"], maps) + program_weights @ values["biases"]


def test_equals_the_published_order():
    values = cases.make(7, 20, 33, 4, dtype=torch.float64)
    outputs, program_weights = fastmem.program_lookup(**values)
    assert_close(program_weights.sum(-1), torch.ones(7, dtype=torch.float64))
    assert_close(outputs, mixed_by_hand(values, program_weights))


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


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_and_threads_do_not_see_each_other(isa, dtype):
    """Cut by samples or by threads, forward and gradients of samples keep every bit."""
    suite, values = TestProgramLookup(), cases.make(70, 200, 130, 3, dtype=dtype)
    with instruction_set(isa):
        with threads(1):
            whole = suite.run(values)
        with threads(2):
            shared = suite.run(values)
        parts = [fastmem.program_lookup(**{**values, **{n: values[n][rows] for n in suite.batched}})
                 for rows in (slice(0, 1), slice(1, 6), slice(6, 23), slice(23, 70))]  # fmt: skip
    for a, e in zip((*shared[0], *shared[1]), (*whole[0], *whole[1]), strict=True):
        assert torch.equal(a, e)
    for part, e in zip(zip(*parts, strict=True), whole[0], strict=True):
        assert torch.equal(torch.cat(part), e)


@native
@pytest.mark.parametrize("biases", [True, False])
def test_large_products_are_those_of_torch(biases):
    suite, values = TestProgramLookup(), cases.make(257, 520, 521, 2, biases=biases, dtype=torch.float64)
    suite.agree(suite.run(values, "cpp"), suite.oracle(values), values)
    with instruction_set("baseline"):  # narrow vectors go there sooner
        values = cases.make(65, 260, 261, 2, biases=biases, dtype=torch.float64)
        values["weights"] = values["weights"].mT.contiguous().mT
        suite.agree(suite.run(values, "cpp"), suite.oracle(values), values)


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


def test_low_precision_programs_go_to_the_reference_on_a_cpu():
    values = list(cases.make(program_dtype=torch.bfloat16).values())
    assert fastmem.explain(fastmem.program_lookup, *values).backend == "reference"
    with pytest.raises(fastmem.BackendUnavailable, match=r"float32 and float64, got torch\.bfloat16"):
        fastmem.program_lookup(*values, backend="cpp")
    with pytest.raises(TypeError, match=r"weights: expected dtype torch.float64, got torch.float32"):
        fastmem.program_lookup(**cases.make(dtype=torch.float64, program_dtype=torch.float32))


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
