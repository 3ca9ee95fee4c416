"""What the tests of every op share: gradients by autograd, and the error rule."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastmem import native


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else tuple(outputs) if isinstance(outputs, list) else (outputs,)


def is_differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def converted(values: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """The same arguments with every floating tensor in another dtype."""
    return [value.to(dtype) if is_differentiable(value) else value for value in values]


def cotangents(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype) for out in outputs]


def run_with_gradients(
    function: Callable[..., Any], values: Sequence[Any], differentiable_outputs: int
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Outputs, and the gradient of every floating argument under fixed cotangents of the first outputs."""
    leaves = [value.detach().clone().requires_grad_() if is_differentiable(value) else value for value in values]
    outputs = as_tuple(function(*leaves))
    followed = outputs[:differentiable_outputs]
    wanted = [leaf for leaf in leaves if is_differentiable(leaf)]
    gradients = torch.autograd.grad(followed, wanted, cotangents(followed), allow_unused=True, materialize_grads=True)
    return tuple(out.detach() for out in outputs), list(gradients)


def assert_close(actual: Tensor, expected: Tensor, bound: float = 1e-12, name: str = "") -> None:
    """max |actual - expected| <= bound * max(1, max |expected|), with infinities and NaN in the same places."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = torch.isfinite(expected)
    assert torch.equal(finite, torch.isfinite(actual)), f"{name}: not finite in other places than expected"
    if finite.any():
        error = (actual - expected)[finite].abs().max().item()
        assert error <= bound * max(1.0, expected[finite].abs().max().item()), f"{name}: error {error:.1e}"


def assert_no_worse(actual: Tensor, exact: Tensor, plain: Tensor, factor: float, name: str = "") -> None:
    """The error against float64: at most `factor` times that of the plain formula, plus one rounding of the output."""
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    finite = torch.isfinite(exact)
    assert torch.equal(finite, torch.isfinite(actual)), f"{name}: not finite in other places than expected"
    if not finite.any():
        return
    error, allowed = ((value.double() - exact)[finite].abs().max().item() for value in (actual, plain))
    rounding = torch.finfo(actual.dtype).eps * exact[finite].abs().max().item()
    assert error <= factor * allowed + rounding, f"{name}: error {error:.1e}, plain formula {allowed:.1e}"


def allocates(function: Callable[[], Any]) -> bool:
    """Whether a call makes a tensor with memory of its own, be it for a moment."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        function()
    return any(event.cpu_memory_usage for event in watched.events())


def isas() -> list[str]:
    return native.module.isas() if native.module else []


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    assert native.module
    previous = native.module.isa()
    native.module.set_isa(name)
    try:
        yield
    finally:
        native.module.set_isa(previous)


@contextmanager
def threads(count: int) -> Iterator[None]:
    previous = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)
