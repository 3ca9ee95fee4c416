"""float64: gradcheck of every plain reference, and each closed-form backward against its autograd."""

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import (
    allocation,
    cached_attention,
    content_addressing,
    content_read,
    dnc_step,
    location_addressing,
    memory_write,
    ntm_step,
    program_lookup,
    program_mix,
    sharpen,
    temporal_linkage,
    usage_update,
    weighted_read,
)

OPS = (
    content_addressing,
    content_read,
    program_lookup,
    program_mix,
    temporal_linkage,
    usage_update,
    allocation,
    memory_write,
    weighted_read,
    sharpen,
    location_addressing,
    dnc_step,
    ntm_step,
    cached_attention,
)
# How many upstream gradients the closed form takes, and which outputs after them.
SAVED: dict[str, tuple[int, tuple[int, ...]]] = {
    "cached_attention": (2, (1,)),
    "content_addressing": (1, (0,)),
    "content_read": (1, (0, 1)),
    "dnc_step": (7, (0, 1, 4, 5, 7)),
    "memory_write": (1, ()),
    "location_addressing": (1, (0,)),
    "ntm_step": (3, (1, 3)),
    "program_lookup": (2, (1,)),
    "program_mix": (1, ()),
    "sharpen": (1, (0,)),
    "temporal_linkage": (4, ()),
    "usage_update": (2, ()),
    "allocation": (1, (0,)),
    "weighted_read": (1, ()),
}
CASES = [
    pytest.param(cases, name, id=f"{cases.__name__.rpartition('.')[2]}-{name}")
    for cases in OPS
    for name in cases.CASES
    if name != "many_slots"
]


def differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def inputs_of(cases: Any, name: str) -> dict[str, Any]:
    inputs = cases.make(**cases.CASES[name], dtype=torch.float64)
    return {key: value.requires_grad_() if differentiable(value) else value for key, value in inputs.items()}


def backward(op: str, grads: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...], inputs: dict[str, Any], mask):
    """The closed form, given what its signature saves of the outputs."""
    function = getattr(import_module(f"fastmem.reference.{op}"), f"{op}_backward")
    arguments = [value.detach() if isinstance(value, Tensor) else value for value in inputs.values()]
    upstream, saved = SAVED[op]
    before = (*grads[:upstream], *(outputs[i] for i in saved))
    return function(*(x if x is None else x.detach() for x in before), *arguments, mask)


def run(cases: Any, name: str):
    op = cases.__name__.rpartition(".")[2]
    inputs = inputs_of(cases, name)
    outputs = getattr(import_module(f"fastmem.reference.{op}"), op)(*inputs.values())
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    torch.manual_seed(1)
    grads = tuple(torch.randn_like(output) if output.requires_grad else None for output in outputs)
    return op, inputs, outputs, grads


def gradient_slots(op: str, inputs: dict[str, Any]) -> list[str]:
    """Names of the arguments that the closed form returns a gradient for, in its order."""
    return [
        name for name, x in inputs.items() if name not in ("slot_mask", "mask") and (x is None or differentiable(x))
    ]


