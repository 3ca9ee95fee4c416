"""The compiled extension, or the reason why there is none."""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # noqa: F401  (the extension links to its libraries, so they must be loaded first)

from fastmem import _env
from fastmem._errors import ExtensionMismatch, ExtensionNotBuilt
from fastmem._version import __version__

REINSTALL = "pip install --no-build-isolation --force-reinstall --no-deps fastmem-kernels"
PURE = f"a pure-Python install; to build it: {REINSTALL}"
CHECKOUT = (
    "a pure-Python install, or a checkout, which hides an installed fastmem; run elsewhere, or build it here: "
    "pip install --no-build-isolation -e ."
)


def _load() -> ModuleType:
    try:
        _C: Any = import_module("fastmem._C")
    except ModuleNotFoundError as error:
        is_checkout = (Path(__file__).parents[1] / "CMakeLists.txt").exists()
        raise ExtensionNotBuilt(
            f"looked for the module fastmem._C and found none ({CHECKOUT if is_checkout else PURE})"
        ) from error
    except ImportError as error:
        raise ExtensionMismatch(
            f"found fastmem._C but it does not load here ({error}); reinstall: {REINSTALL}"
        ) from error
    if _C.__version__ != __version__:
        raise ExtensionMismatch(
            f"expected fastmem._C of version {__version__}, got {_C.__version__}; reinstall: {REINSTALL}"
        )
    if _env.cpu_isa() != "native":
        _C.set_isa(min(_env.cpu_isa(), _C.isas()[-1], key=["baseline", "avx2", "avx512"].index))
    return _C


module: ModuleType | None = None
failure: ImportError | None = None
try:
    module = _load()
except ImportError as error:
    failure = error


def empty_cache() -> int:
    """Returns to the system the memory that is kept for large results; gives its size in bytes.

    It is at most a sixteenth of the machine's memory, between 256 MiB and 2 GiB.
    """
    return module.empty_cache() if module else 0


def raise_interrupt() -> None:
    """Raises what a signal handler raised, as on ctrl-C, while C++ ran: C++ stopped, and said so by an error alone."""
    if module:
        module.raise_interrupt()


def build_info() -> dict[str, str] | None:
    """Version, compiler and instruction sets of the C++ extension; None where there is none."""
    if module is None:
        return None
    return {
        "version": module.__version__,
        "compiler": module.compiler,
        "instruction set": module.isa(),
        "instruction sets": ", ".join(module.isas()),
        "sanitized": str(module.sanitized),
    }
