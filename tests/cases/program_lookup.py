from typing import Any

import torch
from torch import Tensor

from tests.cases.content_addressing import DEFAULT_EPS


def make(
    batch: int = 4,
    inputs: int = 16,
    outputs: int = 12,
    programs: int = 3,
    key: int = 4,
    biases: bool = True,
    program_dtype: torch.dtype | None = None,
    norm: str = "inner",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """`program_dtype` is that of weights and biases."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixed = {
        "weights": normal(programs, inputs, outputs) / max(inputs, 1) ** 0.5,
        "biases": normal(programs, outputs) if biases else None,
    }
    tensors: dict[str, Any] = {
        "inputs": normal(batch, inputs).tanh(),
        "query": normal(batch, key),
        "strength": torch.nn.functional.softplus(2 * normal(batch)),
        "keys": normal(programs, key),
        **{name: None if x is None else x.to(program_dtype or dtype) for name, x in mixed.items()},
    }
    for name in ("inputs", "query", "strength", "keys"):
        tensors[name] = tensors[name].to(dtype)
    return {
        **{name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()},
        "norm": norm,
        "eps": DEFAULT_EPS[norm],
    }


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one_of_each": {"batch": 1, "inputs": 1, "outputs": 1, "programs": 1, "key": 1},
    "odd": {"batch": 3, "inputs": 63, "outputs": 65, "programs": 5, "key": 20},
    "one_sample": {"batch": 1, "inputs": 65, "outputs": 20, "programs": 2},
    "no_biases": {"batch": 5, "biases": False},
    "wide": {"batch": 16, "inputs": 128, "outputs": 263, "programs": 4},
    "thousand": {"batch": 2, "inputs": 20, "outputs": 1000, "programs": 3},
    "outer": {"norm": "outer"},
    "rsqrt": {"norm": "rsqrt"},
    "clamp": {"norm": "clamp"},
    "width": {"norm": "width"},
    "bfloat16_programs": {"inputs": 33, "outputs": 20, "program_dtype": torch.bfloat16},
    "float16_programs": {"inputs": 33, "outputs": 20, "program_dtype": torch.float16, "biases": False},
    "no_batch": {"batch": 0},
    "no_programs": {"programs": 0},
}
INTERPRETED = [name for name in CASES if name not in ("wide", "thousand")]
