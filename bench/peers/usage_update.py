"""Usage of the slots in eager PyTorch.

retention = prod_r (1 - f_r w_r);  usage' = (u + w - u w) retention, with w = 1 - prod_q (1 - w_q).
usage [B,N], write_weights [B,Q,N], read_weights [B,R,N], free_gates [B,R] -> usage [B,N], retention [B,N].
"""

import torch
from torch import Tensor


def textbook(usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor) -> tuple[Tensor, Tensor]:
    """As papers and public code write it."""
    written = 1 - torch.prod(1 - write_weights, dim=1)
    retention = torch.prod(1 - free_gates.unsqueeze(-1) * read_weights, dim=1)
    return (usage + written - usage * written) * retention, retention


def fast_eager(usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor) -> tuple[Tensor, Tensor]:
    """Head by head with fused multiply-adds: u + w - u w is lerp(u, 1, w), and p - p f w a step of the product."""
    one = usage.new_ones(())
    for weights in write_weights.unbind(1):
        usage = torch.lerp(usage, one, weights)
    read, *others = (read_weights * free_gates.unsqueeze(-1)).unbind(1)
    retention = 1 - read
    for read in others:
        retention = torch.addcmul(retention, retention, read, value=-1)
    return usage * retention, retention
