from typing import Any

import torch

from tests.cases import program_lookup


def make(
    batch: int = 4,
    inputs: int = 16,
    outputs: int = 12,
    programs: int = 3,
    biases: bool = True,
    program_dtype: torch.dtype | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """The programs of program_lookup. `program_dtype` is that of weights and biases."""
    values = program_lookup.make(
        batch, inputs, outputs, programs, biases=biases, program_dtype=program_dtype, dtype=dtype, device=device,
        seed=seed,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(batch, programs, generator=generator, dtype=torch.float64).softmax(-1)
    return {
        "inputs": values["inputs"],
        "program_weights": mixture.to(dtype).to(device),
        "weights": values["weights"],
        "biases": values["biases"],
    }


CASES: dict[str, dict[str, Any]] = {
    name: {option: value for option, value in case.items() if option != "key"}
    for name, case in program_lookup.CASES.items()
    if "norm" not in case
}
INTERPRETED = [name for name in program_lookup.INTERPRETED if name in CASES]
