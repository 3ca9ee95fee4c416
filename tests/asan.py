"""Runs the op tests on the sanitized extension of the current folder, see `make asan`."""

import sys
from pathlib import Path

import pytest

import fastmem

ROOT = Path(__file__).resolve().parent.parent
assert fastmem.native.module is not None and fastmem.native.module.sanitized, "expected the sanitized extension"
assert Path(fastmem.__file__).parent.parent == Path.cwd(), "expected the package of this folder, not the source tree"
sys.path.append(str(ROOT))
# What never enters the extension, or enters it often enough to take minutes here, stays out.
selection = "not compiles and not exports and not gradcheck and not long_runs"
options = ["--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml"), "-o", "pythonpath=", "-p", "no:cacheprovider"]
sys.exit(pytest.main([*options, "-k", selection, str(ROOT / "tests" / "ops")]))
