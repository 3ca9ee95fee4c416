"""Runs the op tests on the extension of the current folder (see `make asan`); plain `pytest` would find the source tree first."""

import sys
from pathlib import Path

import pytest

import fastmem

ROOT = Path(__file__).resolve().parent.parent
assert fastmem.native.module is not None and fastmem.native.module.sanitized, "expected the sanitized extension"
assert ROOT not in Path(fastmem.__file__).resolve().parents or "build" in Path(fastmem.__file__).parts
sys.path.append(str(ROOT))
sys.exit(pytest.main(["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-o", "pythonpath=", "-p", "no:cacheprovider",
                      "-k", "not compiles and not exports and not gradcheck", str(ROOT / "tests" / "ops")]))  # fmt: skip
