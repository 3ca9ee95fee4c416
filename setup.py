"""Drives CMake and maps packages. Compiler flags live in CMakeLists.txt, settings in fastmem/_env.py."""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def load(stem: str):
    """A module of the package by its path: the package itself cannot be imported before it is built."""
    spec = importlib.util.spec_from_file_location(stem, ROOT / "fastmem" / f"{stem}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


env = load("_env")
version = load("_version").__version__
compiles = env.native() and {"dist_info", "bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv)

if compiles and importlib.util.find_spec("torch") is None:
    sys.exit(
        "fastmem-kernels compiles against the torch you have and this build sees none: install torch first, then run "
        "'pip install --no-build-isolation .', or set FASTMEM_BUILD_TORCH=1 to let the build fetch a torch of its own."
    )


class CMakeBuild(build_ext):
    def build_extension(self, extension: Extension) -> None:
        import pybind11
        import torch

        asan = env.debug_build() == "asan"
        variant = ("editable" if self.editable_mode else "wheel") + ("-asan" if asan else "")
        tag = f"{sysconfig.get_config_var('SOABI')}-torch{torch.__version__.partition('+')[0]}-{variant}"
        build = ROOT / "build" / tag
        target = Path(self.get_ext_fullpath(extension.name)).resolve()
        # An editable install builds into the package, so that `cmake --build` alone is the edit loop.
        output = ROOT / "fastmem" if self.editable_mode else target.parent
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "FASTMEM_TORCH": Path(torch.__file__).parent,
            "FASTMEM_OUTPUT": output,
            "FASTMEM_VERSION": version,
            "FASTMEM_ASAN": "ON" if asan else "OFF",
        }
        # This Python's own cmake and ninja come first, whether or not its environment was activated.
        tools = {**os.environ, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])}
        # Each variant has a build folder, all of them one output: what another left there would pass for up to date.
        (output / target.name).unlink(missing_ok=True)
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build)]
        subprocess.run([*configure, *(f"-D{name}={value}" for name, value in settings.items())], check=True, env=tools)
        subprocess.run(["cmake", "--build", str(build)], check=True, env=tools)
        if output != target.parent:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(output / target.name, target)


setup(
    packages=["fastmem", "fastmem.ops", "fastmem.reference", "fastmem.nn", "fastmem.tasks", "fastmem.kernels"],
    package_dir={"fastmem.kernels": "kernels"},
    package_data={"fastmem": ["py.typed"]},
    ext_modules=[Extension("fastmem._C", sources=[])] if env.native() else [],
    cmdclass={"build_ext": CMakeBuild},
    setup_requires=["torch>=2.11"] if env.native() and env.build_torch() else [],
)
