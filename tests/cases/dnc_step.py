from typing import Any

import torch

from fastmem.reference._interface import interface_size
from tests.cases import temporal_linkage

OPTIONS = {
    "masked": False,
    "deallocates": False,
    "sharpened": False,
    "oneplus": True,
    "detach_usage_write": False,
    "mask_floor": 0.0,
    "clip": 20.0,
    "norm": "inner",
    "eps": 1e-6,
    "allocation_eps": 1e-6,
}


def make(
    batch: int = 2,
    slots: int = 16,
    word: int = 8,
    read_heads: int = 2,
    write_heads: int = 1,
    scale: float = 2.0,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """A state as it may come up, and an interface vector of normal numbers times `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    options = {**OPTIONS, **options}
    size = interface_size(word, read_heads, write_heads, options["masked"], options["sharpened"])
    links = temporal_linkage.make(batch, slots, read_heads, write_heads, torch.float64, seed=seed)
    tensors = {
        "interface": scale * normal(batch, size),
        "memory": normal(batch, slots, word),
        "usage": torch.rand(batch, slots, generator=generator, dtype=torch.float64),
        "precedence": links["precedence"],
        "link": links["link"],
        "write_weights": links["write_weights"].flip(0),  # of the step before: not those that made the precedence
        "read_weights": links["read_weights"],
    }
    return {name: tensor.to(dtype).to(device) for name, tensor in tensors.items()} | options


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1, "word": 1, "read_heads": 1},
    "odd": {"batch": 3, "slots": 63, "word": 20, "read_heads": 3},
    "two_write_heads": {"batch": 1, "slots": 33, "word": 5, "read_heads": 3, "write_heads": 2},
    "small": {"slots": 7, "word": 3, "read_heads": 1, "write_heads": 3},
    "masked": {"masked": True, "mask_floor": 0.1, "slots": 9, "word": 5},
    "deallocates": {"deallocates": True, "slots": 9, "word": 5},
    "sharpened": {"sharpened": True, "norm": "outer", "slots": 9, "word": 5, "write_heads": 2},
    "all_variants": {"masked": True, "deallocates": True, "sharpened": True, "norm": "outer", "slots": 11, "word": 6},
    "published": {"oneplus": False, "detach_usage_write": True, "slots": 9, "word": 5},
    "no_allocation_eps": {"allocation_eps": 0.0, "slots": 9, "word": 5, "write_heads": 2},
    "width": {"masked": True, "norm": "width", "slots": 9, "word": 5},
    "clipped": {"clip": 1.0, "slots": 9, "word": 5},
    "many_slots": {"batch": 1, "slots": 300, "word": 20, "read_heads": 5},
    "no_word": {"word": 0, "slots": 5, "norm": "outer", "deallocates": True},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
INTERPRETED = [
    "plain",
    "one_slot",
    "two_write_heads",
    "all_variants",
    "published",
    "no_allocation_eps",
    "no_word",
    "no_batch",
    "no_slots",
]
