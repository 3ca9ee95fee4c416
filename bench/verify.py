"""Part b of the main job: every op on every backend, values and gradients, against the reference in float64.

The rule: the error may be twice (gradients three times) that of the plain PyTorch formula in the same dtype, plus one
rounding of the output's dtype, both on the same draws. `python -m bench.verify triton` prints the rows of a backend, a
JSON object a line.
"""

import importlib
import importlib.util
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastmem
from fastmem import BackendUnavailable
from tests.helpers import is_differentiable

OPS = (
    "temporal_linkage",
    "content_addressing",
    "content_read",
    "program_lookup",
    "program_mix",
    "usage_update",
    "allocation",
    "memory_write",
    "weighted_read",
    "sharpen",
    "location_addressing",
    "cached_attention",
    "dnc_step",
    "ntm_step",
)
# The arguments that the in-place form overwrites. In that of a step the last of them is for its reads.
WRITTEN = {
    "temporal_linkage": slice(0, 2),
    "memory_write": slice(0, 1),
    "dnc_step": slice(1, 8),
    "ntm_step": slice(1, 4),
}
DRAWS = 5  # of each case, as in tests/ops/suite.py
MOST_INTERPRETED = 4  # cases of an op


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


def _errors(actual: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [_error(mine, right) for mine, right in zip(actual, exact, strict=True)]


def _worst(draws: list[list[float]]) -> list[float]:
    """The largest error of each result over the draws."""
    return [max(errors) for errors in zip(*draws, strict=True)]


def _double(inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.double() if is_differentiable(value) else value for name, value in inputs.items()}


def in_place(op: str, arguments: Iterable[Any], outputs: Sequence[Tensor]) -> list[Any]:
    """The arguments of the in-place form, made of those of the other form and its outputs."""
    made = [value.clone() if isinstance(value, Tensor) else value for value in arguments]
    if op.endswith("_step"):
        written = WRITTEN[op]
        made.insert(written.stop - 1, torch.empty_like(outputs[written.stop - written.start - 1]))
    return made


class Oracle:
    """A case: its exact results, and the error that is allowed for each of them.

    The plain formula can be exact by luck on a few numbers, so the largest error over several draws counts, the same
    draws on both sides. The reference is held to autograd's gradients of the formula, which checks its closed form; the
    kernels follow that form and are held to the worse of the two.
    """

    def __init__(self, op: str, arguments: dict[str, Any]) -> None:
        self.op = op
        make = importlib.import_module(f"tests.cases.{op}").make
        formula = getattr(importlib.import_module(f"fastmem.reference.{op}"), op)
        closed_form = partial(getattr(torch.ops.fastmem, op), backend="reference")
        shapes = [out.shape for out in _results(formula, make(**arguments), None)]
        self.values = len(shapes)
        self.draws, self.exact, by_autograd, by_closed_form = [], [], [], []
        for seed in range(DRAWS):
            inputs = make(**arguments, seed=seed)
            generator = torch.Generator().manual_seed(seed)
            upstream = [torch.randn(shape, generator=generator) for shape in shapes]
            exact, plain = _results(formula, _double(inputs), upstream), _results(formula, inputs, upstream)
            by_autograd.append(_errors(plain, exact))
            by_closed_form.append(_errors(_results(closed_form, inputs, upstream), exact))
            self.draws.append((inputs, upstream))
            self.exact.append(exact)
        self.largest = [max(map(_largest, results)) for results in zip(*self.exact, strict=True)]
        factors = [2 if index < self.values else 3 for index in range(len(plain))]
        rounding = [torch.finfo(mine.dtype).eps * largest for mine, largest in zip(plain, self.largest, strict=True)]

        def allowed(draws: list[list[float]]) -> list[float]:
            return [f * error + one for f, error, one in zip(factors, _worst(draws), rounding, strict=True)]

        self.allowed = {"reference": allowed(by_autograd), "kernel": allowed(by_autograd + by_closed_form)}

    def check(self, backend: str, device: str = "cpu") -> dict[str, Any]:
        """Errors of one backend, relative to the largest number of each result.

        Raises BackendUnavailable where the backend does not serve the case.
        """
        worst = _worst([self._errors_of(draw, backend, device) for draw in range(DRAWS)])
        allowed = self.allowed["reference" if backend == "reference" else "kernel"]
        shares = [error / bound if error else 0.0 for error, bound in zip(worst, allowed, strict=True)]
        relative = [error / (largest or 1.0) for error, largest in zip(worst, self.largest, strict=True)]
        return {
            "value_error": max(relative[: self.values]),
            "gradient_error": max(relative[self.values :], default=0.0),
            "of_allowed": max(shares),
        }

    def _errors_of(self, draw: int, backend: str, device: str) -> list[float]:
        inputs, upstream = self.draws[draw]
        inputs = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}
        function = partial(getattr(torch.ops.fastmem, self.op), backend=backend)
        actual = _results(function, inputs, upstream)
        errors = _errors([mine.cpu() for mine in actual], self.exact[draw])
        if self.op in WRITTEN:
            arguments = in_place(self.op, inputs.values(), actual)
            reads = getattr(torch.ops.fastmem, f"{self.op}_")(*arguments, backend=backend) or ()
            for index, mine in enumerate((*arguments[WRITTEN[self.op]], *reads)):
                errors[index] = max(errors[index], _error(mine.cpu(), self.exact[draw][index]))
        return errors


def cases(op: str, interpreted: bool = False) -> dict[str, dict[str, Any]]:
    """Triton's interpreter is slow and gets a few small ones; tests/kernels runs the others."""
    module = importlib.import_module(f"tests.cases.{op}")
    return {
        name: module.CASES[name] for name in (module.INTERPRETED[:MOST_INTERPRETED] if interpreted else module.CASES)
    }


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
                        row |= oracle.check(backend, device)
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
