"""`import fastmem` is light, and an install without parts says what is missing."""

import os
import subprocess
import sys

import pytest
import torch

import fastmem
from tests.helpers import isas


def run(code: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    return done.stdout + done.stderr


def test_import_loads_neither_triton_nor_the_command_line_nor_cuda() -> None:
    unwanted = {"triton", "typer", "rich", "matplotlib", "numpy", "jinja2", "sklearn"}
    loaded = run(
        "import sys, torch; before = set(sys.modules); import fastmem; fastmem.diagnostics\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        f"print(sorted(new & {unwanted}), torch.cuda.is_initialized())"
    )
    assert loaded.strip() == "[] False"


def test_without_the_extension_the_reference_serves_and_says_so() -> None:
    output = run(
        "import sys; sys.modules['fastmem._C'] = None\n"
        "import torch, fastmem\n"
        "x = [torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4), torch.rand(1, 1, 4), torch.rand(1, 2, 4)]\n"
        "fastmem.temporal_linkage(*x); fastmem.temporal_linkage(*x)\n"
        "print(fastmem.explain('temporal_linkage', *x).backend, fastmem.native.build_info())\n"
        "try: fastmem.temporal_linkage(*x, backend='cpp')\n"
        "except fastmem.BackendUnavailable as error: print(error)\n"
    )
    assert output.count("RuntimeWarning") == 1
    assert "reference None" in output
    assert "pip install --no-build-isolation" in output


@pytest.mark.skipif(fastmem.native.module is None, reason="a pure-Python install has no instruction sets")
def test_isa_is_capped_by_the_environment() -> None:
    code = "import fastmem; print(fastmem.native.module.isa())"
    assert run(code, FASTMEM_CPU_ISA="baseline").strip() == "baseline"
    assert run(code).strip() == isas()[-1]
    assert "FASTMEM_CPU_ISA: expected one of native, avx512, avx2, baseline, got 'sse'" in run(
        code, FASTMEM_CPU_ISA="sse"
    )


def test_backend_is_forced_by_the_environment() -> None:
    code = (
        "import torch, fastmem\n"
        "fastmem.explain('temporal_linkage', torch.rand(1, 1, 4, 4), *(torch.rand(1, 1, 4) for _ in range(3)))"
    )
    assert run(code, FASTMEM_BACKEND="reference").strip() == "temporal_linkage: reference (asked for)"
    assert "FASTMEM_BACKEND: expected one of auto, reference, cpp, triton, got 'cuda'" in run(
        code, FASTMEM_BACKEND="cuda"
    )


def test_explain_names_the_known_ops() -> None:
    with pytest.raises(ValueError, match=r"op: expected one of .*temporal_linkage.*got 'nothing'"):
        fastmem.explain("nothing")
    with pytest.raises(TypeError, match=r"op: expected an op, its name or a module of fastmem.nn, got LSTM"):
        fastmem.explain(torch.nn.LSTM(2, 3), torch.rand(4, 1, 2))
    with pytest.raises(TypeError, match=r"op: expected an op, .*, got the class DNC"):
        fastmem.explain(fastmem.nn.DNC, torch.rand(4, 1, 2))


def test_explain_takes_the_arguments_of_the_public_function(capsys: pytest.CaptureFixture[str]) -> None:
    memory, keys, strengths = torch.rand(2, 5, 3), torch.rand(2, 4, 3), torch.rand(2, 4)
    backend = "cpp" if fastmem.native.module else "reference"
    assert fastmem.explain(fastmem.content_addressing, memory, keys, strengths).backend == backend
    assert fastmem.explain("content_addressing", memory, keys, strengths, None, None, "outer").backend == backend
    assert capsys.readouterr().out.startswith(f"content_addressing: {backend} (")
    with pytest.raises(TypeError, match="memory: expected dtype"):
        fastmem.explain(fastmem.content_addressing, memory.half(), keys, strengths)
    with pytest.raises(ValueError, match="eps: expected a finite number"):
        fastmem.explain(fastmem.content_addressing, memory, keys, strengths, None, None, "outer", -1.0)


def test_use_backend_ends_with_its_block() -> None:
    values = [torch.rand(1, 1, 4, 4), torch.rand(1, 1, 4), torch.rand(1, 1, 4), torch.rand(1, 2, 4)]
    with pytest.raises(RuntimeError, match="stop"), fastmem.use_backend("reference"):
        raise RuntimeError("stop")
    assert fastmem.explain("temporal_linkage", *values).reason != "asked for"
