from typing import Any

import torch

from fastmem.reference.ntm_step import interface_size
from tests.cases.sharpen import EPS

OPTIONS = {"joint_writes": False, "reversed_shift": False, "in_powers": False}


def make(
    batch: int = 2,
    slots: int = 16,
    word: int = 8,
    heads: str = "rw",
    reach: int = 1,
    scale: float = 2.0,
    clip: float = 20.0,
    norm: str = "inner",
    eps: float = 1e-6,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: bool,
) -> dict[str, Any]:
    """For the op itself: the public function takes `form` for `in_powers`. Interface: normal numbers times `scale`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {
        "interface": scale * normal(batch, interface_size(heads, word, 2 * reach + 1)),
        "memory": normal(batch, slots, word),
        "weights": torch.softmax(normal(batch, len(heads), slots), -1),
    }
    options = {**OPTIONS, **options}
    return {
        **{name: tensor.to(dtype).to(device) for name, tensor in tensors.items()},
        "heads": heads,
        **options,
        "sharpen_eps": EPS[options["in_powers"]],
        "clip": clip,
        "norm": norm,
        "eps": eps,
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_slot": {"slots": 1, "word": 1},
    "odd": {"batch": 3, "slots": 63, "word": 20, "reach": 2},
    "write_first": {"heads": "wr", "slots": 9, "word": 5},
    "two_pairs": {"heads": "rwrw", "slots": 17, "word": 7},
    "two_pairs_joint": {"heads": "rwrw", "slots": 17, "word": 7, "joint_writes": True},
    "two_readers": {"heads": "rrw", "slots": 9, "word": 5},
    "two_writers": {"heads": "wwr", "slots": 9, "word": 5},
    "two_writers_joint": {"heads": "wwr", "slots": 9, "word": 5, "joint_writes": True},
    "read_alone": {"heads": "r", "slots": 9, "word": 5},
    "write_alone": {"heads": "w", "slots": 9, "word": 5},
    "published": {
        "heads": "rwrw", "slots": 9, "word": 5, "reversed_shift": True, "in_powers": True, "norm": "clamp", "eps": 1e-8,
    },
    "no_reach": {"reach": 0, "slots": 9, "word": 5, "norm": "outer"},
    "width": {"heads": "wr", "slots": 9, "word": 5, "norm": "width"},
    "clipped": {"clip": 1.0, "slots": 9, "word": 5},
    "many_slots": {"batch": 1, "slots": 300, "word": 20, "heads": "rwrwr"},
    "no_word": {"word": 0, "slots": 5, "heads": "rwr"},
    "no_batch": {"batch": 0},
    "no_slots": {"slots": 0},
}  # fmt: skip
INTERPRETED = [name for name in CASES if name != "many_slots"]
