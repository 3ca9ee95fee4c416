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
