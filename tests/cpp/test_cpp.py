"""Builds the C++ tests in the build folder of the extension and runs them, one test for each instruction set."""

import subprocess
from pathlib import Path

import pytest

from tests.helpers import isas

ROOT = Path(__file__).resolve().parent.parent.parent
BUILDS = sorted(ROOT.glob("build/*-editable/CMakeCache.txt"), key=lambda cache: cache.stat().st_mtime)


@pytest.fixture(scope="module")
def build() -> Path:
    if not BUILDS:
        pytest.skip("the extension was not built in this tree")
    folder = BUILDS[-1].parent
    targets = [f"test_simd_{isa}" for isa in isas()]
    subprocess.run(["cmake", "-DFASTMEM_TESTS=ON", folder], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", folder, "--target", *targets], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("isa", isas())
def test_simd(build: Path, isa: str) -> None:
    done = subprocess.run([build / f"test_simd_{isa}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
