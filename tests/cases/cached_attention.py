from typing import Any

import torch
from torch import Tensor


def make(
    batch: int = 2,
    length: int = 7,
    attention: int = 16,
    hidden: int = 12,
    mask: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Scores of order one. With a mask a third of the entries take no part, and none of sample 0 does."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "query": normal(batch, attention),
        "keys": normal(batch, length, attention),
        "cache": normal(batch, length, hidden).tanh(),
        "score_weights": 2 * normal(attention) / max(attention, 1) ** 0.5,
    }
    taking_part = torch.rand(batch, length, generator=generator) < 2 / 3
    taking_part[:1] = False
    return {
        **{name: tensor.to(dtype).to(device) for name, tensor in tensors.items()},
        "mask": taking_part.to(device) if mask else None,
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_of_each": {"batch": 1, "length": 1, "attention": 1, "hidden": 1},
    "odd": {"batch": 3, "length": 63, "attention": 20, "hidden": 95},
    "mask": {"batch": 3, "length": 9, "attention": 20, "mask": True},
    "wide": {"length": 5, "hidden": 257},
    "long_masked": {"batch": 7, "length": 200, "attention": 5, "hidden": 33, "mask": True},
    "wide_attention": {"batch": 4, "length": 5, "attention": 130, "hidden": 1},
    "many_entries": {"batch": 4, "length": 1000, "attention": 20, "hidden": 20},
    "no_attention": {"attention": 0},
    "no_hidden": {"hidden": 0},
    "no_batch": {"batch": 0},
    "no_entries": {"length": 0},
}
INTERPRETED = [name for name in CASES if name not in ("many_entries", "long_masked")]
