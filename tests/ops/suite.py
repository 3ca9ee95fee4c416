"""The tests that every op passes. A test file derives a class from OpSuite and adds the laws and errors of its op."""

import copy
import io
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmem
from tests.helpers import (
    as_tuple,
    assert_close,
    assert_no_worse,
    converted,
    instruction_set,
    is_differentiable,
    isas,
    run_with_gradients,
    threads,
)

native = pytest.mark.skipif(fastmem.native.module is None, reason="a pure-Python install has no C++ kernels")


def has_cpp(op: str) -> bool:
    return fastmem.native.module is not None and hasattr(torch.ops.fastmem_cpu, op)


def furthest(candidates: list[Tensor], truth: Tensor) -> Tensor:
    return max(candidates, key=lambda candidate: (candidate - truth).nan_to_num().abs().sum().item())


class OpSuite:
    op: Callable[..., Any]  # the public function, wrapped in staticmethod
    reference: ModuleType  # fastmem.reference.<op>
    cases: ModuleType  # tests.cases.<op>
    differentiable_outputs: int
    batched: tuple[str, ...]  # arguments with a batch dimension of their own
    autocast_keeps: tuple[str, ...] = ()  # arguments that autocast leaves in low precision
    strided: str  # the big argument, tried with every stride and past 2^31 elements
    alone: tuple[int, ...] | None = None  # outputs of which each is differentiated alone; None: every one

    def backends(self) -> tuple[str, ...]:
        return ("reference", "cpp") if has_cpp(self.op.__name__) else ("reference",)

    def inputs(self, case: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> dict[str, Any]:
        return self.cases.make(**{**self.cases.CASES[case], **overrides}, dtype=dtype)

    def smooth_inputs(self, case: str) -> dict[str, Any]:
        """Inputs where the op has a derivative."""
        return self.inputs(case)

    def low_precision(self, case: str) -> bool:
        return any(is_differentiable(v) and v.itemsize == 2 for v in self.inputs(case).values())

    def plain(self, *values: Any) -> Any:
        """The reference itself, outside the op: plain PyTorch under autograd."""
        return getattr(self.reference, self.op.__name__)(*values)

    def own(self, values: Any) -> tuple[Any, ...]:
        """The arguments of the op itself, where they are not the function's."""
        return tuple(values)

    def by_sample(self, name: str, value: Tensor) -> Tensor:
        """An argument or an output with the batch first."""
        return value

    def run(self, values: dict[str, Any], backend: str | None = None) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        if backend == "cpp" and not has_cpp(self.op.__name__):
            pytest.skip(f"the C++ extension has no {self.op.__name__}")
        return run_with_gradients(
            lambda *arguments: self.op(*arguments, backend=backend), list(values.values()), self.differentiable_outputs
        )

    def oracle(self, values: dict[str, Any]) -> tuple[tuple[Tensor, ...], list[Tensor]]:
        return run_with_gradients(self.plain, list(values.values()), self.differentiable_outputs)

    def public(self, values: dict[str, Any]) -> list[Any]:
        """The arguments of the public function, where they are not the op's own."""
        return list(values.values())

    def names(self, values: dict[str, Any]) -> list[str]:
        return [name for name, value in values.items() if is_differentiable(value)]

    def agree(self, actual: Any, expected: Any, values: dict[str, Any], bound: float = 1e-12) -> None:
        for i, (a, e) in enumerate(zip(actual[0], expected[0], strict=True)):
            assert_close(a, e, bound, f"output {i}")
        for name, a, e in zip(self.names(values), actual[1], expected[1], strict=True):
            assert_close(a, e, bound, f"gradient of {name}")

    @native
    @pytest.mark.parametrize("isa", isas())
    def test_float64_equals_autograd_of_the_reference(self, case: str, isa: str) -> None:
        if self.low_precision(case):
            pytest.skip("a low-precision bank goes to the reference on a CPU")
        values = self.inputs(case)
        with instruction_set(isa):
            self.agree(self.run(values, "cpp"), self.oracle(values), values)

    def test_closed_form_backward_equals_autograd(self, case: str) -> None:
        if self.low_precision(case):
            pytest.skip("rounds the gradient of the bank: see tests/bench/test_verify.py")
        values = self.inputs(case)
        self.agree(self.run(values, "reference"), self.oracle(values), values)

    @native
    @pytest.mark.parametrize("isa", isas())
    def test_float32_is_no_worse_than_the_plain_formula(self, case: str, isa: str) -> None:
        """The formula in PyTorch: under autograd, or in the closed form that the kernels follow; the worse of the two.

        Over the same five draws on all sides: the error of a handful of numbers is a matter of luck.
        """
        if self.low_precision(case):
            pytest.skip("served by the reference on a CPU: see tests/bench/test_verify.py")
        drawn = []
        for seed in range(5):
            values = self.inputs(case, torch.float32, seed=seed)
            closed_form = self.run(values, "reference")
            with instruction_set(isa):
                actual = self.run(values, "cpp")
            exact = self.oracle(dict(zip(values, converted(list(values.values()), torch.float64), strict=True)))
            sides = (actual, exact, self.oracle(values), closed_form)
            drawn.append([[*outputs[: len(actual[0])], *gradients] for outputs, gradients in sides])
        names = [*(f"output {i}" for i in range(len(actual[0]))), *(f"gradient of {n}" for n in self.names(values))]
        for i, name in enumerate(names):
            ours, truth, *plain = (torch.cat([draw[side][i].flatten() for draw in drawn]) for side in range(4))
            assert drawn[0][0][i].shape == drawn[0][1][i].shape
            factor = 2 if name.startswith("output") else 3
            assert_no_worse(ours, truth, furthest(plain, truth), factor, name)

    def test_gradcheck(self, small_case: str) -> None:
        if self.low_precision(small_case):
            pytest.skip("a numerical gradient needs float64")
        values = [v.requires_grad_() if is_differentiable(v) else v for v in self.smooth_inputs(small_case).values()]
        for backend in self.backends():
            torch.autograd.gradcheck(
                lambda *arguments, backend=backend: as_tuple(self.op(*arguments, backend=backend))[
                    : self.differentiable_outputs
                ],
                values,
                fast_mode=True,
            )

    def test_opcheck(self, small_case: str) -> None:
        values = [v.requires_grad_() if is_differentiable(v) else v for v in self.inputs(small_case).values()]
        torch.library.opcheck(getattr(torch.ops.fastmem, self.op.__name__).default, self.own(values))

    def test_compiles_without_graph_breaks(self) -> None:
        values = self.inputs("plain", torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(self.op, fullgraph=True, backend="aot_eager")
        self.agree(
            run_with_gradients(compiled, list(values.values()), self.differentiable_outputs), self.run(values), values
        )

    def test_exports_saves_and_loads(self) -> None:
        values = self.inputs("plain", torch.float32)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        rest = {name: value for name, value in values.items() if not isinstance(value, Tensor)}

        class Module(torch.nn.Module):
            def forward(module, *arguments: Tensor) -> Any:
                return self.op(**dict(zip(tensors, arguments, strict=True)), **rest)

        file = io.BytesIO()
        torch.export.save(torch.export.export(Module(), tuple(tensors.values())), file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        for a, e in zip(as_tuple(loaded(*tensors.values())), as_tuple(self.op(**values)), strict=True):
            assert torch.equal(a, e)

    def test_vmap_equals_a_loop(self, small_case: str) -> None:
        values = self.inputs(small_case)
        others = self.inputs(small_case, seed=7)
        folded = [name for name in self.batched if values[name] is not None]
        stacked = {
            name: torch.stack([value, others[name]]) if name in folded else value for name, value in values.items()
        }
        in_dims = tuple(0 if name in folded else None for name in values)
        outputs = as_tuple(torch.vmap(self.op, in_dims)(*stacked.values()))
        for i, sample in enumerate((values, {**values, **{name: others[name] for name in folded}})):
            for a, e in zip(outputs, as_tuple(self.op(**sample)), strict=True):
                assert_close(a[i], e)

    def test_func_grad_equals_autograd(self) -> None:
        values = self.inputs("plain")
        first, *rest = values.values()
        outputs = self.differentiable_outputs

        def loss(argument: Tensor) -> Tensor:
            return torch.stack([out.square().sum() for out in as_tuple(self.op(argument, *rest))[:outputs]]).sum()

        leaf = first.clone().requires_grad_()
        assert_close(torch.func.grad(loss)(first), torch.autograd.grad(loss(leaf), leaf)[0])

    def test_func_grad_names_wrong_arguments(self) -> None:
        values = self.inputs("plain")
        first, *tensors = (name for name, value in values.items() if is_differentiable(value))
        wrong = {**values, tensors[0]: torch.cat([values[tensors[0]]] * 2)}
        with pytest.raises(ValueError, match=r"expected shape .*got"):
            torch.func.grad(lambda x: as_tuple(self.op(**{**wrong, first: x}))[0].sum())(values[first])

    def test_forward_mode_derivative_equals_the_reference(self) -> None:
        values = self.inputs("plain")
        first, *rest = values.values()
        tangent = torch.ones_like(first)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(first, tangent)
            found, expected = as_tuple(self.op(dual, *rest)), as_tuple(self.plain(dual, *rest))
            for a, e in list(zip(found, expected, strict=True))[: self.differentiable_outputs]:
                derivative, wanted = (torch.autograd.forward_ad.unpack_dual(x).tangent for x in (a, e))
                assert (derivative is None) == (wanted is None)
                if wanted is not None:
                    assert_close(derivative, wanted)

    def test_second_derivative_is_refused_by_name(self) -> None:
        values = [v.requires_grad_() if is_differentiable(v) else v for v in self.inputs("plain").values()]
        output = as_tuple(self.op(*values))[0]
        (gradient,) = torch.autograd.grad(output.square().sum(), values[0], create_graph=True)
        with pytest.raises(NotImplementedError, match=self.op.__name__):
            gradient.sum().backward()

    def test_only_what_is_asked_for_gets_a_gradient(self, small_case: str) -> None:
        """Each argument alone, through each output alone: absent gradients are None, never zeros or an error."""
        values = self.inputs(small_case)
        if self.low_precision(small_case) or not all(v.numel() for v in values.values() if isinstance(v, Tensor)):
            return
        for wanted in self.names(values):
            arguments = dict(values)
            for backend in self.backends():
                for i in range(self.differentiable_outputs) if self.alone is None else self.alone:
                    leaf = values[wanted].detach().clone().requires_grad_()
                    arguments[wanted] = leaf
                    out = as_tuple(self.op(**arguments, backend=backend))[i]
                    expected_out = as_tuple(self.plain(*arguments.values()))[i]
                    if not expected_out.requires_grad:
                        continue
                    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
                    (actual,) = torch.autograd.grad((out * weight).sum(), leaf, materialize_grads=True)
                    (expected,) = torch.autograd.grad((expected_out * weight).sum(), leaf, materialize_grads=True)
                    assert_close(actual, expected, name=f"{backend}: {wanted} through output {i}")

    def test_any_strides(self, small_case: str) -> None:
        values = self.inputs(small_case)

        def scattered(value: Any) -> Any:
            if not isinstance(value, Tensor) or value.dim() == 0:
                return value
            wide = value.new_zeros([size * 2 + 1 for size in value.shape])
            view = wide[tuple(slice(1, None, 2) for _ in value.shape)]
            return view.copy_(value)

        self.agree(self.run({name: scattered(v) for name, v in values.items()}), self.run(values), values)
        transposed = {
            name: v.transpose(-1, -2).contiguous().transpose(-1, -2) if isinstance(v, Tensor) and v.dim() > 1 else v
            for name, v in values.items()
        }
        self.agree(self.run(transposed), self.run(values), values)
        results, _ = self.run(transposed, "reference")
        assert all(result.is_contiguous() for result in results), "as the fake says, whatever the inputs' layout"

    def test_expanded_inputs(self) -> None:
        values = self.inputs("plain")
        expanded = {
            name: self.by_sample(name, (first := self.by_sample(name, v))[:1].expand_as(first))
            if name in self.batched and isinstance(v, Tensor)
            else v
            for name, v in values.items()
        }
        materialised = {name: v.clone() if isinstance(v, Tensor) else v for name, v in expanded.items()}
        for a, e in zip(as_tuple(self.op(**expanded)), as_tuple(self.op(**materialised)), strict=True):
            assert torch.equal(a, e)

    def test_spans_of_more_than_two_billion_elements(self) -> None:
        """The two samples (or rows) of the big argument lie 2^31 elements apart; pages between are never touched."""
        values = self.inputs("plain", torch.float32)
        value = values[self.strided]
        distance = 2**31
        deterministic: Any = torch.utils.deterministic  # its type does not show the setting
        poison = deterministic.fill_uninitialized_memory
        deterministic.fill_uninitialized_memory = False
        span = torch.empty((value.shape[0] - 1) * distance + value[0].numel())
        deterministic.fill_uninitialized_memory = poison
        far = span.as_strided(value.shape, (distance, *value.stride()[1:])).copy_(value)
        for a, e in zip(as_tuple(self.op(**{**values, self.strided: far})), as_tuple(self.op(**values)), strict=True):
            assert torch.equal(a, e)

    def test_reruns_are_bitwise_equal(self, small_case: str) -> None:
        wide = {"batch": 16} if self.cases.CASES[small_case].get("batch", 2) else {}  # enough for two threads
        values = self.inputs(small_case, torch.float32, **wide)
        with threads(1):
            one = self.run(values)
        with threads(2):
            two, again = self.run(values), self.run(values)
        for a, b, c in zip(one[0] + tuple(one[1]), two[0] + tuple(two[1]), again[0] + tuple(again[1]), strict=True):
            assert torch.equal(b, c)
            assert torch.equal(a, b)

    def test_nan_stays_in_its_sample(self) -> None:
        values = self.inputs("plain", torch.float32)
        clean = self.run(values)
        for name in self.batched:
            if not is_differentiable(values[name]):
                continue
            poisoned = copy.deepcopy(values)
            sample = self.by_sample(name, poisoned[name])[1]
            place = min(1, sample.numel() - 1)  # the first element may lie on a diagonal
            sample[torch.unravel_index(torch.tensor(place), sample.shape)] = float("nan")
            outputs = self.run(poisoned)
            pairs = [
                (self.by_sample(f"output {i}", a), self.by_sample(f"output {i}", e))
                for i, (a, e) in enumerate(zip(outputs[0], clean[0], strict=True))
            ]
            for a, e in pairs:
                assert torch.equal(a[0], e[0])
            assert any(a[1].isnan().any() for a, _ in pairs), f"a NaN in {name} vanished"
            for argument, a, e in zip(self.names(values), outputs[1], clean[1], strict=True):
                if argument in self.batched:
                    assert torch.equal(self.by_sample(argument, a)[0], self.by_sample(argument, e)[0])

    @native
    def test_subnormal_states(self) -> None:
        """Subnormal numbers count as zero, and the setting that makes them so ends with the call."""
        values = self.inputs("plain", torch.float32)
        tiny = {**values, self.strided: values[self.strided] * 1e-39}
        zero = {**values, self.strided: values[self.strided] * 0}
        assert tiny[self.strided].any()
        for a, e in zip(self.run(tiny, "cpp")[0], self.run(zero, "cpp")[0], strict=True):
            assert torch.equal(a, e)
        assert (torch.tensor([1e-39]) * 1.0).item() > 0

    def test_autocast_runs_in_float32(self) -> None:
        values = self.inputs("plain", torch.float32)
        half = {
            name: v.bfloat16() if is_differentiable(v) and name not in self.autocast_keeps else v
            for name, v in values.items()
        }
        rounded = {name: v.float() if is_differentiable(v) else v for name, v in half.items()}
        with torch.autocast("cpu", torch.bfloat16):
            outputs = as_tuple(self.op(**half))
        for a, e in zip(outputs, as_tuple(self.op(**rounded)), strict=True):
            assert a.dtype == torch.float32
            assert torch.equal(a, e)

    def test_wrong_arguments_are_named(self) -> None:
        values = self.inputs("plain", torch.float32)
        tensors = [name for name, value in values.items() if is_differentiable(value)]
        for name in tensors:
            with pytest.raises(TypeError, match=rf"{name}: expected dtype .*, got torch\.int64"):
                self.op(**{**values, name: values[name].long()})
            with pytest.raises(ValueError, match=rf"{name}: expected .*got"):
                self.op(**{**values, name: values[name][..., None]})
            with pytest.raises(ValueError, match=r"expected device .*, got (meta|cpu)"):
                self.op(**{**values, name: values[name].to("meta")})
            with pytest.raises(ValueError, match=rf"{name}: expected a dense tensor, got torch\.sparse_coo"):
                self.op(**{**values, name: values[name].to_sparse()})
            for wrong in ([1.0], "x", 1.0):
                with pytest.raises(TypeError, match=rf"{name}: expected a Tensor.*, got {type(wrong).__name__}"):
                    self.op(**{**values, name: wrong})
        for name in tensors[1:]:
            with pytest.raises(ValueError, match=r"expected shape .*got"):
                self.op(**{**values, name: torch.cat([values[name]] * 2)})
        with pytest.raises(TypeError, match=r"got torch\.float64"):
            self.op(**{**values, tensors[1]: values[tensors[1]].double()})
        with pytest.raises(ValueError, match="backend: expected one of"):
            self.op(**values, backend="fortran")
        with pytest.raises(TypeError, match=rf"{tensors[0]}: expected a Tensor, got NoneType"):
            self.op(**{**values, tensors[0]: None})

    def test_forced_backend_says_why_it_cannot_serve(self) -> None:
        values = self.inputs("plain")
        with pytest.raises(fastmem.BackendUnavailable, match=rf"{self.op.__name__}.*triton"):
            self.op(**values, backend="triton")
        with fastmem.use_backend("reference"):
            choice = fastmem.explain(self.op, *self.public(values))
        assert choice == ("reference", "asked for")
