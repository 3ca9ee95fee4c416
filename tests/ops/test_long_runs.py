"""50,000 steps on one state: no NaN, no weights that sum above one, and gradients that stay finite.

The numbers of the interface are extreme, and every 100 steps the options and the gates of each sample are drawn anew:
gates at 0, at 1 or anywhere, lookups that pick one slot or all alike, memories that fill up and are freed.
"""

import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmem
from fastmem.reference import dnc_step, ntm_step
from fastmem.reference._interface import interface_shapes, split
from tests.cases.sharpen import EPS
from tests.helpers import cotangents, instruction_set, isas
from tests.ops.suite import native

BATCH, SLOTS, WORD = 4, 16, 8
EPOCH = 100
MOST = 1e4  # beyond it sigmoid is 0 or 1 exactly, and so is a lookup with this strength
EXTREMES = torch.tensor([0.0, 1e-30, -1e-30, 1.0, -1.0, 20.0, -20.0, MOST, -MOST])
INFINITE = torch.tensor([torch.inf, -torch.inf])  # the clip makes them finite
NORMS = ["inner", "outer", "rsqrt", "clamp", "width"]
MOST_SUM = 1 + 1e-5
LEAST = -1e-6  # weights that sum to one rounding above 1 leave precedence and link one below 0
# The C++ ops themselves: the checks of the public functions take most of the time of a step as small as these.
CPP = pytest.param("cpp", 50_000, marks=native)
RUNS = pytest.mark.parametrize(("backend", "steps"), [CPP, ("reference", 200)])


def in_place(backend: str, op: str, reference: Any) -> Callable[..., Any]:
    return getattr(torch.ops.fastmem_cpu if backend == "cpp" else reference, op)


def vectors(size: int, clipped: bool, generator: torch.Generator) -> Tensor:
    choices = torch.cat([EXTREMES, INFINITE]) if clipped else EXTREMES
    return choices[torch.randint(len(choices), (EPOCH, BATCH, size), generator=generator)]


def push(fields: Tensor, generator: torch.Generator) -> None:
    """Leaves the fields `[EPOCH, BATCH, ...]` of some samples alone; all those of the others go up, or down."""
    way = torch.randint(-1, 2, (1, BATCH, *[1] * (fields.dim() - 2)), generator=generator)
    fields.copy_(torch.where(way == 0, fields, way * MOST))


