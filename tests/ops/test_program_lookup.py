import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import program_lookup as reference
from tests.cases import program_lookup as cases
from tests.helpers import assert_close, instruction_set, isas
from tests.ops.suite import OpSuite, native


class TestProgramLookup(OpSuite):
    op = staticmethod(fastmem.program_lookup)
    reference = reference
    cases = cases
    differentiable_outputs = 2
    batched = ("inputs", "query", "strength")
    autocast_keeps = ("weights", "biases")
    strided = "weights"


