import fastmem
from fastmem.reference import content_addressing as reference
from tests.cases import content_addressing as cases
from tests.ops.suite import OpSuite


class TestContentAddressing(OpSuite):
    op = staticmethod(fastmem.content_addressing)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("memory", "keys", "strengths")
    strided = "memory"

    def test_gradcheck(self, small_case, monkeypatch):
        """Away from the zero row, where three of the norms have a kink."""
        inputs = self.inputs
        monkeypatch.setattr(self, "inputs", lambda case: {k: v + 0.1 if k == "memory" else v for k, v in inputs(case).items()})
        super().test_gradcheck(small_case)
