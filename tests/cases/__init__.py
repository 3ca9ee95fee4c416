"""Named inputs of each op, shared by tests and benchmarks.

A module has `make(...)`, the inputs of one case in the op's positional order; `CASES`, name to the keyword arguments
of `make`; and `INTERPRETED`, the names that are small enough for Triton's interpreter.
"""
