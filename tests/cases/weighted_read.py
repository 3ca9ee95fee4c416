import torch
from torch import Tensor


def make(
    batch: int = 2,
    slots: int = 16,
    word: int = 12,
    heads: int = 4,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    """Weights sum to less than one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    total = torch.rand(batch, heads, 1, generator=generator, dtype=torch.float64)
    inputs = {
        "memory": normal(batch, slots, word),
        "weights": torch.softmax(3 * normal(batch, heads, slots), -1) * total,
    }
    return {name: tensor.to(dtype).to(device) for name, tensor in inputs.items()}


CASES: dict[str, dict[str, int]] = {
    "plain": {},
    "one_of_each": {"batch": 1, "slots": 1, "word": 1, "heads": 1},
    "odd": {"batch": 3, "slots": 63, "word": 20, "heads": 3},
    "many_heads": {"batch": 1, "slots": 65, "word": 33, "heads": 17},
    "one_word": {"slots": 17, "word": 1, "heads": 5},
    "wide": {"batch": 1, "slots": 33, "word": 130, "heads": 2},
    "many_slots": {"batch": 1, "slots": 1000, "word": 20},
    "no_heads": {"heads": 0},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}
INTERPRETED = [name for name in CASES if name != "many_slots"]
