"""The tests that the ops of stored programs pass beside those of all ops."""

from typing import Any

import pytest
import torch

import fastmem
from tests.helpers import as_tuple, instruction_set, isas, threads
from tests.ops.suite import OpSuite, native


class ProgramSuite(OpSuite):
    autocast_keeps = ("weights", "biases")
    strided = "weights"

    def inputs(self, case: str, dtype: torch.dtype = torch.float64, **overrides: Any) -> dict[str, Any]:
        """Low-precision programs go with float32 only; more samples, as the error rule compares two largest errors."""
        if "program_dtype" in self.cases.CASES[case]:
            return super().inputs(case, torch.float32, **{"batch": 16, **overrides})
        return super().inputs(case, dtype, **overrides)

    def test_nan_stays_in_its_sample(self) -> None:
        values = self.inputs("plain", torch.float32)
        clean = self.run(values)
        for name in self.batched:
            poisoned = {**values, name: values[name].clone()}
            poisoned[name][1] = float("nan")
            outputs, gradients = self.run(poisoned)
            count = len(self.batched)
            assert outputs[0][1].isnan().all()
            for a, e in zip((*outputs, *gradients[:count]), (*clean[0], *clean[1][:count]), strict=True):
                assert torch.equal(a[[0, 2, 3]], e[[0, 2, 3]])

    @native
    @pytest.mark.parametrize("isa", isas())
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_samples_and_threads_do_not_see_each_other(self, isa: str, dtype: torch.dtype) -> None:
        """Cut by samples or by threads, forward and gradients of samples keep every bit."""
        values = self.cases.make(70, 200, 130, 3, dtype=dtype)
        with instruction_set(isa):
            with threads(1):
                whole = self.run(values)
            with threads(2):
                shared = self.run(values)
            parts = [as_tuple(self.op(**{**values, **{name: values[name][rows] for name in self.batched}}))
                     for rows in (slice(0, 1), slice(1, 6), slice(6, 23), slice(23, 70))]  # fmt: skip
        for a, e in zip((*shared[0], *shared[1]), (*whole[0], *whole[1]), strict=True):
            assert torch.equal(a, e)
        for part, e in zip(zip(*parts, strict=True), whole[0], strict=True):
            assert torch.equal(torch.cat(part), e)

    @native
    @pytest.mark.parametrize("biases", [True, False])
    def test_large_products_are_those_of_torch(self, biases: bool) -> None:
        values = self.cases.make(257, 520, 521, 2, biases=biases, dtype=torch.float64)
        self.agree(self.run(values, "cpp"), self.oracle(values), values)
        with instruction_set("baseline"):  # narrow vectors go there sooner
            values = self.cases.make(65, 260, 261, 2, biases=biases, dtype=torch.float64)
            values["weights"] = values["weights"].mT.contiguous().mT
            self.agree(self.run(values, "cpp"), self.oracle(values), values)

    def test_low_precision_programs_go_to_the_reference_on_a_cpu(self) -> None:
        values = list(self.cases.make(program_dtype=torch.bfloat16).values())
        assert fastmem.explain(self.op, *values).backend == "reference"
        with pytest.raises(fastmem.BackendUnavailable, match=r"float32 and float64, got torch\.bfloat16"):
            self.op(*values, backend="cpp")
        with pytest.raises(TypeError, match=r"weights: expected dtype torch.float64, got torch.float32"):
            self.op(**self.cases.make(dtype=torch.float64, program_dtype=torch.float32))
