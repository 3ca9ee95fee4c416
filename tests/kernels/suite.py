"""What the tests of every Triton kernel share: the interpreter against the float64 reference, values and gradients."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.helpers import as_tuple, assert_no_worse, converted, cotangents

SEEDS = range(3)


def check(
    op: str,
    kernels: ModuleType,
    reference: ModuleType,
    cases: ModuleType,
    case: str,
    differentiable: int,
    saved: slice | tuple[int, ...],
    gradients: int,
) -> None:
    """The errors of several draws count as one, since the luck of a few numbers is not the kernel's."""
    drawn: list[list[list[Tensor]]] = []
    for seed in SEEDS if case not in ("no_batch", "no_slots") else (0,):
        values = list(cases.make(**cases.CASES[case], seed=seed).values())
        row = []
        for room, inputs in ((kernels, values), (reference, converted(values, torch.float64)), (reference, values)):
            outputs = list(as_tuple(getattr(room, op)(*inputs)))
            upstream = cotangents(outputs[:differentiable])
            backward = getattr(room, f"{op}_backward")
            kept = outputs[saved] if isinstance(saved, slice) else [outputs[i] for i in saved]
            row.append([*outputs, *backward(*upstream, *kept, *inputs, [True] * gradients)])
        drawn.append(row)
    for i in range(len(drawn[0][0])):
        for actual, exact, _ in drawn:
            assert actual[i].shape == exact[i].shape
        ours, truth, formula = (torch.cat([row[room][i].flatten() for row in drawn]) for room in range(3))
        is_gradient = i >= len(drawn[0][0]) - gradients
        assert ours.dtype == formula.dtype
        assert_no_worse(ours, truth, formula, factor=3 if is_gradient else 2, name=f"result {i}")


def check_output_mask(backward: Any, arguments: list[Any], gradients: int) -> None:
    """An unwanted gradient has size 0, and a wanted one does not depend on what else is wanted."""
    everything = backward(*arguments, [True] * gradients)
    for wanted in range(gradients):
        some = backward(*arguments, [i == wanted for i in range(gradients)])
        for i, gradient in enumerate(some):
            assert torch.equal(gradient, everything[i]) if i == wanted else gradient.numel() == 0
