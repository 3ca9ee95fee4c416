"""Argument checks with one voice: the argument, what was expected, what came."""

import operator
from collections.abc import Callable, Iterable, Sequence
from functools import cache, lru_cache, wraps
from numbers import Real
from typing import Any, SupportsIndex

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

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


def has_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """Checks a shape that is known in full."""
    if tensor.shape != shape:
        raise ValueError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


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


def tensors(names: Iterable[tuple[str, bool]], values: Iterable[Any]) -> None:
    """Checks that arguments are plain tensors; with each name whether it may be absent (None)."""
    for (name, optional), value in zip(names, values, strict=True):
        if optional and value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name}: expected a Tensor{' or None' if optional else ''}, got {type(value).__name__}")
        if value.layout is not torch.strided or value.is_nested:
            raise ValueError(f"{name}: expected a dense tensor, got {'nested' if value.is_nested else value.layout}")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and the byte after the last."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (steps + 1) * tensor.itemsize


def apart(name: str, written: Tensor, *others: tuple[str, Tensor]) -> None:
    """Checks that a tensor that is written in place shares no memory with others. Fake and meta tensors have none."""
    if isinstance(written, FakeTensor) or written.is_meta or not written.numel():
        return
    begin, end = _span(written)
    for other, tensor in others:
        other_begin, other_end = _span(tensor)
        if tensor.numel() and begin < other_end and other_begin < end:
            raise ValueError(f"{name}: expected memory of its own, got memory shared with {other}")


def clip(bound: float | None) -> None:
    """Checks the bound that an interface is clamped to; None for none."""
    if bound is not None and not (is_number(bound) and bound > 0):
        raise ValueError(f"clip: expected a positive number or None, got {bound!r}")


def share(name: str, value: float) -> float:
    """Checks a number of at least 0 and below 1."""
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"{name}: expected a number in [0, 1), got {value!r}")
    return value


def integer(name: str, value: SupportsIndex, least: int = 1) -> int:
    """Any integer, NumPy's too, but a bool. That of an exported program, which stands for many, stays as it is."""
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    try:
        number = least - 1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = least - 1
    if number < least:
        expected = "a positive integer" if least == 1 else f"an integer of at least {least}"
        raise ValueError(f"{name}: expected {expected}, got {value!r}")
    return number


def heads(kinds: str) -> None:
    """Checks the heads of an NTM, a letter each."""
    if not isinstance(kinds, str) or not kinds or not set(kinds) <= {"r", "w"}:
        raise ValueError(f'heads: expected letters r and w, such as "rw", got {kinds!r}')


def once(options: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """Keeps what a function makes of checked options: a step is called with the same ones thousands of times.

    Wrong ones raise every time, and so are never kept.
    """
    kept = lru_cache(typed=True)(options)  # typed: 1 is no True

    @wraps(options)
    def found(*given: Any, **named: Any) -> tuple[Any, ...]:
        try:
            return kept(*given, **named)
        except TypeError:  # what has no hash is kept nowhere, and named by the check
            return options(*given, **named)

    return found


def flags(**options: bool) -> None:
    """Checks options that are on or off; 1, None or "no" is none."""
    for name, value in options.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name}: expected True or False, got {value!r}")


def device(given: torch.device | str | None) -> None:
    """Checks that a device, or a name of one, is one that torch knows."""
    try:
        if given is not None:
            torch.device(given)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected a device or None, got {given!r}") from None


def integers(name: str, values: Tensor | Sequence[int], or_bools: bool = False) -> Tensor:
    """Checks a tensor or a sequence of integers, and makes it an int64 tensor, or a bool one of bools."""
    expected = "integers or bools" if or_bools else "integers"
    try:
        tensor = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
    except (RuntimeError, TypeError, ValueError):
        raise TypeError(f"{name}: expected {expected}, got {values!r}") from None
    is_bool = tensor.dtype == torch.bool
    if tensor.numel() and (tensor.is_floating_point() or tensor.is_complex() or (is_bool and not or_bools)):
        raise TypeError(f"{name}: expected {expected}, got {tensor.dtype}")
    return tensor if is_bool and or_bools else tensor.long()


def state(name: str, given: Any, kind: type[Any], shapes: dict[str, tuple[int, ...]], like: tuple[str, Tensor]) -> None:
    """Checks a named tuple of tensors, their shapes by field, and that all have the dtype and the device of one."""
    if not isinstance(given, kind):
        raise TypeError(f"{name}: expected {kind.__name__}, got {type(given).__name__}")
    for field, shape in shapes.items():
        part, tensor = f"{name}.{field}", getattr(given, field)
        tensors([(part, False)], [tensor])
        has_shape(part, tensor, shape)
        same_kind(like, (part, tensor))


def is_number(value: Any) -> bool:
    """A bool counts as a number in Python and is a mistake here."""
    return isinstance(value, Real) and not isinstance(value, bool)


def in_place(op: str, written: tuple[tuple[str, Tensor], ...], read: tuple[str, Tensor]) -> None:
    """Checks that an op which has no gradient can write tensors whole: each contiguous, in memory of its own."""
    if torch.is_grad_enabled() and any(tensor.requires_grad for _, tensor in (*written, read)):
        raise RuntimeError(f"{op}: expected torch.no_grad(), got arguments that require a gradient")
    for i, (name, tensor) in enumerate(written):
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: expected a contiguous tensor to write to, got strides {list(tensor.stride())}")
        apart(name, tensor, read, *written[:i])


def writable(name: str, tensor: Tensor) -> None:
    """Checks that an in-place op can write a tensor: rows are dense, no element stands for two."""
    inner, overlapping = 1, False
    for size, stride in reversed([*zip(tensor.shape, tensor.stride(), strict=True)]):
        if size > 1:
            overlapping |= stride < inner
            inner = size * stride
    if overlapping or (tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1):
        raise ValueError(f"{name}: expected dense rows and elements that do not overlap, got stride {tensor.stride()}")


@cache
def _letters(layout: str) -> tuple[str, ...]:
    return tuple(layout.split())


def _shape(tensor: Tensor) -> str:
    return f"[{', '.join(map(str, tensor.shape))}]"
