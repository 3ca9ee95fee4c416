from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import dnc_step as reference
from tests.cases import dnc_step as cases
from tests.helpers import allocates, assert_close
from tests.ops.suite import OpSuite, native

STATE = ("memory", "usage", "precedence", "link", "write_weights", "read_weights")
BACKENDS = [pytest.param("cpp", marks=native), "reference"]


class TestDNCStep(OpSuite):
    op = staticmethod(fastmem.dnc_step)
    reference = reference
    cases = cases
    differentiable_outputs = 7
    batched = ("interface", *STATE)
    strided = "link"

    def smooth_inputs(self, case: str) -> dict[str, Any]:
        """Without the cut in the gradient, which a difference cannot see."""
        return self.inputs(case, detach_usage_write=False)

    def plain(self, *values: Any) -> Any:
        return reference.dnc_step(*values)[:7]


def options(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name in cases.OPTIONS and name != "detach_usage_write"}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.CASES)
def test_in_place_form_equals_the_functional_one(case: str, backend: str) -> None:
    values = cases.make(**cases.CASES[case])
    expected = fastmem.dnc_step(**values, backend=backend)
    state = [values[name].clone() for name in STATE]
    reads = torch.full_like(expected[-1], float("nan"))
    fastmem.dnc_step_(values["interface"], *state, reads, **options(values), backend=backend)
    for name, a, e in zip((*STATE, "reads"), (*state, reads), expected, strict=True):
        assert torch.equal(a, e), name


def test_in_place_form_checks_what_it_writes() -> None:
    values = cases.make()
    state = {name: values[name] for name in STATE}
    reads = torch.empty(2, 2, 8)
    with pytest.raises(ValueError, match=r"reads: expected shape \[B=2, R=2, W=8\], got \[2, 2, 9\]"):
        fastmem.dnc_step_(values["interface"], **state, reads=torch.empty(2, 2, 9))
    with pytest.raises(ValueError, match="memory: expected a contiguous tensor to write to"):
        fastmem.dnc_step_(values["interface"], **{**state, "memory": values["memory"].mT.contiguous().mT}, reads=reads)
    with pytest.raises(ValueError, match="memory of its own, got memory shared with"):
        fastmem.dnc_step_(values["interface"], **{**state, "precedence": values["write_weights"]}, reads=reads)
    leaf = values["memory"].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="got arguments that require a gradient"):
        fastmem.dnc_step_(values["interface"], **{**state, "memory": leaf}, reads=reads)
    with torch.no_grad():
        fastmem.dnc_step_(values["interface"], **{**state, "memory": leaf}, reads=reads)


@native
@pytest.mark.parametrize("case", cases.CASES)
def test_in_place_form_allocates_no_tensor(case: str) -> None:
    values = cases.make(**cases.CASES[case])
    state = [values[name].clone(memory_format=torch.contiguous_format) for name in STATE]
    reads = torch.empty_like(fastmem.dnc_step(**values)[-1])
    assert allocates(lambda: fastmem.dnc_step(**values)) or not reads.numel(), "the functional form does"
    assert not allocates(lambda: fastmem.dnc_step_(values["interface"], *state, reads, **options(values)))


def test_in_place_form_takes_meta_tensors() -> None:
    values = cases.make(device="meta")
    state = {name: values[name] for name in STATE}
    fastmem.dnc_step_(values["interface"], **state, reads=torch.empty(2, 2, 8, device="meta"), **options(values))


def test_wrong_options_are_named() -> None:
    values = cases.make()
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"mask_floor: expected a number in \[0, 1\), got {wrong}"):
            fastmem.dnc_step(**{**values, "mask_floor": wrong})
    with pytest.raises(ValueError, match="clip: expected a positive number or None, got 0"):
        fastmem.dnc_step(**{**values, "clip": 0.0})
    with pytest.raises(ValueError, match="norm: expected one of"):
        fastmem.dnc_step(**{**values, "norm": "max"})
    with pytest.raises(ValueError, match=r"interface: expected 77 numbers .*write_masks \[1, 8\].*, got 53"):
        fastmem.dnc_step(**{**values, "masked": True})


@pytest.mark.parametrize("wrong", ["false", 1, None])
def test_options_on_or_off_are_bools(wrong: Any) -> None:
    values = cases.make()
    tensors = [values[name] for name in ("interface", *STATE)]
    for name in ("masked", "deallocates", "sharpened", "oneplus", "detach_usage_write"):
        with pytest.raises(ValueError, match=rf"{name}: expected True or False, got {wrong!r}"):
            fastmem.dnc_step(**{**values, name: wrong})
    with pytest.raises(ValueError, match=rf"masked: expected True or False, got {wrong!r}"):
        fastmem.dnc_step_(*tensors, torch.empty(2, 2, 8), masked=wrong)


def test_explain_takes_options_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    values = {**cases.make(), "clip": None}
    chosen = fastmem.explain(fastmem.dnc_step, **values, backend="reference")
    assert chosen.backend == "reference" and capsys.readouterr().out.startswith("dnc_step: reference (")
    interface, *state = (values[name] for name in ("interface", *STATE))
    assert fastmem.explain("dnc_step", interface, *state, clip=None) == fastmem.explain("dnc_step", **values)
    with pytest.raises(ValueError, match="clip: expected a positive number or None, got 0"):
        fastmem.explain("dnc_step", interface, *state, clip=0)
    with pytest.raises(TypeError, match="unexpected keyword argument 'clips'"):
        fastmem.explain("dnc_step", interface, *state, clips=1)


def test_batch_permutation_permutes_the_results() -> None:
    values = cases.make(batch=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted = {name: value[order] if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    for a, e in zip(fastmem.dnc_step(**permuted), fastmem.dnc_step(**values), strict=True):
        assert torch.equal(a, e[order])


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 70), word=st.integers(1, 33), read_heads=st.integers(1, 6),
    write_heads=st.integers(1, 3), masked=st.booleans(), deallocates=st.booleans(), sharpened=st.booleans(),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, word, read_heads, write_heads, masked, deallocates, sharpened, seed):
    values = cases.make(
        batch, slots, word, read_heads, write_heads, dtype=torch.float64, seed=seed, masked=masked,
        deallocates=deallocates, sharpened=sharpened, norm="outer",
    )  # fmt: skip
    suite = TestDNCStep()
    suite.agree(suite.run(values), suite.oracle(values), values, bound=1e-11)


def test_reads_come_from_the_new_memory() -> None:
    memory, *_, read_weights, reads = fastmem.dnc_step(**cases.make(dtype=torch.float64))
    assert_close(reads, read_weights @ memory)
