"""What the tests of both content ops share."""

import ctypes
from typing import Any

import pytest
import torch

from tests.helpers import threads
from tests.ops.suite import OpSuite, native


class ContentSuite(OpSuite):
    def smooth_inputs(self, case: str) -> dict[str, Any]:
        """Away from the zero row, where three of the norms have a kink."""
        values = self.inputs(case)
        return {**values, "memory": values["memory"] + 0.1}

    @native
    def test_calls_leave_no_memory_behind(self):
        """A string argument once cost 48 bytes a call, and those kept freed blocks between them from being used."""
        libc = ctypes.CDLL(None)
        if not hasattr(libc, "mallinfo2"):
            pytest.skip("needs glibc 2.33")

        class Heap(ctypes.Structure):
            _fields_ = [(f"field{i}", ctypes.c_size_t) for i in range(10)]

        libc.mallinfo2.restype = Heap
        op = getattr(torch.ops.fastmem_cpu, self.op.__name__)
        values = tuple(self.inputs("plain", torch.float32).values())
        with threads(1):
            used = []
            for calls in (100, 2000):
                for _ in range(calls):
                    op(*values)
                used.append(libc.mallinfo2().field7)  # bytes in use
        assert used[1] - used[0] < 2000 * 8
