from typing import Any

import torch
from torch import Tensor

from fastmem.ops import DNCConfig, ProgramConfig
from fastmem.reference._sequence import Memory
from fastmem.reference.dnc_sequence import DNCMemory
from tests.cases import dnc_step


def make(
    steps: int = 6,
    batch: int = 2,
    input_size: int = 3,
    hidden_size: int = 6,
    slots: int = 7,
    word: int = 4,
    read_heads: int = 2,
    write_heads: int = 1,
    output_size: int = 5,
    mask: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
    **options: Any,
) -> dict[str, Any]:
    """By name: inputs, parameters, a state as it may come up, the step mask (see `step_mask`) and the configuration."""
    config = DNCConfig(input_size, hidden_size, slots, word, read_heads, write_heads, output_size, **options)
    state = dnc_step.make(batch, slots, word, read_heads, write_heads, dtype=torch.float64, seed=seed)
    tensors = arguments(DNCMemory(*config.encoded(4)), state, steps, batch, seed)
    return {
        **{name: tensor.to(dtype).to(device) for name, tensor in tensors.items()},
        "step_mask": step_mask(mask, steps, batch, seed, device),
        "config": config,
    }


def arguments(memory: Memory, state: dict[str, Tensor], steps: int, batch: int, seed: int) -> dict[str, Tensor]:
    """Inputs, parameters that make numbers of about 1 of what they see, and a state of which some parts are given."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = {"inputs": normal(steps, batch, memory.input_size)}
    for name, shape in memory.parameter_shapes().items():
        scale = 0.5 if len(shape) == 1 or name == "program_biases" else shape[1] ** -0.5 if shape[1] else 1.0
        tensors[name] = 1 + 0.2 * normal(*shape) if name == "norm_weight" else scale * normal(*shape)
    for name, shape in memory.state_shapes().items():
        tensors[name] = state[name] if name in state else 0.5 * normal(batch, *shape)
    return tensors


def step_mask(kind: str | None, steps: int, batch: int, seed: int = 0, device: str = "cpu") -> Tensor | None:
    """None; "padded": sequences that end one after the other; "any": all bits; "controlled": those or nothing.

    "intervals": the memory in every third step only, from the third on, and a step of each sample's own; "never": not
    at all.
    """
    if kind is None:
        return None
    if kind == "padded":
        ends = torch.linspace(max(steps - batch, 1), steps, batch).round()
        bits = torch.where(torch.arange(steps).unsqueeze(1) < ends, 7, 0)
    elif kind in ("intervals", "never"):
        bits = torch.ones(steps, batch, dtype=torch.int64)
        if kind == "intervals":
            bits[2::3] = 7
            bits[4:8, 0] = torch.tensor([5, 7, 3, 1])[: len(bits[4:8])]
    else:
        bits = torch.randint(8, (steps, batch), generator=torch.Generator().manual_seed(seed))
        bits = torch.where(bits & 1 != 0, bits, 0) if kind == "controlled" else bits
    return bits.to(torch.uint8).to(device)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_step": {"steps": 1},
    "one_chunk": {"steps": 3, "slots": 5},
    "whole_chunks": {"steps": 8, "slots": 5},
    "long": {"steps": 40, "batch": 1, "slots": 5},
    "smallest": {"input_size": 1, "hidden_size": 1, "slots": 1, "word": 1, "read_heads": 1, "output_size": 1},
    "odd": {"batch": 3, "hidden_size": 17, "slots": 33, "word": 5, "read_heads": 3},
    "two_write_heads": {"batch": 3, "slots": 9, "read_heads": 3, "write_heads": 2},
    "layernorm": {"controller": "layernorm_lstm", "write_heads": 2},
    "feedforward": {"controller": "feedforward"},
    "masked": {"masked": True, "mask_floor": 0.1},
    "deallocates": {"deallocates": True},
    "sharpened": {"sharpened": True, "norm": "outer", "write_heads": 2},
    "all_variants": {"masked": True, "deallocates": True, "sharpened": True, "norm": "rsqrt", "steps": 9},
    "published": {"oneplus": False, "detach_usage_write": True},
    "no_allocation_eps": {"allocation_eps": 0.0, "slots": 5},
    "clipped": {"clip": 0.5},
    "unbounded": {"clip": None, "norm": "clamp"},
    "padded": {"mask": "padded", "batch": 4, "steps": 7},
    "any_parts": {"mask": "any", "batch": 3, "steps": 11, "write_heads": 2},
    "any_parts_of_all": {
        "mask": "any", "batch": 3, "steps": 10, "controller": "layernorm_lstm", "masked": True, "deallocates": True,
        "sharpened": True, "norm": "outer",
    },
    "any_parts_published": {"mask": "any", "batch": 3, "detach_usage_write": True, "deallocates": True},
    "any_parts_feedforward": {"mask": "controlled", "batch": 3, "steps": 9, "controller": "feedforward"},
    "many_slots": {"batch": 1, "steps": 10, "hidden_size": 33, "slots": 130, "word": 20, "read_heads": 4},
    "intervals": {"mask": "intervals", "steps": 28},
    "intervals_of_all": {
        "mask": "intervals", "steps": 13, "controller": "layernorm_lstm", "deallocates": True, "sharpened": True,
        "hidden_size": 50, "word": 17,
    },
    "intervals_feedforward": {"mask": "intervals", "steps": 11, "controller": "feedforward"},
    "never": {"mask": "never", "steps": 4},
    "programs": {"programs": ProgramConfig(2, 3)},
    "programs_wide": {"programs": ProgramConfig(3, 3, norm="outer"), "masked": True, "sharpened": True, "batch": 3},
    "programs_squashed": {"programs": ProgramConfig(3, 2, tanh_keys=True, norm="width"), "controller": "feedforward"},
    "direct_programs": {"programs": ProgramConfig(3, direct_attention=True), "clip": 0.5},
    "one_program": {"programs": ProgramConfig(1, 2), "write_heads": 2},
    "any_parts_programs": {"mask": "any", "batch": 3, "steps": 11, "programs": ProgramConfig(2, 4)},
    "intervals_programs": {"mask": "intervals", "steps": 12, "programs": ProgramConfig(2)},
    "tops": {"projected": False, "batch": 5},
    "any_tops": {"projected": False, "mask": "any", "batch": 3},
    "whole_panels": {"batch": 1, "steps": 2, "hidden_size": 96, "slots": 5},
    "no_steps": {"steps": 0, "mask": "any"},
    "no_batch": {"batch": 0, "mask": "any"},
}  # fmt: skip
INTERPRETED = [
    "plain", "smallest", "layernorm", "feedforward", "all_variants", "any_parts", "any_parts_feedforward", "no_steps",
    "no_batch",
]  # fmt: skip
