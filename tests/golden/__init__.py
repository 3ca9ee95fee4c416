"""Results of published implementations in float64; README.md beside this file describes them."""

import json
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor


def load(name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays and description of one file."""
    with numpy.load(Path(__file__).parent / f"{name}.npz") as file:
        arrays = {key: torch.from_numpy(file[key]) for key in file.files if key != "meta"}
        return arrays, json.loads(str(file["meta"]))


def error(actual: Tensor | None, expected: Tensor) -> float:
    """max|a-b| / max(1, max|b|), the measure of README.md. None is an absent gradient, an error here."""
    assert actual is not None
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if not expected.numel():
        return 0.0
    difference = (actual.detach() - expected.detach()).abs().max()
    return float(difference / expected.detach().abs().max().clamp(min=1))
