"""The short way to a C++ kernel, for eager calls on plain CPU tensors.

The dispatcher's way through `torch.ops.fastmem` costs 20 us a call and 120 us with a gradient, as much as the kernels
of small memories. It stays for all else: tracing, compiling, transforms, modes, autocast, other devices and backends.
"""

from typing import Any

import torch
from torch import Tensor

from fastmem import _library, _native, _select

_PLAIN = (Tensor, torch.nn.Parameter)
_DTYPES = (torch.float32, torch.float64, torch.bool)


def call(stem: str, name: str, *arguments: Any, backend: str | None, function: Any = None) -> Any:
    """`_library.call`, or at once the C++ kernel where that comes to the same.

    `function` is the autograd.Function of the op. Arguments that do not fit together are left to the dispatcher's way,
    which says what is wrong.
    """
    if _is_possible(arguments, backend):
        wants_gradient = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
        try:
            if not wants_gradient:
                return getattr(torch.ops.fastmem_cpu, name).default(*arguments)
            if function is not None:
                return function.apply(*arguments)
        except RuntimeError:
            pass
    return _library.call(stem, name, *arguments, backend=backend)


def _is_possible(arguments: tuple[Any, ...], backend: str | None) -> bool:
    if torch.compiler.is_compiling() or _native.module is None or _select.requested(backend) not in (None, "cpp"):
        return False
    for argument in arguments:
        if isinstance(argument, Tensor) and not (
            type(argument) in _PLAIN and argument.is_cpu and argument.dtype in _DTYPES
        ):
            return False
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.is_autocast_enabled("cpu")
        or torch._C._is_tracing()
    )
