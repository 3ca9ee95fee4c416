"""Memory write: all write heads erase, then all add.

    M'[i] = M[i] retention[i] prod_q (1 - w[q,i] erase[q]) + sum_q w[q,i] values[q]

memory [B,N,W], write_weights w [B,Q,N], erase [B,Q,W], values [B,Q,W], retention [B,N] or None (1) -> memory [B,N,W].
Source: Graves et al., "Neural Turing Machines"; retention: Csordas and Schmidhuber, "Improving Differentiable Neural
Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control".
"""

from torch import Tensor


def memory_write(
    memory: Tensor, write_weights: Tensor, erase: Tensor, values: Tensor, retention: Tensor | None
) -> Tensor:
    for weights, erased in zip(write_weights.unbind(1), erase.unbind(1), strict=True):
        memory = memory * (1 - weights.unsqueeze(-1) * erased.unsqueeze(-2))
    if retention is not None:
        memory = memory * retention.unsqueeze(-1)
    return memory + write_weights.mT @ values
