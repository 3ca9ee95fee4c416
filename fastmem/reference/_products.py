"""Products along a dimension that leave something out, without a division: a factor may be zero."""

import torch
from torch import Tensor


def product_of_those_before(factors: Tensor, dim: int) -> Tensor:
    """At each index the product of all factors before it; 1 at the first."""
    count = factors.shape[dim]
    first = torch.ones_like(factors.narrow(dim, 0, min(count, 1)))
    return torch.cat([first, factors.narrow(dim, 0, max(count - 1, 0))], dim).cumprod(dim)


def product_of_the_others(factors: Tensor, dim: int) -> Tensor:
    """At each index the product of all factors but its own: of those before times those after."""
    after = product_of_those_before(factors.flip(dim), dim).flip(dim)
    return product_of_those_before(factors, dim) * after
