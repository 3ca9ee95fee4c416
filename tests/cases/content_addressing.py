from typing import Any

import torch
from torch import Tensor

DEFAULT_EPS = {"inner": 1e-6, "outer": 1e-6, "rsqrt": 1e-12, "clamp": 1e-8, "width": 1e-6}


def make(
    batch: int = 2,
    slots: int = 16,
    word: int = 8,
    heads: int = 4,
    key_mask: bool = False,
    slot_mask: bool = False,
    norm: str = "inner",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """The first memory row is zero. With a slot mask a third of the slots take no part, and none of sample 0 does."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    memory = normal(batch, slots, word)
    memory[:, :1] = 0
    mask = torch.rand(batch, slots, generator=generator) < 2 / 3
    mask[:1] = False
    inputs = {
        "memory": memory,
        "keys": normal(batch, heads, word),
        "strengths": 1 + torch.nn.functional.softplus(2 * normal(batch, heads)),
        "key_mask": normal(batch, heads, word).sigmoid() if key_mask else None,
    }
    return {
        **{name: None if tensor is None else tensor.to(dtype).to(device) for name, tensor in inputs.items()},
        "slot_mask": mask.to(device) if slot_mask else None,
        "norm": norm,
        "eps": DEFAULT_EPS[norm],
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1},
    "odd": {"batch": 3, "slots": 63, "word": 20, "heads": 3},
    "one_word": {"batch": 1, "slots": 65, "word": 1, "heads": 5},
    "many_slots": {"batch": 1, "slots": 1000, "word": 20, "heads": 3},
    "outer": {"slots": 33, "norm": "outer"},
    "rsqrt": {"slots": 33, "norm": "rsqrt"},
    "clamp": {"slots": 33, "norm": "clamp"},
    "width": {"slots": 33, "norm": "width"},
    "key_mask": {"slots": 33, "word": 20, "key_mask": True},
    "key_mask_outer": {"slots": 17, "word": 5, "key_mask": True, "norm": "outer"},
    "key_mask_width": {"slots": 17, "word": 5, "key_mask": True, "norm": "width"},
    "slot_mask": {"batch": 3, "slots": 65, "slot_mask": True},
    "both_masks": {"batch": 3, "slots": 33, "word": 5, "heads": 3, "key_mask": True, "slot_mask": True},
    "no_word": {"slots": 5, "word": 0, "norm": "outer"},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
INTERPRETED = [name for name in CASES if name != "many_slots"]
