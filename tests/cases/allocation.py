from typing import Any

import torch
from torch import Tensor


def make(
    batch: int = 2,
    slots: int = 16,
    write_heads: int = 3,
    gated: bool = True,
    levels: int = 0,
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Usages well apart, so that float32 and float64 order the slots alike; with `levels` only so many, from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    if levels:
        usage = (levels * uniform(batch, slots)).floor() / (levels - 1)
    else:
        usage = (uniform(batch, slots).argsort(-1) + 0.25 + 0.5 * uniform(batch, slots)) / max(slots, 1)
    inputs = {"usage": usage, "gates": uniform(batch, write_heads) if gated else None}
    tensors = {name: None if tensor is None else tensor.to(dtype).to(device) for name, tensor in inputs.items()}
    return {**tensors, "eps": eps}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1},
    "one_head": {"slots": 20, "gated": False},
    "odd": {"batch": 3, "slots": 63, "write_heads": 2},
    "two_heads": {"batch": 1, "slots": 65, "write_heads": 2},
    "small": {"slots": 7, "write_heads": 1},
    "no_eps": {"slots": 20, "eps": 0.0},
    "tied": {"slots": 65, "gated": False, "levels": 3},
    "many_slots": {"batch": 1, "slots": 1000, "write_heads": 2},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
# Ties are left out where a derivative is taken numerically: the weights of two slots swap there.
INTERPRETED = [name for name in CASES if name not in ("tied", "many_slots")]
