from typing import Any

import torch
from torch import Tensor

EPS = {False: 1e-6, True: 1e-16}


def make(
    batch: int = 2,
    slots: int = 16,
    heads: int = 4,
    in_powers: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Blurred weights that sum to less than 1, for the op itself: the public function takes `form` for `in_powers`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "weights": torch.softmax(normal(batch, heads, slots), -1) * normal(batch, heads, 1).sigmoid(),
        "sharpness": 1 + torch.nn.functional.softplus(2 * normal(batch, heads)),
    }
    tensors = {name: tensor.to(dtype).to(device) for name, tensor in inputs.items()}
    return {**tensors, "in_powers": in_powers, "eps": EPS[in_powers]}


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1},
    "odd": {"batch": 3, "slots": 63, "heads": 3},
    "one_head": {"batch": 1, "slots": 65, "heads": 1},
    "powers": {"in_powers": True},
    "one_slot_in_powers": {"slots": 1, "in_powers": True},
    "odd_in_powers": {"batch": 1, "slots": 65, "heads": 5, "in_powers": True},
    "many_slots": {"batch": 1, "slots": 1000, "heads": 3},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
INTERPRETED = [name for name in CASES if name != "many_slots"]
