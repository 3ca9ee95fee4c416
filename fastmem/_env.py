"""The environment variables of fastmem, all of them. The README holds the same table.

setup.py loads this file alone, by path, so it imports nothing but the standard library.
"""

import os
from functools import cache


def _choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    value = os.environ.get(name, "") or default
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


@cache
def backend() -> str | None:
    """FASTMEM_BACKEND: the backend every op must use; unset lets each op choose. Read once."""
    return _choice("FASTMEM_BACKEND", "auto", ("auto", "reference", "cpp", "triton")).replace("auto", "") or None


def cpu_isa() -> str:
    """FASTMEM_CPU_ISA: the widest instruction set the C++ kernels may use."""
    return _choice("FASTMEM_CPU_ISA", "native", ("native", "avx512", "avx2", "baseline"))


def native() -> bool:
    """FASTMEM_NATIVE (build): 0 installs without the C++ extension."""
    return _choice("FASTMEM_NATIVE", "1", ("0", "1")) == "1"


def build_torch() -> bool:
    """FASTMEM_BUILD_TORCH (build): 1 lets an isolated build install a torch of its own."""
    return _choice("FASTMEM_BUILD_TORCH", "0", ("0", "1")) == "1"


def debug_build() -> str:
    """FASTMEM_DEBUG_BUILD (build): asan compiles the extension with address and undefined-behaviour checks."""
    return _choice("FASTMEM_DEBUG_BUILD", "off", ("off", "asan"))
