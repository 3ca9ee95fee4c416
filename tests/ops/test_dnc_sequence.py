import pytest

import fastmem
from fastmem.reference import dnc_sequence as reference
from tests.cases import dnc_sequence as cases
from tests.ops.sequences import SequenceSuite


class TestDNCSequence(SequenceSuite):
    public_op = staticmethod(fastmem.dnc_sequence)
    memory = reference.DNCMemory
    reference = reference
    cases = cases