def epochs(backend: str, steps: int) -> Iterator[tuple[torch.Generator, random.Random]]:
    """A source of numbers and one of choices for each epoch; the C++ kernels take turns by instruction set."""
    for epoch in range(steps // EPOCH):
        sources = torch.Generator().manual_seed(epoch), random.Random(epoch)
        if backend == "cpp":
            with instruction_set(isas()[epoch % len(isas())]):
                yield sources
        else:
            yield sources


def check_sums(name: str, sums: list[Tensor]) -> None:
    together = torch.stack(sums)
    within = (together >= LEAST).all() and (together <= MOST_SUM).all()
    assert within, f"{name}: {together.min()} to {together.max()}"


def check_gradients(step: Callable[..., tuple[Tensor, ...]], tensors: list[Tensor]) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    outputs = step(*leaves)
    gradients = torch.autograd.grad(outputs, leaves, cotangents(outputs))
    assert all(gradient.isfinite().all() for gradient in gradients)


@RUNS
@pytest.mark.parametrize(("read_heads", "write_heads"), [(2, 1), (3, 2)])
def test_dnc_step(read_heads: int, write_heads: int, backend: str, steps: int) -> None:
    step_ = in_place(backend, "dnc_step_", dnc_step)
    memory = torch.zeros(BATCH, SLOTS, WORD)
    usage, precedence = torch.zeros(BATCH, SLOTS), torch.zeros(BATCH, write_heads, SLOTS)
    link = torch.zeros(BATCH, write_heads, SLOTS, SLOTS)
    write_weights, read_weights = torch.zeros_like(precedence), torch.zeros(BATCH, read_heads, SLOTS)
    state = [memory, usage, precedence, link, write_weights, read_weights]
    reads = torch.zeros(BATCH, read_heads, WORD)
    full = picked = alike = False
    for epoch, (generator, choices) in enumerate(epochs(backend, steps)):
        masked, deallocates, sharpened, oneplus, clipped = (choices.random() < 0.5 for _ in range(5))
        floor, clip = (0.1 if choices.random() < 0.5 else 0.0), 20.0 if clipped else torch.inf
        options = [masked, deallocates, sharpened, oneplus, False, floor, clip, choices.choice(NORMS), 1e-6]
        options.append(choices.choice((1e-6, 0.0)))  # of the allocation
        shapes = interface_shapes(WORD, read_heads, write_heads, masked, sharpened)
        interfaces = vectors(sum(torch.Size(shape).numel() for shape in shapes.values()), clipped, generator)
        fields = split(interfaces, shapes)
        for pushed in (
            fields.read_strengths, fields.write_strengths, fields.free_gates, fields.allocation_gates,
            fields.write_gates,
        ):  # fmt: skip
            push(pushed, generator)
        sums: dict[str, list[Tensor]] = {name: [] for name in ("written", "read", "precedence", "rows", "columns")}
        for interface in interfaces:
            step_(interface, *state, reads, *options)
            for name, weights, dim in (
                ("written", write_weights, -1), ("read", read_weights, -1), ("precedence", precedence, -1),
                ("rows", link, -1), ("columns", link, -2),
            ):  # fmt: skip
                sums[name].append(weights.sum(dim))
        assert all(tensor.isfinite().all() for tensor in (*state, reads)), (epoch, options)
        for name, values in sums.items():
            check_sums(f"{name} in epoch {epoch} with {options}", values)
        assert (usage >= 0).all() and (usage <= 1).all(), (epoch, options)
        for weights in (precedence, link, write_weights, read_weights):
            assert (weights >= LEAST).all() and (weights <= MOST_SUM).all(), (epoch, options)
        assert not link.diagonal(dim1=-2, dim2=-1).any()
        full |= bool((usage == 1).all(-1).any())
        picked |= bool((read_weights == 1).any())
        alike |= bool((read_weights == 1 / SLOTS).all(-1).any())
        if epoch % 10 == 0:
            tensors = [interfaces[0], *state]
            check_gradients(lambda *t, o=options: fastmem.dnc_step(*t, *o, backend=backend), tensors)
    assert backend == "reference" or (full and picked and alike), "the run is less extreme than it means to be"


@RUNS
@pytest.mark.parametrize("heads", ["rw", "rrw", "wwr", "rwrw"])
def test_ntm_step(heads: str, backend: str, steps: int) -> None:
    step_ = in_place(backend, "ntm_step_", ntm_step)
    memory = torch.zeros(BATCH, SLOTS, WORD)
    weights = torch.rand(BATCH, len(heads), SLOTS, generator=torch.Generator().manual_seed(0)).softmax(-1)
    reads = torch.zeros(BATCH, heads.count("r"), WORD)
    for epoch, (generator, choices) in enumerate(epochs(backend, steps)):
        joint_writes, reversed_shift, in_powers, clipped = (choices.random() < 0.5 for _ in range(4))
        clip, norm = 20.0 if clipped else torch.inf, choices.choice(NORMS)
        options = [heads, joint_writes, reversed_shift, in_powers, EPS[in_powers], clip, norm, 1e-6]
        taps = 2 * choices.randrange(3) + 1
        interfaces = vectors(ntm_step.interface_size(heads, WORD, taps), clipped, generator)
        first = 0
        for kind in heads:
            for place in (WORD, WORD + 1, WORD + 2 + taps):  # strength, gate and sharpness
                push(interfaces[..., first + place], generator)
            first += ntm_step.interface_size(kind, WORD, taps)
        sums = []
        for interface in interfaces:
            step_(interface, memory, weights, reads, *options)
            sums.append(weights.sum(-1))
        assert all(tensor.isfinite().all() for tensor in (memory, weights, reads)), (epoch, options)
        check_sums(f"epoch {epoch} with {options}", sums)
        assert (weights >= 0).all() and (weights <= MOST_SUM).all(), (epoch, options)
        if epoch % 10 == 0:
            tensors = [interfaces[0], memory, weights]
            public = [heads, joint_writes, reversed_shift, "power" if in_powers else "softmax", *options[4:]]
            check_gradients(lambda *t, o=public: fastmem.ntm_step(*t, *o, backend=backend), tensors)
