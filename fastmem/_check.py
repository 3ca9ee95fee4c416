"""Argument checks with one voice: the argument, what was expected, what came."""

from collections.abc import Iterable
from functools import cache

import torch
from torch import Tensor

STATE_DTYPES = (torch.float32, torch.float64)
BANK_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def layouts(*arguments: tuple[str, Tensor | None, str]) -> dict[str, int]:
    """Checks (name, tensor, layout) against each other, as ("link", link, "B Q N N"); a letter has one size throughout.

    Absent tensors (None) pass. Returns the size of every letter.
    """
    sizes: dict[str, int] = {}
    for name, tensor, layout in arguments:
        if tensor is None:
            continue
        letters = _letters(layout)
        shape = tensor.shape
        if len(shape) != len(letters):
            raise ValueError(
                f"{name}: expected {len(letters)} dimensions [{', '.join(letters)}], got shape {_shape(tensor)}"
            )
        for letter, size in zip(letters, shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                expected = ", ".join(f"{other}={sizes[other]}" if other in sizes else other for other in letters)
                raise ValueError(f"{name}: expected shape [{expected}], got {_shape(tensor)}")
    return sizes


def dtypes(name: str, tensor: Tensor, allowed: Iterable[torch.dtype]) -> None:
    """Checks the dtype of one tensor."""
    if tensor.dtype not in allowed:
        raise TypeError(f"{name}: expected dtype {' or '.join(map(str, allowed))}, got {tensor.dtype}")


def same_kind(first: tuple[str, Tensor], *others: tuple[str, Tensor | None], device_only: bool = False) -> None:
    """Checks that tensors share the dtype and the device of the first."""
    leader, like = first
    for name, tensor in others:
        if tensor is None:
            continue
        if tensor.device != like.device:
            raise ValueError(f"{name}: expected device {like.device}, that of {leader}, got {tensor.device}")
        if not device_only and tensor.dtype != like.dtype:
            raise TypeError(f"{name}: expected dtype {like.dtype}, that of {leader}, got {tensor.dtype}")


def writable(name: str, tensor: Tensor) -> None:
    """Checks that an in-place op can write a tensor: no element stands for two, rows are dense."""
    overlapping = any(stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    if overlapping or (tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise ValueError(
            f"{name}: expected a tensor with dense rows and no expanded dimension, got stride {tensor.stride()}"
        )


@cache
def _letters(layout: str) -> tuple[str, ...]:
    return tuple(layout.split())


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
