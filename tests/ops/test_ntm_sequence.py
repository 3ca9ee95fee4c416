import fastmem
from fastmem.reference import ntm_sequence as reference
from tests.cases import ntm_sequence as cases
from tests.ops.sequences import SequenceSuite


class TestNTMSequence(SequenceSuite):
    public_op = staticmethod(fastmem.ntm_sequence)
    memory = reference.NTMMemory
    reference = reference
    cases = cases
