"""Part b of the main job: every op on every backend, values and gradients, against the reference in float64.

The rule: the error may be twice (gradients three times) that of the plain PyTorch formula in the same dtype, plus one
rounding of the output's dtype. `python -m bench.verify triton` prints the rows of one backend, a JSON object a line.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import fastmem
from fastmem import BackendUnavailable
from tests.helpers import is_differentiable

OPS = ("temporal_linkage", "content_addressing", "content_read", "program_lookup")
IN_PLACE = ("temporal_linkage",)
INTERPRETED_ELEMENTS = 20_000  # Triton's interpreter is slow: inputs of more elements are left to the tests


def _results(function: Any, inputs: dict[str, Any], upstream: list[Tensor] | None) -> list[Tensor]:
    """Outputs, then the gradients of the float inputs for the given upstream gradients."""
    leaves = {
        name: value.detach().clone().requires_grad_() if is_differentiable(value) else value
        for name, value in inputs.items()
    }
    outputs = function(*leaves.values())
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    if upstream is None:
        return outputs
    wanted = [leaf for leaf in leaves.values() if is_differentiable(leaf)]
    pairs = [(out, grad.to(out)) for out, grad in zip(outputs, upstream, strict=True) if out.requires_grad]
    differentiable, grads = zip(*pairs, strict=True)
    gradients = torch.autograd.grad(differentiable, wanted, grads, allow_unused=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(leaf) if gradient is None else gradient
        for leaf, gradient in zip(wanted, gradients, strict=True)
    ]


def _excess(actual: Tensor, expected: Tensor, plain: Tensor, factor: float) -> tuple[float, float]:
    """The error, and the error over what is allowed. Infinities and NaN must stand where they are expected."""
    if actual.shape != expected.shape:
        return float("inf"), float("inf")
    if actual.numel() == 0:
        return 0.0, 0.0
    finite = expected.isfinite()
    if not torch.equal(actual.double()[~finite].nan_to_num(nan=7.0), expected[~finite].nan_to_num(nan=7.0)):
        return float("inf"), float("inf")
    if not finite.any():
        return 0.0, 0.0
    target = expected[finite]
    error = (actual.double()[finite] - target).abs().max().item()
    allowed = factor * (plain.double()[finite] - target).abs().max().item()
    allowed += torch.finfo(actual.dtype).eps * target.abs().max().item()
    return error, error / allowed if error else 0.0


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if is_differentiable(value) else value for name, value in inputs.items()}


def check(op: str, inputs: dict[str, Any], backend: str, device: str = "cpu") -> dict[str, Any]:
    """Errors of one op on one case. Raises BackendUnavailable where the backend does not serve it."""
    reference = getattr(importlib.import_module(f"fastmem.reference.{op}"), op)
    registered = getattr(torch.ops.fastmem, op)
    with torch.no_grad():
        shapes = _results(reference, _double(inputs), None)
    generator = torch.Generator().manual_seed(2)
    upstream = [torch.randn(out.shape, generator=generator) for out in shapes]
    values = len(upstream)
    expected = _results(reference, _double(inputs), [grad.double() for grad in upstream])
    plain = _results(reference, inputs, upstream)
    there = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
    actual = _results(lambda *arguments: registered(*arguments, backend=backend), there, upstream)
    scores = [
        _excess(mine.cpu(), exact, formula, 2 if index < values else 3)
        for index, (mine, exact, formula) in enumerate(zip(actual, expected, plain, strict=True))
    ]
    if op in IN_PLACE:
        tensors = [value.clone() for value in there.values()]
        reads = getattr(torch.ops.fastmem, f"{op}_")(*tensors, backend=backend)
        in_place = (tensor.cpu() for tensor in (tensors[0], tensors[1], *reads))
        scores += [_excess(*three, 2) for three in zip(in_place, expected[:4], plain[:4], strict=True)]
    return {
        "value_error": max(error for error, _ in scores[:values]),
        "gradient_error": max((error for error, _ in scores[values : len(expected)]), default=0.0),
        "of_allowed": max(share for _, share in scores),
    }


def cases(op: str, backend: str, device: str = "cpu") -> dict[str, dict[str, Any]]:
    module = importlib.import_module(f"tests.cases.{op}")
    made = {name: module.make(**arguments) for name, arguments in module.CASES.items()}
    if backend != "triton" or device != "cpu":
        return made

    def size(inputs: dict[str, Any]) -> int:
        return sum(value.numel() for value in inputs.values() if isinstance(value, Tensor))

    return {name: made[name] for name in module.INTERPRETED if size(made[name]) <= INTERPRETED_ELEMENTS}


def count(backend: str) -> int:
    return sum(len(cases(op, backend)) for op in OPS)


def rows(backend: str, device: str = "cpu") -> Iterator[dict[str, Any]]:
    for op in OPS:
        for name, inputs in cases(op, backend, device).items():
            row: dict[str, Any] = {"op": op, "backend": backend, "case": name}
            try:
                row |= check(op, inputs, backend, device)
                row["ok"] = row["of_allowed"] <= 1
            except BackendUnavailable as refusal:
                row |= {"ok": None, "reason": str(refusal)}
            except Exception as error:  # a crash of one case is a failed row, not the end of the table
                row |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
            yield row


def instruction_sets() -> list[str]:
    return list(fastmem.native.module.isas()) if fastmem.native.module else []


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The C++ kernels of one instruction set, for a while."""
    assert fastmem.native.module
    before = fastmem.native.module.isa()
    fastmem.native.module.set_isa(name)
    try:
        yield
    finally:
        fastmem.native.module.set_isa(before)


def triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


if __name__ == "__main__":
    torch.set_num_threads(1)
    for row in rows(sys.argv[1]):
        print(json.dumps(row), flush=True)
