"""The handwritten digits of scikit-learn, 1,797 images of 8 x 8 pixels. scikit-learn is imported when they are read."""

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor


def check_installed() -> None:
    """Says what is missing when a task is made, not in the midst of a run."""
    if find_spec("sklearn") is None:
        raise ImportError("the digits need scikit-learn, which the extra cli brings: pip install scikit-learn")


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Images [1797,8,8] with values from 0 to 1, and which digit each is [1797]."""
    from sklearn.datasets import load_digits

    found = load_digits()
    return torch.from_numpy(found.images).float() / 16, torch.from_numpy(found.target).long()