@pytest.mark.parametrize(("cases", "name"), CASES)
def test_closed_form_equals_autograd(cases, name):
    op, inputs, outputs, grads = run(cases, name)
    live = [(output, grad) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    names = gradient_slots(op, inputs)
    wanted = [key for key in names if inputs[key] is not None]
    expected = torch.autograd.grad(
        [output for output, _ in live],
        [inputs[key] for key in wanted],
        [grad for _, grad in live],
        allow_unused=True,
        materialize_grads=True,
    )
    actual = dict(zip(names, backward(op, grads, outputs, inputs, [True] * len(names)), strict=True))
    for key, gradient in zip(wanted, expected, strict=True):
        assert actual[key].dtype == inputs[key].dtype, key
        if gradient.dtype == torch.float64:
            # The absolute term is for gradients that are differences of numbers of order one, as with W = 1.
            torch.testing.assert_close(actual[key], gradient, rtol=1e-12, atol=1e-13)
        else:
            torch.testing.assert_close(actual[key], gradient)
    for key in names:
        if inputs[key] is None:
            assert actual[key].shape == (0,), key


@pytest.mark.parametrize(
    ("cases", "name"), [case for case in CASES if case.values[1] in ("plain", "both_masks", "mask")]
)
def test_unwanted_gradients_are_empty_and_do_not_alias(cases, name):
    op, inputs, outputs, grads = run(cases, name)
    count = len(gradient_slots(op, inputs))
    complete = backward(op, grads, outputs, inputs, [True] * count)
    none = backward(op, grads, outputs, inputs, [False] * count)
    assert all(gradient.shape == (0,) for gradient in none)
    assert len({id(gradient) for gradient in none}) == count
    for index in range(count):
        single = backward(op, grads, outputs, inputs, [i == index for i in range(count)])
        for i, gradient in enumerate(single):
            assert torch.equal(gradient, complete[i]) if i == index else gradient.shape == (0,)


@pytest.mark.parametrize("absent", range(4))
def test_absent_upstream_gradients_of_temporal_linkage_count_as_zero(absent):
    op, inputs, outputs, grads = run(temporal_linkage, "small")
    missing = tuple(None if i == absent else grad for i, grad in enumerate(grads))
    zeros = tuple(torch.zeros_like(grad) if i == absent else grad for i, grad in enumerate(grads))
    for actual, expected in zip(
        backward(op, missing, outputs, inputs, [True] * 4),
        backward(op, zeros, outputs, inputs, [True] * 4),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("absent", range(2))
def test_absent_upstream_gradients_of_program_lookup_count_as_zero(absent):
    op, inputs, outputs, grads = run(program_lookup, "plain")
    missing = tuple(None if i == absent else grad for i, grad in enumerate(grads))
    zeros = tuple(torch.zeros_like(grad) if i == absent else grad for i, grad in enumerate(grads))
    for actual, expected in zip(
        backward(op, missing, outputs, inputs, [True] * 6),
        backward(op, zeros, outputs, inputs, [True] * 6),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("absent", range(3))
def test_absent_upstream_gradients_of_ntm_step_count_as_zero(absent):
    op, inputs, outputs, grads = run(ntm_step, "two_pairs")
    missing = tuple(None if i == absent else grad for i, grad in enumerate(grads))
    zeros = tuple(torch.zeros_like(grad) if i == absent else grad for i, grad in enumerate(grads[:3]))
    for actual, expected in zip(
        backward(op, missing, outputs, inputs, [True] * 3),
        backward(op, zeros, outputs, inputs, [True] * 3),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("absent", range(2))
def test_absent_upstream_gradients_of_usage_update_count_as_zero(absent):
    op, inputs, outputs, grads = run(usage_update, "small")
    missing = tuple(None if i == absent else grad for i, grad in enumerate(grads))
    zeros = tuple(torch.zeros_like(grad) if i == absent else grad for i, grad in enumerate(grads))
    for actual, expected in zip(
        backward(op, missing, outputs, inputs, [True] * 4),
        backward(op, zeros, outputs, inputs, [True] * 4),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("absent", range(2))
def test_absent_upstream_gradients_of_cached_attention_count_as_zero(absent):
    op, inputs, outputs, grads = run(cached_attention, "mask")
    missing = tuple(None if i == absent else grad for i, grad in enumerate(grads))
    zeros = tuple(torch.zeros_like(grad) if i == absent else grad for i, grad in enumerate(grads))
    for actual, expected in zip(
        backward(op, missing, outputs, inputs, [True] * 4),
        backward(op, zeros, outputs, inputs, [True] * 4),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-13)


def gradcheck(op: str, inputs: dict[Any, Any]) -> bool:
    function = getattr(import_module(f"fastmem.reference.{op}"), op)
    return torch.autograd.gradcheck(function, tuple(inputs.values()), fast_mode=True)


@pytest.mark.parametrize("norm", ["inner", "outer", "rsqrt", "clamp", "width"])
@pytest.mark.parametrize("op", ["content_addressing", "content_read"])
def test_gradcheck_of_content(op, norm):
    cases = {"content_addressing": content_addressing, "content_read": content_read}[op]
    inputs = cases.make(
        batch=2, slots=5, word=3, heads=2, key_mask=True, slot_mask=True, norm=norm, dtype=torch.float64
    )
    # A zero row has a kink under every norm but inner, and a huge curvature under inner: a difference cannot see it.
    inputs["memory"] = inputs["memory"] + 0.5
    inputs = {key: value.requires_grad_() if differentiable(value) else value for key, value in inputs.items()}
    assert gradcheck(op, inputs)


@pytest.mark.parametrize("name", ["small", "one_slot", "plain"])
def test_gradcheck_of_temporal_linkage(name):
    assert gradcheck("temporal_linkage", inputs_of(temporal_linkage, name))


@pytest.mark.parametrize("name", ["plain", "no_biases", "outer", "rsqrt", "clamp", "width"])
def test_gradcheck_of_program_lookup(name):
    assert gradcheck("program_lookup", inputs_of(program_lookup, name))


@pytest.mark.parametrize("name", ["plain", "one_of_each", "no_biases"])
def test_gradcheck_of_program_mix(name):
    assert gradcheck("program_mix", inputs_of(program_mix, name))


@pytest.mark.parametrize("cases", [usage_update, allocation])
@pytest.mark.parametrize("name", ["small", "one_slot", "plain"])
def test_gradcheck_of_usage_and_allocation(cases, name):
    assert gradcheck(cases.__name__.rpartition(".")[2], inputs_of(cases, name))


@pytest.mark.parametrize("name", ["plain", "powers", "odd", "one_slot"])
@pytest.mark.parametrize("cases", [sharpen, location_addressing])
def test_gradcheck_of_sharpening(cases, name):
    assert gradcheck(cases.__name__.rpartition(".")[2], inputs_of(cases, name))


@pytest.mark.parametrize("name", ["plain", "one_head", "one_of_each", "several_heads"])
def test_gradcheck_of_memory_write(name):
    assert gradcheck("memory_write", inputs_of(memory_write, name))


@pytest.mark.parametrize("name", ["plain", "one_of_each", "odd"])
def test_gradcheck_of_weighted_read(name):
    assert gradcheck("weighted_read", inputs_of(weighted_read, name))


@pytest.mark.parametrize("name", ["plain", "two_pairs", "two_writers_joint", "published"])
def test_gradcheck_of_ntm_step(name):
    assert gradcheck("ntm_step", inputs_of(ntm_step, name))


@pytest.mark.parametrize("name", ["plain", "one_of_each", "odd", "mask"])
def test_gradcheck_of_cached_attention(name):
    assert gradcheck("cached_attention", inputs_of(cached_attention, name))
