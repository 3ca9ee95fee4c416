"""Installs a wheel into a fresh environment that borrows this one's torch, and uses it from an empty folder."""

import subprocess
import sys
import tempfile
import venv
from pathlib import Path

USE = """
import torch, fastmem
from fastmem.reference import temporal_linkage as reference
assert fastmem.native.module is not None, fastmem.native.failure
arguments = torch.rand(2, 1, 9, 9), *(torch.rand(2, n, 9) / 9 for n in (1, 1, 3))
for a, e in zip(fastmem.temporal_linkage(*arguments), reference.temporal_linkage(*arguments)):
    assert torch.allclose(a, e, atol=1e-6)
net = fastmem.nn.DNC(3, 8, num_slots=6, word_size=4, num_read_heads=2)
output, state = net(torch.randn(5, 2, 3))
output.sum().backward()
import fastmem.kernels
print("wheel works:", fastmem.__file__)
"""


def try_wheel(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        venv.create(scratch, with_pip=True)
        python = Path(scratch) / "bin" / "python"
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
        # torch by path: .pth files of the parent, an editable fastmem among them, are not followed.
        borrowed = [path for path in sys.path if path.endswith("site-packages")]
        where = subprocess.run(
            [python, "-c", "import site; print(site.getsitepackages()[0])"], capture_output=True, text=True, check=True
        )
        (Path(where.stdout.strip()) / "torch_of_the_parent.pth").write_text("\n".join(borrowed))
        empty = Path(scratch) / "empty"
        empty.mkdir()
        subprocess.run([python, "-c", USE], cwd=empty, check=True)


if __name__ == "__main__":
    (wheel,) = Path(sys.argv[1]).resolve().glob("fastmem_kernels-*.whl")
    try_wheel(wheel)
