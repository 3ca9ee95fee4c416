from typing import Any

import torch
from torch import Tensor


def make(
    batch: int = 2,
    slots: int = 16,
    read_heads: int = 4,
    write_heads: int = 1,
    sharp: bool = False,
    full: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """`sharp`: every number is 0 or 1, and each head is at one slot, so that factors of the products are zero.
    `full`: no slot is free, and nothing is released."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
        return drawn.round() if sharp else drawn

    def weights(*shape: int) -> Tensor:
        scores = torch.randn(shape, generator=generator, dtype=torch.float64)
        if sharp and shape[-1]:
            return torch.nn.functional.one_hot(scores.argmax(-1), shape[-1]).double()
        return torch.softmax(3 * scores, -1) * uniform(*shape[:-1], 1)

    inputs = {
        "usage": uniform(batch, slots),
        "write_weights": weights(batch, write_heads, slots),
        "read_weights": weights(batch, read_heads, slots),
        "free_gates": uniform(batch, read_heads),
    }
    if full:
        inputs["usage"].fill_(1)
        inputs["free_gates"].zero_()
    return {name: tensor.to(dtype).to(device) for name, tensor in inputs.items()}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1},
    "odd": {"batch": 3, "slots": 63, "read_heads": 3},
    "two_write_heads": {"batch": 1, "slots": 65, "read_heads": 3, "write_heads": 2},
    "small": {"slots": 7, "read_heads": 1, "write_heads": 3},
    "zeros_and_ones": {"slots": 9, "write_heads": 3, "sharp": True},
    "full": {"slots": 9, "write_heads": 3, "full": True},
    "no_heads": {"slots": 5, "read_heads": 0, "write_heads": 0},
    "many_slots": {"batch": 1, "slots": 1000, "read_heads": 4},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
INTERPRETED = [name for name in CASES if name != "many_slots"]
