"""The wheel holds every room, works from an empty folder, and a build without torch says what to do."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import fastmem
from tests.try_wheel import try_wheel

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("fastmem", "fastmem/ops", "fastmem/reference", "fastmem/nn", "fastmem/tasks", "fastmem/kernels")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="needs the source tree")


def build_wheel(folder: Path, **environment: str) -> Path:
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation", "--no-deps", "--wheel-dir"]
    subprocess.run([*command, folder, ROOT], check=True, env={**os.environ, **environment})
    (wheel,) = folder.glob("*.whl")
    return wheel


def test_pure_python_wheel_holds_every_room(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, FASTMEM_NATIVE="0")
    names = zipfile.ZipFile(wheel).namelist()
    sources = {f"fastmem/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    for package in PACKAGES[:-1]:
        sources |= {f"{package}/{path.name}" for path in (ROOT / package).glob("*.py")}
    assert sources <= set(names)
    assert "fastmem/py.typed" in names and not any(name.endswith(".so") for name in names)


@pytest.mark.skipif(fastmem.native.module is None, reason="a pure-Python install")
def test_wheel_works_from_an_empty_folder(tmp_path: Path) -> None:
    for left in ROOT.glob("build/lib.*/fastmem/_C.*"):
        left.write_text("left by another variant of the build, and newer than every source")
    wheel = build_wheel(tmp_path)
    names = zipfile.ZipFile(wheel).namelist()
    assert sum(name.startswith("fastmem/_C.") for name in names) == 1
    assert not any(name.startswith(("kernels/", "csrc/", "tests/", "bench/")) for name in names)
    try_wheel(wheel)


def test_build_without_torch_stops_with_one_sentence() -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; sys.argv = ['setup.py', 'bdist_wheel']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1 and "--no-build-isolation" in done.stderr


def test_torch_is_fetched_only_when_asked_for() -> None:
    code = "from setuptools import build_meta; print(build_meta.get_requires_for_build_wheel())"
    for asked, expected in (("0", False), ("1", True)):
        environment = {**os.environ, "FASTMEM_BUILD_TORCH": asked}
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment, check=True
        )
        assert ("torch>=2.11" in done.stdout.splitlines()[-1]) == expected
