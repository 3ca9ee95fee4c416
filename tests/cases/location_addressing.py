from typing import Any

import torch
from torch import Tensor

from tests.cases.sharpen import EPS


def make(
    batch: int = 2,
    slots: int = 16,
    heads: int = 4,
    reach: int = 1,
    reversed_shift: bool = False,
    in_powers: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """For the op itself: the public function takes `form` for `in_powers`. A shift has 2 reach + 1 taps."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "content": torch.softmax(normal(batch, heads, slots), -1),
        "previous": torch.softmax(normal(batch, heads, slots), -1),
        "gate": normal(batch, heads).sigmoid(),
        "shift": torch.softmax(normal(batch, heads, 2 * reach + 1), -1),
        "sharpness": 1 + torch.nn.functional.softplus(2 * normal(batch, heads)),
    }
    tensors = {name: tensor.to(dtype).to(device) for name, tensor in inputs.items()}
    return {**tensors, "reversed_shift": reversed_shift, "in_powers": in_powers, "eps": EPS[in_powers]}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1},
    "odd": {"batch": 3, "slots": 63, "heads": 3, "reach": 2},
    "no_reach": {"batch": 1, "slots": 65, "heads": 1, "reach": 0},
    "more_taps_than_slots": {"slots": 2, "reach": 3},
    "reversed": {"slots": 17, "reach": 2, "reversed_shift": True},
    "powers": {"in_powers": True},
    "reversed_in_powers": {"batch": 1, "slots": 65, "heads": 5, "reversed_shift": True, "in_powers": True},
    "many_slots": {"batch": 1, "slots": 1000, "heads": 3},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
INTERPRETED = [name for name in CASES if name != "many_slots"]
