"""Part b of the main job: every op on every backend, values and gradients, against the reference in float64.

The rule: the error may be twice (gradients three times) that of the plain PyTorch formula in the same dtype, plus one
rounding of the output's dtype. `python -m bench.verify triton` prints the rows of a backend, a JSON object a line.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmem
from fastmem import BackendUnavailable
from tests.helpers import is_differentiable

OPS = ("temporal_linkage", "content_addressing", "content_read", "program_lookup", "sharpen", "location_addressing")
IN_PLACE = ("temporal_linkage",)
CHECKED, INTERPRETED = 3, 1  # draws of each case that a backend computes


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


def _error(actual: Tensor, exact: Tensor) -> float:
    """Largest error; infinite where infinities and NaN do not stand where they are expected."""
    finite = exact.isfinite()
    special = [value.double()[~finite].nan_to_num(nan=7.0) for value in (actual, exact)]
    if not torch.equal(*special) or not actual[finite].isfinite().all():
        return float("inf")
    return (actual.double() - exact)[finite].abs().max().item() if finite.any() else 0.0


def _largest(exact: Tensor) -> float:
    finite = exact[exact.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if is_differentiable(value) else value for name, value in inputs.items()}


class Oracle:
    """A case: its exact results, and the error that is allowed for each of them.

    The plain formula can be exact by luck on a few numbers, so small cases are drawn up to 32 times, and the largest
    error of the plain formula counts. A backend computes the first few draws.
    """

    def __init__(self, op: str, arguments: dict[str, Any]) -> None:
        self.op = op
        make = importlib.import_module(f"tests.cases.{op}").make
        reference = getattr(importlib.import_module(f"fastmem.reference.{op}"), op)
        self.draws, self.exact, allowed = [], [], []
        elements = sum(value.numel() for value in make(**arguments).values() if isinstance(value, Tensor))
        for seed in range(max(CHECKED, min(32, 2**16 // max(elements, 1)))):
            inputs = make(**arguments, seed=seed)
            with torch.no_grad():
                outputs = _results(reference, _double(inputs), None)
            generator = torch.Generator().manual_seed(seed)
            upstream = [torch.randn(out.shape, generator=generator) for out in outputs]
            exact = _results(reference, _double(inputs), [grad.double() for grad in upstream])
            plain = _results(reference, inputs, upstream)
            allowed.append([
                (2 if index < len(outputs) else 3) * _error(mine, right)
                + torch.finfo(mine.dtype).eps * _largest(right)
                for index, (mine, right) in enumerate(zip(plain, exact, strict=True))
            ])  # fmt: skip
            if seed < CHECKED:
                self.draws.append((inputs, upstream))
                self.exact.append(exact)
        self.allowed = [max(bounds) for bounds in zip(*allowed, strict=True)]
        self.scale = [max(map(_largest, results)) or 1.0 for results in zip(*self.exact, strict=True)]

    def check(self, backend: str, device: str = "cpu", draws: int = CHECKED) -> dict[str, Any]:
        """Errors of one backend on the first draws, relative to the largest number of each result.

        Raises BackendUnavailable where the backend does not serve the case.
        """
        values = len(self.draws[0][1])
        found = [self._errors(draw, backend, device) for draw in range(draws)]
        largest = [max(errors) for errors in zip(*found, strict=True)]
        shares = [error / bound if error else 0.0 for error, bound in zip(largest, self.allowed, strict=True)]
        relative = [error / scale for error, scale in zip(largest, self.scale, strict=True)]
        return {
            "value_error": max(relative[:values]),
            "gradient_error": max(relative[values:], default=0.0),
            "of_allowed": max(shares),
        }

    def _errors(self, draw: int, backend: str, device: str) -> list[float]:
        inputs, upstream = self.draws[draw]
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        function = partial(getattr(torch.ops.fastmem, self.op), backend=backend)
        actual = _results(function, inputs, upstream)
        errors = [_error(mine.cpu(), right) for mine, right in zip(actual, self.exact[draw], strict=True)]
        if self.op in IN_PLACE:
            tensors = [value.clone() for value in inputs.values()]
            reads = getattr(torch.ops.fastmem, f"{self.op}_")(*tensors, backend=backend)
            for index, mine in enumerate((tensors[0], tensors[1], *reads)):
                errors[index] = max(errors[index], _error(mine.cpu(), self.exact[draw][index]))
        return errors


def cases(op: str, interpreted: bool = False) -> dict[str, dict[str, Any]]:
    """Triton's interpreter is slow and gets the small ones."""
    module = importlib.import_module(f"tests.cases.{op}")
    return {name: module.CASES[name] for name in (module.INTERPRETED if interpreted else module.CASES)}


def count(interpreted: bool = False) -> int:
    return sum(len(cases(op, interpreted)) for op in OPS)


def rows(targets: list[str], device: str = "cpu") -> Iterator[dict[str, Any]]:
    """A row for each case and target: "reference", "triton", or "cpp" with an instruction set after it."""
    interpreted = targets == ["triton"] and device == "cpu"
    for op in OPS:
        for name, arguments in cases(op, interpreted).items():
            oracle = Oracle(op, arguments)
            for target in targets:
                row: dict[str, Any] = {"op": op, "backend": target, "case": name}
                backend, _, isa = target.partition(" ")
                try:
                    with instruction_set(isa) if isa else nullcontext():
                        row |= oracle.check(backend, device, INTERPRETED if interpreted else CHECKED)
                    row["ok"] = row["of_allowed"] <= 1
                except BackendUnavailable as refusal:
                    row |= {"ok": None, "reason": str(refusal)}
                except Exception as error:  # a crash of one case is a failed row, not the end of the table
                    row |= {"ok": False, "reason": f"{type(error).__name__}: {error}"}
                yield row


def native_targets() -> list[str]:
    """What runs in this process: the reference, and the C++ kernels of every instruction set of this processor."""
    return ["reference", *(f"cpp {isa}" for isa in (fastmem.native.module.isas() if fastmem.native.module else ()))]


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
    for row in rows(sys.argv[1:]):
        print(json.dumps(row), flush=True)
