from typing import Any

import torch
from torch import Tensor


def make(
    batch: int = 2,
    slots: int = 16,
    read_heads: int = 4,
    write_heads: int = 1,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Weights sum to less than one; rows and columns of the link too, and its diagonal is zero."""
    generator = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        sharp = torch.softmax(3 * torch.randn(shape, generator=generator, dtype=torch.float64), -1)
        return sharp * torch.rand(*shape[:-1], 1, generator=generator, dtype=torch.float64)

    link = torch.rand(batch, write_heads, slots, slots, generator=generator, dtype=torch.float64) / max(slots, 1)
    link.diagonal(dim1=-2, dim2=-1).zero_()
    inputs = {
        "link": link,
        "precedence": weights(batch, write_heads, slots),
        "write_weights": weights(batch, write_heads, slots),
        "read_weights": weights(batch, read_heads, slots),
    }
    return {name: tensor.to(dtype).to(device) for name, tensor in inputs.items()}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1},
    "odd": {"batch": 3, "slots": 63, "read_heads": 3},
    "two_write_heads": {"batch": 1, "slots": 65, "read_heads": 3, "write_heads": 2},
    "small": {"batch": 2, "slots": 7, "read_heads": 1, "write_heads": 3},
    "many_slots": {"batch": 1, "slots": 1000, "read_heads": 4},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
INTERPRETED = ["plain", "one_slot", "odd", "two_write_heads", "small", "no_batch", "no_slots"]
