from typing import Any

import torch
from torch import Tensor


def make(
    batch: int = 2,
    slots: int = 16,
    word: int = 12,
    write_heads: int = 1,
    retention: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Write weights sum to less than one; the first head's erase gates are exactly 0 and 1 at two of its words."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    erase = torch.sigmoid(2 * normal(batch, write_heads, word))
    erase[:, :1, :1] = 1
    erase[:, :1, 1:2] = 0
    inputs = {
        "memory": normal(batch, slots, word),
        "write_weights": torch.softmax(3 * normal(batch, write_heads, slots), -1) * uniform(batch, write_heads, 1),
        "erase": erase,
        "values": normal(batch, write_heads, word),
        "retention": uniform(batch, slots) if retention else None,
    }
    return {name: None if tensor is None else tensor.to(dtype).to(device) for name, tensor in inputs.items()}


CASES: dict[str, dict[str, Any]] = {
    "plain": {"write_heads": 2, "retention": True},
    "one_head": {},
    "one_of_each": {"batch": 1, "slots": 1, "word": 1, "retention": True},
    "odd": {"batch": 3, "slots": 63, "word": 20, "retention": True},
    "several_heads": {"batch": 1, "slots": 65, "word": 33, "write_heads": 5},
    "one_word": {"slots": 17, "word": 1, "write_heads": 3},
    "wide": {"batch": 1, "slots": 33, "word": 130, "write_heads": 2, "retention": True},
    "many_slots": {"batch": 1, "slots": 1000, "word": 20, "retention": True},
    "no_heads": {"write_heads": 0, "retention": True},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0, "retention": True},
    "no_words": {"word": 0, "retention": True},
}
INTERPRETED = [name for name in CASES if name != "many_slots"]
