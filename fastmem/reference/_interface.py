"""The interface vector of a DNC: its fields, their ranges, and the gradient through both.

In order, for W words, R read and Q write heads: read keys [R,W], read strengths [R], write keys [Q,W], write strengths
[Q], erase [Q,W], values [Q,W], free gates [R], allocation gates [Q], write gates [Q], read modes [R,2Q+1] (backward
1..Q, content, forward 1..Q); masked: write masks [Q,W], read masks [R,W]; sharpened: forward and backward sharpness
[R] each.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor


class Interface(NamedTuple):
    """What the controller says to the memory in one step, within its ranges."""

    read_keys: Tensor  # [B,R,W]
    read_strengths: Tensor  # [B,R], at least 1 (0 without oneplus)
    write_keys: Tensor  # [B,Q,W]
    write_strengths: Tensor  # [B,Q], at least 1 (0 without oneplus)
    erase: Tensor  # [B,Q,W], in [0,1]
    values: Tensor  # [B,Q,W]
    free_gates: Tensor  # [B,R], in [0,1]
    allocation_gates: Tensor  # [B,Q], in [0,1]
    write_gates: Tensor  # [B,Q], in [0,1]
    read_modes: Tensor  # [B,R,2Q+1], sums to 1: backward 1..Q, content, forward 1..Q
    write_masks: Tensor | None = None  # [B,Q,W], in [mask floor,1]
    read_masks: Tensor | None = None  # [B,R,W], in [mask floor,1]
    forward_sharpness: Tensor | None = None  # [B,R], at least 1
    backward_sharpness: Tensor | None = None  # [B,R], at least 1


OF_WRITES = (
    "write_keys", "write_strengths", "erase", "values", "allocation_gates", "write_gates", "write_masks"
)  # fmt: skip


def interface_shapes(
    word: int, read_heads: int, write_heads: int, masked: bool = False, sharpened: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shape of each field without the batch, in the order of the vector."""
    shapes: dict[str, tuple[int, ...]] = {
        "read_keys": (read_heads, word),
        "read_strengths": (read_heads,),
        "write_keys": (write_heads, word),
        "write_strengths": (write_heads,),
        "erase": (write_heads, word),
        "values": (write_heads, word),
        "free_gates": (read_heads,),
        "allocation_gates": (write_heads,),
        "write_gates": (write_heads,),
        "read_modes": (read_heads, 2 * write_heads + 1),
    }
    if masked:
        shapes |= {"write_masks": (write_heads, word), "read_masks": (read_heads, word)}
    if sharpened:
        shapes |= {"forward_sharpness": (read_heads,), "backward_sharpness": (read_heads,)}
    return shapes


def interface_size(word: int, read_heads: int, write_heads: int, masked: bool = False, sharpened: bool = False) -> int:
    return sum(map(prod, interface_shapes(word, read_heads, write_heads, masked, sharpened).values()))


def interface_runs(
    word: int, read_heads: int, write_heads: int, masked: bool = False, sharpened: bool = False
) -> tuple[tuple[int, int], ...]:
    """Who the vector speaks to, in its order: 0 those who read or 1 those who write, and how many numbers."""
    shapes = interface_shapes(word, read_heads, write_heads, masked, sharpened)
    return merged((int(name in OF_WRITES), prod(shape)) for name, shape in shapes.items())


def merged(runs: Iterable[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Runs of (head, width), those of one head that follow each other made one."""
    found: list[tuple[int, int]] = []
    for head, width in runs:
        before = found.pop()[1] if found and found[-1][0] == head else 0
        found.append((head, before + width))
    return tuple(found)


def cut(vector: Tensor, shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The parts of a vector `[B,S]` by name."""
    parts = vector.split([prod(shape) for shape in shapes.values()], -1)
    return {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def split(vector: Tensor, shapes: dict[str, tuple[int, ...]]) -> Interface:
    """The fields as they lie in the vector `[B,S]`."""
    return Interface(**cut(vector, shapes))


def joined(fields: Iterable[Tensor | None]) -> Tensor:
    """The vector of the fields, which `split` undoes."""
    return torch.cat([field.flatten(1) for field in fields if field is not None], -1)


def softplus(raw: Tensor) -> Tensor:
    """ln(1 + e^raw); torch's own returns raw from 20 on, which is 2e-9 off."""
    return torch.logaddexp(raw, torch.zeros_like(raw))


def through_softplus(grad: Tensor, raw: Tensor) -> Tensor:
    """softplus' = sigmoid"""
    return grad * raw.sigmoid()


def through_sigmoid(grad: Tensor, raw: Tensor, scale: float = 1.0) -> Tensor:
    """sigmoid' = y (1 - y)"""
    y = raw.sigmoid()
    return grad * (scale * y * (1 - y))


def through_softmax(grad: Tensor, y: Tensor) -> Tensor:
    """softmax' = diag(y) - y (x) y"""
    return y * (grad - (y * grad).sum(-1, keepdim=True))


def constrain(raw: Interface, oneplus: bool, mask_floor: float) -> Interface:
    """Each field within its range."""
    least = 1 if oneplus else 0
    fields = raw._replace(
        read_strengths=least + softplus(raw.read_strengths),
        write_strengths=least + softplus(raw.write_strengths),
        erase=raw.erase.sigmoid(),
        free_gates=raw.free_gates.sigmoid(),
        allocation_gates=raw.allocation_gates.sigmoid(),
        write_gates=raw.write_gates.sigmoid(),
        read_modes=raw.read_modes.softmax(-1),
    )
    if raw.write_masks is not None and raw.read_masks is not None:
        write_masks, read_masks = (
            mask.sigmoid() * (1 - mask_floor) + mask_floor for mask in (raw.write_masks, raw.read_masks)
        )
        fields = fields._replace(write_masks=write_masks, read_masks=read_masks)
    if raw.forward_sharpness is not None and raw.backward_sharpness is not None:
        fields = fields._replace(
            forward_sharpness=1 + softplus(raw.forward_sharpness),
            backward_sharpness=1 + softplus(raw.backward_sharpness),
        )
    return fields


def constrain_backward(grads: Interface, raw: Interface, fields: Interface, mask_floor: float) -> Interface:
    """Gradients of the raw fields from those of the fields."""

    def unbounded(name: str) -> Tensor:
        return through_softplus(getattr(grads, name), getattr(raw, name))

    def bounded(name: str, scale: float = 1.0) -> Tensor:
        return through_sigmoid(getattr(grads, name), getattr(raw, name), scale)

    through = {name: unbounded(name) for name in ("read_strengths", "write_strengths")}
    through |= {name: bounded(name) for name in ("erase", "free_gates", "allocation_gates", "write_gates")}
    through["read_modes"] = through_softmax(grads.read_modes, fields.read_modes)
    if raw.write_masks is not None:
        through |= {name: bounded(name, 1 - mask_floor) for name in ("write_masks", "read_masks")}
    if raw.forward_sharpness is not None:
        through |= {name: unbounded(name) for name in ("forward_sharpness", "backward_sharpness")}
    return grads._replace(**through)
