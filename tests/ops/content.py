"""What the tests of both content ops share."""

from tests.ops.suite import OpSuite


class ContentSuite(OpSuite):
    def test_gradcheck(self, small_case, monkeypatch):
        """Away from the zero row, where three of the norms have a kink."""
        inputs = self.inputs
        monkeypatch.setattr(self, "inputs", lambda case: {**(values := inputs(case)), "memory": values["memory"] + 0.1})
        super().test_gradcheck(small_case)
