"""The launches that the launchers really make, recorded on meta tensors, and their compilation without a GPU."""

import contextlib
import hashlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float64: "*fp64", torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16",
    torch.int32: "*i32", torch.uint8: "*u8",
}  # fmt: skip
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


@dataclass(frozen=True)
class Launch:
    """One specialisation of one kernel, as Triton compiles it at the first such call."""

    kernel: JITFunction
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: list[str]
    options: dict[str, int]

    def description(self) -> str:
        return repr((self.kernel.__name__, self.signature, self.constants, self.aligned, self.options))


def _specialise(kernel: JITFunction, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Launch:
    """Triton's rules: None and 1 become constants; pointers and multiples of 16 are marked as aligned."""
    values = {parameter.name: parameter.default for parameter in kernel.params}
    values |= dict(zip(kernel.arg_names, arguments, strict=False)) | keywords
    options = {name: values[name] for name in ("num_warps", "num_stages", "maxnreg") if name in values}
    signature, constants, aligned = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, values[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name] = "constexpr"
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTERS[value.dtype]
            aligned.append(name)
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                aligned.append(name)
    return Launch(kernel, signature, constants, aligned, options)


@contextlib.contextmanager
def _recording() -> Iterator[list[Launch]]:
    launches: list[Launch] = []

    def run(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **keywords: Any) -> None:
        launches.append(_specialise(self, arguments, keywords))

    original, JITFunction.run = JITFunction.run, run
    try:
        yield launches
    finally:
        JITFunction.run = original


def launches_of(call: Callable[[], Any]) -> list[Launch]:
    """What `call` would launch; nothing runs."""
    with _recording() as launches:
        call()
    return launches


def _with_helpers(file: Path) -> set[Path]:
    imported = re.findall(r"^from \.(\w+) import", file.read_text(), re.MULTILINE)
    return {file}.union(*(_with_helpers(file.with_name(f"{name}.py")) for name in imported))


def source_hash(launch: Launch) -> str:
    """Hash of the kernel's file, of the files that it imports from, and of the specialisation."""
    digest = hashlib.sha256(launch.description().encode())
    for file in sorted(_with_helpers(Path(launch.kernel.fn.__code__.co_filename))):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def resources(launch: Launch, capability: int) -> dict[str, int]:
    """Registers and stack bytes of a thread, shared bytes of a block. Bytes on the stack mean that registers spill."""
    names = launch.kernel.arg_names
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in launch.aligned}
    source = ASTSource(launch.kernel, launch.signature, launch.constants, attributes)
    compiled = triton.compile(source, GPUTarget("cuda", capability, 32), launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout

    def field(name: str) -> int:
        found = re.search(rf"{name}:(\d+)", usage)
        assert found, f"cuobjdump printed no {name}: {usage}"
        return int(found.group(1))

    return {"registers": field("REG"), "stack": field("STACK"), "shared": compiled.metadata.shared}
