"""The layout of the project: no room lacks an op, and imports follow the arrows of CONTRIBUTING.md."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
OPS = sorted(path.stem for path in (ROOT / "fastmem" / "ops").glob("*.py") if not path.stem.startswith("_"))
ROOMS = ["fastmem/reference/{}.py", "kernels/{}.py", "csrc/cpu/{}.cpp", "csrc/cpu/{}_kernel.h", "tests/cases/{}.py",
         "tests/ops/test_{}.py", "tests/kernels/test_{}.py", "bench/bench_{}.py", "bench/peers/{}.py"]  # fmt: skip

SEQUENCES = {"dnc_sequence", "ntm_sequence"}
WITHOUT_SEQUENCES = {"kernels/{}.py", "tests/kernels/test_{}.py"}  # on CUDA the steps run, each a Triton kernel
WITHOUT_SEQUENCES |= {"bench/bench_{}.py", "bench/peers/{}.py"}  # raced as whole networks, by bench/sequences.py

# Room -> what its files may import, besides the standard library and their own room.
ARROWS = {
    "fastmem/reference": {"torch"},
    "kernels": {"torch", "triton"},
    "fastmem/ops": {"torch", "fastmem._check", "fastmem._library", "fastmem._select", "fastmem.reference"},
    "fastmem/nn": {"torch", "fastmem.ops", "fastmem.reference", "fastmem._check"},
    "fastmem/tasks": {"torch", "fastmem.nn", "fastmem._check"},
    "fastmem/diagnostics.py": {"torch", "fastmem._check"},
}


@pytest.mark.parametrize("room", ROOMS)
@pytest.mark.parametrize("op", OPS)
def test_no_room_lacks_an_op(op: str, room: str) -> None:
    if op in SEQUENCES and room in WITHOUT_SEQUENCES:
        return
    assert (ROOT / room.format(op)).exists()


def imports(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it; `from package import module` counts as package.module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            as_paths = {name: ROOT / name.replace(".", "/") for name in submodules}
            modules = {n for n, p in as_paths.items() if p.with_suffix(".py").exists() or (p / "__init__.py").exists()}
            found |= modules or {node.module}
    return found


@pytest.mark.parametrize("room", ARROWS)
def test_imports_follow_the_arrows(room: str) -> None:
    allowed = ARROWS[room] | {room.replace("/", ".")}
    for path in sorted((ROOT / room).rglob("*.py")) or [ROOT / room]:
        for module in imports(path):
            ours = module.split(".")[0] in ("fastmem", "kernels", "tests", "bench", "triton", "torch", "numpy")
            fits = any(module == name or module.startswith(f"{name}.") for name in allowed)
            assert fits or not ours, f"{path.relative_to(ROOT)} imports {module}"


def test_nothing_imports_the_source_folder_of_the_kernels() -> None:
    """`import kernels` would load a second copy of fastmem.kernels."""
    for folder in ("fastmem", "kernels", "tests", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            assert not any(name.split(".")[0] == "kernels" for name in imports(path)), path


def test_one_op_never_uses_private_names_of_another() -> None:
    for op in OPS:
        for node in ast.walk(ast.parse((ROOT / "fastmem" / "ops" / f"{op}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.removeprefix("fastmem.ops.") in OPS:
                assert not any(alias.name.startswith("_") for alias in node.names), f"{op} uses {node.module}"


def test_kernel_headers_are_free_of_torch() -> None:
    for path in (ROOT / "csrc" / "cpu").glob("*.h"):
        included = re.findall(r'#include [<"](.+?)[>"]', path.read_text())
        assert not any(
            "torch" in name or "pybind" in name or name in ("tensor.h", "parallel.h") for name in included
        ), path


def test_kernel_headers_share_no_names() -> None:
    """Two structs of one name would make one symbol of two kernels, and the linker would keep either."""
    found: dict[str, Path] = {}
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.h")):
        for name in re.findall(r"^(?:template <[^>]*> )?struct (\w+) \{", path.read_text(), re.MULTILINE):
            assert found.setdefault(name, path) == path, f"{name} is in {found[name].name} and {path.name}"
    assert "PackedProduct" in found


def test_environment_variables_are_read_in_one_place_and_documented() -> None:
    names = set(re.findall(r"FASTMEM_[A-Z_]+", (ROOT / "fastmem" / "_env.py").read_text()))
    readme = (ROOT / "README.md").read_text()
    assert names and all(f"`{name}`" in readme for name in names)
    for path in (ROOT / "fastmem").rglob("*.py"):
        if path.name != "_env.py":
            assert not re.search(r"environ.*FASTMEM_", path.read_text()), path


def test_every_public_name_has_a_docstring_and_ops_say_what_users_need() -> None:
    import fastmem

    for name in fastmem.__all__:
        value = getattr(fastmem, name)
        assert name == "__version__" or value.__doc__, name
    for op in OPS:
        text = getattr(fastmem, op).__doc__
        for word in ("Args:", "Returns:", "Raises:", "Cost:", "Dtype:", "Shape"):
            assert word in text, f"{op}: the docstring has no {word}"
