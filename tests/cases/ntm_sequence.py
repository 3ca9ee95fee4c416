from typing import Any

import torch

from fastmem.ops import NTMConfig, ProgramConfig
from fastmem.reference.ntm_sequence import NTMMemory
from tests.cases import ntm_step
from tests.cases.dnc_sequence import arguments, step_mask


def make(
    steps: int = 6,
    batch: int = 2,
    input_size: int = 3,
    hidden_size: int = 6,
    slots: int = 7,
    word: int = 4,
    heads: str = "rw",
    output_size: int = 5,
    mask: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """By name, as those of dnc_sequence."""
    config = NTMConfig(input_size, hidden_size, slots, word, heads, output_size, **options)
    state = ntm_step.make(batch, slots, word, heads, dtype=torch.float64, seed=seed)
    tensors = arguments(NTMMemory(*config.encoded(4)), state, steps, batch, seed)
    return {
        **{name: tensor.to(dtype).to(device) for name, tensor in tensors.items()},
        "step_mask": step_mask(mask, steps, batch, seed, device),
        "config": config,
    }


PUBLISHED: dict[str, Any] = {"reversed_shift": True, "form": "power", "norm": "clamp", "clip": None}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_step": {"steps": 1},
    "one_chunk": {"steps": 3, "slots": 5},
    "whole_chunks": {"steps": 8, "slots": 5},
    "long": {"steps": 40, "batch": 1, "slots": 5},
    "smallest": {"input_size": 1, "hidden_size": 1, "slots": 1, "word": 1, "output_size": 1, "max_shift": 0},
    "odd": {"batch": 3, "hidden_size": 17, "slots": 33, "word": 5, "max_shift": 2},
    "layernorm": {"controller": "layernorm_lstm", "heads": "wr"},
    "feedforward": {"controller": "feedforward"},
    "two_pairs": {"heads": "rwrw", "steps": 9},
    "joint": {"heads": "rwwr", "joint_writes": True},
    "published": {"heads": "rwrw", **PUBLISHED},
    "read_alone": {"heads": "r"},
    "write_alone": {"heads": "w"},
    "clipped": {"clip": 0.5, "norm": "outer"},
    "padded": {"mask": "padded", "batch": 4, "steps": 7},
    "any_parts": {"mask": "any", "batch": 3, "steps": 11, "heads": "rwwr"},
    "any_parts_joint": {"mask": "any", "batch": 3, "steps": 9, "heads": "rwrw", "joint_writes": True},
    "any_parts_published": {
        "mask": "any", "batch": 3, "heads": "rwrw", "controller": "layernorm_lstm", **PUBLISHED,
    },
    "any_parts_feedforward": {"mask": "controlled", "batch": 3, "steps": 9, "controller": "feedforward"},
    "many_slots": {"batch": 1, "steps": 10, "hidden_size": 33, "slots": 130, "word": 20, "heads": "rwrwr"},
    "intervals": {"mask": "intervals", "steps": 28, "heads": "rwrw"},
    "intervals_feedforward": {"mask": "intervals", "steps": 11, "controller": "feedforward"},
    "never": {"mask": "never", "steps": 4},
    "programs": {"programs": ProgramConfig(2, 3)},
    "programs_published": {"heads": "rwrw", "programs": ProgramConfig(3, tanh_keys=True, norm="width"), **PUBLISHED},
    "direct_programs": {"programs": ProgramConfig(3, direct_attention=True), "controller": "feedforward"},
    "any_parts_programs": {"mask": "any", "batch": 3, "steps": 11, "heads": "rwwr", "programs": ProgramConfig(2, 4)},
    "intervals_programs": {"mask": "intervals", "steps": 12, "programs": ProgramConfig(2)},
    "tops": {"projected": False},
    "whole_panels": {"batch": 1, "steps": 2, "hidden_size": 96, "slots": 5},
    "no_steps": {"steps": 0, "mask": "any"},
    "no_batch": {"batch": 0, "mask": "any"},
}  # fmt: skip
INTERPRETED = [
    "plain", "smallest", "layernorm", "feedforward", "published", "write_alone", "any_parts", "any_parts_feedforward",
    "no_steps", "no_batch",
]  # fmt: skip
