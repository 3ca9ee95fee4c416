"""Fused kernels for memory-augmented neural networks, behind functions on tensors and modules like torch.nn.LSTM."""

from fastmem import _native as native
from fastmem import diagnostics, nn, ops
from fastmem._errors import BackendUnavailable, ExtensionMismatch, ExtensionNotBuilt
from fastmem._library import backends, explain
from fastmem._select import use_backend
from fastmem._version import __version__
from fastmem.ops import *  # noqa: F403

__all__ = [
    "BackendUnavailable",
    "ExtensionMismatch",
    "ExtensionNotBuilt",
    "__version__",
    "backends",
    "diagnostics",
    "explain",
    "native",
    "nn",
    "ops",
    "use_backend",
]
__all__ += ops.__all__
