"""Products over all factors but some, without a division: a factor may be zero."""

import torch
from torch import Tensor


def product_before(factors: Tensor, dim: int) -> Tensor:
    """The product of the factors before each one, 1 before the first."""
    one = torch.ones_like(factors.narrow(dim, 0, min(1, factors.shape[dim])))
    earlier = factors.narrow(dim, 0, max(0, factors.shape[dim] - 1))
    return torch.cat([one, earlier], dim).cumprod(dim)


def product_of_others(factors: Tensor, dim: int) -> Tensor:
    """The product of all factors but each one: the derivative of the product."""
    return product_before(factors, dim) * product_before(factors.flip(dim), dim).flip(dim)
