"""Which program of a kernel runs. A fused kernel runs the programs of others one after another, and says which."""

import triton
import triton.language as tl


@triton.jit
def this_program(i_p):
    """The program asked for; None: the one that was launched."""
    if i_p is None:
        i_p = tl.program_id(0)
    return tl.to_tensor(i_p)
