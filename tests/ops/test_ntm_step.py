from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmem
from fastmem.reference import ntm_step as reference
from tests.cases import ntm_step as cases
from tests.helpers import allocates, assert_close
from tests.ops.suite import OpSuite, native
from tests.ops.test_sharpen import FORMS

BACKENDS = [pytest.param("cpp", marks=native), "reference"]
ORDERS = ["rw", "wr", "rwrw", "rrw", "wwr", "r", "w"]


def ntm_step(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The public function by the op's own arguments."""
    options = (heads, joint_writes, reversed_shift, FORMS[in_powers], sharpen_eps, clip, norm, eps)
    return fastmem.ntm_step(interface, memory, weights, *options, backend=backend)


class TestNTMStep(OpSuite):
    op = staticmethod(ntm_step)
    reference = reference
    cases = cases
    differentiable_outputs = 3
    batched = ("interface", "memory", "weights")
    strided = "memory"

    def public(self, values: dict[str, Any]) -> list[Any]:
        return [*tensors(values), *options(values)]

    def plain(self, *values: Any) -> Any:
        return reference.ntm_step(*values)[:3]


def tensors(values: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    return values["interface"], values["memory"], values["weights"]


def options(values: dict[str, Any]) -> tuple[str, bool, bool, str, float, float, str, float]:
    """Those of the public function."""
    _, _, _, heads, joint_writes, reversed_shift, in_powers, *rest = values.values()
    sharpen_eps, clip, norm, eps = rest
    return heads, joint_writes, reversed_shift, FORMS[in_powers], sharpen_eps, clip, norm, eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", cases.CASES)
def test_in_place_form_equals_the_functional_one(case: str, backend: str) -> None:
    values = cases.make(**cases.CASES[case])
    expected = ntm_step(**values, backend=backend)
    interface, memory, weights = (tensor.clone() for tensor in tensors(values))
    reads = torch.full_like(expected[-1], float("nan"))
    fastmem.ntm_step_(interface, memory, weights, reads, *options(values), backend=backend)
    for name, a, e in zip(("memory", "weights", "reads"), (memory, weights, reads), expected, strict=True):
        assert torch.equal(a, e), name


def test_in_place_form_checks_what_it_writes() -> None:
    interface, memory, weights = tensors(cases.make())
    reads = torch.empty(2, 1, 8)
    with pytest.raises(ValueError, match=r"reads: expected shape \[B=2, R=1, W=8\], got \[2, 1, 9\]"):
        fastmem.ntm_step_(interface, memory, weights, torch.empty(2, 1, 9), "rw")
    with pytest.raises(ValueError, match=r"reads: expected shape \[B, R=1, W\] for heads 'rw', got R=2"):
        fastmem.ntm_step_(interface, memory, weights, torch.empty(2, 2, 8), "rw")
    with pytest.raises(ValueError, match="memory: expected a contiguous tensor to write to"):
        fastmem.ntm_step_(interface, memory.mT.contiguous().mT, weights, reads, "rw")
    with pytest.raises(ValueError, match="reads: expected memory of its own, got memory shared with memory"):
        fastmem.ntm_step_(interface, memory, weights, memory.view(-1)[:16].view(2, 1, 8), "rw")
    leaf = memory.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="got arguments that require a gradient"):
        fastmem.ntm_step_(interface, leaf, weights, reads, "rw")
    with torch.no_grad():
        fastmem.ntm_step_(interface, leaf, weights, reads, "rw")


@native
@pytest.mark.parametrize("case", cases.CASES)
def test_in_place_form_allocates_no_tensor(case: str) -> None:
    values = cases.make(**cases.CASES[case])
    interface, memory, weights = (tensor.clone() for tensor in tensors(values))
    reads = torch.empty_like(ntm_step(**values)[-1])
    assert allocates(lambda: ntm_step(**values)) or not memory.numel(), "the functional form does"
    assert not allocates(lambda: fastmem.ntm_step_(interface, memory, weights, reads, *options(values)))


@pytest.mark.parametrize("heads", ["", "rx", "RW", "r w", None, ["r", "w"]])
def test_wrong_heads_are_named(heads: Any) -> None:
    values = tensors(cases.make())
    with pytest.raises(ValueError, match='heads: expected letters r and w, such as "rw", got '):
        fastmem.ntm_step(*values, heads)
    if isinstance(heads, str):
        with pytest.raises(ValueError, match="heads: expected letters r and w"):
            torch.ops.fastmem.ntm_step(*values, heads, *list(cases.make().values())[4:])


def test_an_interface_that_does_not_fit_is_named() -> None:
    interface, memory, weights = tensors(cases.make())
    for wrong in (interface[:, :-1], interface[:, :-2], interface[:, :10]):
        with pytest.raises(ValueError, match=r"interface: expected 40, 44, 48 or more .* heads 'rw' .* of 8, got \d+"):
            fastmem.ntm_step(wrong, memory, weights, "rw")
    with pytest.raises(ValueError, match=r"interface: expected 56, .* heads 'ww'"):
        fastmem.ntm_step(interface, memory, weights, "ww")
    with pytest.raises(ValueError, match=r"weights: expected shape \[B, A=3, N\] for heads 'rrw', got A=2"):
        fastmem.ntm_step(interface, memory, weights, "rrw")


def test_wrong_options_are_named() -> None:
    values = tensors(cases.make())
    with pytest.raises(ValueError, match="clip: expected a positive number or None, got 0"):
        fastmem.ntm_step(*values, "rw", clip=0)
    with pytest.raises(ValueError, match="form: expected one of softmax, power, got 'log'"):
        fastmem.ntm_step(*values, "rw", form="log")
    with pytest.raises(ValueError, match="eps: expected a finite number above 0, got 0"):
        fastmem.ntm_step(*values, "rw", sharpen_eps=0)
    with pytest.raises(ValueError, match="norm: expected one of"):
        fastmem.ntm_step(*values, "rw", norm="max")


@pytest.mark.parametrize("wrong", ["false", 1, None])
def test_options_on_or_off_are_bools(wrong: Any) -> None:
    values = tensors(cases.make())
    for name in ("joint_writes", "reversed_shift"):
        with pytest.raises(ValueError, match=rf"{name}: expected True or False, got {wrong!r}"):
            fastmem.ntm_step(*values, "rw", **{name: wrong})
        with pytest.raises(ValueError, match=rf"{name}: expected True or False, got {wrong!r}"):
            fastmem.ntm_step_(*values, torch.empty(2, 1, 8), "rw", **{name: wrong})
    content = torch.rand(2, 3, 5)
    gate, shift, sharpness = torch.rand(2, 3), torch.rand(2, 3, 3), torch.rand(2, 3)
    with pytest.raises(ValueError, match=rf"reversed_shift: expected True or False, got {wrong!r}"):
        fastmem.location_addressing(content, content, gate, shift, sharpness, reversed_shift=wrong)


def test_explain_takes_options_by_name() -> None:
    values = tensors(cases.make())
    assert fastmem.explain(fastmem.ntm_step, *values, heads="rw", clip=None, form="power", backend="reference")
    with pytest.raises(ValueError, match="form: expected one of softmax, power, got 'log'"):
        fastmem.explain(fastmem.ntm_step, *values, "rw", form="log")


@pytest.mark.parametrize("form", FORMS.values())
def test_defaults(form: str) -> None:
    values = cases.make(in_powers=form == "power")
    for a, e in zip(fastmem.ntm_step(*tensors(values), "rw", form=form), ntm_step(**values), strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_clip_an_interface_counts_whole(backend: str) -> None:
    values = cases.make(scale=40.0, clip=float("inf"))
    expected = ntm_step(**values, backend=backend)
    for a, e in zip(fastmem.ntm_step(*tensors(values), "rw", clip=None, backend=backend), expected, strict=True):
        assert torch.equal(a, e)
    assert not torch.equal(expected[0], ntm_step(**{**values, "clip": 20.0}, backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("joint_writes", [False, True])
@pytest.mark.parametrize("heads", ORDERS)
def test_any_order_of_heads(heads: str, joint_writes: bool, backend: str) -> None:
    values = cases.make(heads=heads, joint_writes=joint_writes, dtype=torch.float64)
    suite = TestNTMStep()
    suite.agree(suite.run(values, backend), suite.oracle(values), values)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", ORDERS)
def test_a_step_is_its_heads_one_after_the_other(heads: str, backend: str) -> None:
    """What a head of several does is what it does alone, in a step of its own."""
    values = cases.make(heads=heads, dtype=torch.float64)
    memory, weights, reads = ntm_step(**values, backend=backend)
    interface, seen, before = tensors(values)
    parts = interface.split([reference.interface_size(kind, 8) for kind in heads], 1)
    read = []
    for h, (kind, part) in enumerate(zip(heads, parts, strict=True)):
        one = {**values, "interface": part, "memory": seen, "weights": before[:, h : h + 1], "heads": kind}
        seen, after, words = ntm_step(**one, backend=backend)
        assert_close(weights[:, h : h + 1], after)
        read.append(words)
    assert_close(memory, seen)
    assert_close(reads, torch.cat(read, 1))


@pytest.mark.parametrize("backend", BACKENDS)
def test_joint_writes_hide_writes_from_later_heads(backend: str) -> None:
    """Write heads before readers then give the same as after them, and order among themselves plays no part."""
    values = cases.make(heads="wrw", joint_writes=True, dtype=torch.float64)
    memory, weights, reads = ntm_step(**values, backend=backend)
    interface, _, before = tensors(values)
    parts = interface.split([reference.interface_size(kind, 8) for kind in "wrw"], 1)
    order = [1, 2, 0]
    turned = {
        **values, "heads": "rww", "interface": torch.cat([parts[h] for h in order], 1), "weights": before[:, order],
    }  # fmt: skip
    other_memory, other_weights, other_reads = ntm_step(**turned, backend=backend)
    assert_close(other_memory, memory)
    assert_close(other_weights, weights[:, order])
    assert_close(other_reads, reads)
    assert_close(reads, weights[:, 1:2] @ values["memory"])
    assert not torch.allclose(ntm_step(**{**values, "joint_writes": False}, backend=backend)[2], reads)


def test_batch_permutation_permutes_the_results() -> None:
    values = cases.make(batch=5)
    order = torch.tensor([3, 1, 4, 0, 2])
    permuted: dict[str, Any] = {
        name: value[order] if isinstance(value, Tensor) else value for name, value in values.items()
    }
    for a, e in zip(ntm_step(**permuted), ntm_step(**values), strict=True):
        assert torch.equal(a, e[order])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 70), word=st.integers(1, 33),
    heads=st.text("rw", min_size=1, max_size=5), reach=st.integers(0, 3), joint_writes=st.booleans(),
    reversed_shift=st.booleans(), in_powers=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, word, heads, reach, joint_writes, reversed_shift, in_powers, seed):
    values = cases.make(
        batch, slots, word, heads, reach, dtype=torch.float64, seed=seed, joint_writes=joint_writes,
        reversed_shift=reversed_shift, in_powers=in_powers,
    )  # fmt: skip
    suite = TestNTMStep()
    suite.agree(suite.run(values), suite.oracle(values), values)
