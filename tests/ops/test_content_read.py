import fastmem
from fastmem.reference import content_read as reference
from tests.cases import content_read as cases
from tests.ops.suite import OpSuite


class TestContentRead(OpSuite):
    op = staticmethod(fastmem.content_read)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("memory", "keys", "strengths")
    autocast_keeps = ("memory",)
    strided = "memory"
