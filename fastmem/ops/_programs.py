"""What the ops of stored programs share: the check of their dtypes, and what stands for their gradients in a fake."""

from collections.abc import Iterable

import torch
from torch import Tensor

from fastmem import _check


def check_dtypes(inputs: Tensor, weights: Tensor, biases: Tensor | None) -> None:
    """Weights and biases may be in low precision where the inputs are float32."""
    _check.same_kind(("inputs", inputs), ("weights", weights), device_only=True)
    low_precision = (torch.float32, torch.bfloat16, torch.float16)
    _check.dtypes("weights", weights, low_precision if inputs.dtype == torch.float32 else (torch.float64,))
    _check.same_kind(("weights", weights), ("biases", biases))


def fake_gradients(like: Tensor, arguments: Iterable[Tensor | None], output_mask: list[bool]) -> tuple[Tensor, ...]:
    """One for each argument; an unwanted or absent one has size 0."""
    return tuple(
        like.new_empty(0) if tensor is None else tensor.new_empty(tensor.shape if wants else 0)
        for tensor, wants in zip(arguments, output_mask, strict=True)
    )
