"""Weighted read: reads[a] = sum_i weights[a,i] memory[i].

memory [B,N,W], weights [B,A,N] -> reads [B,A,W]. Source: Graves et al., "Neural Turing Machines".
"""

from torch import Tensor


def weighted_read(memory: Tensor, weights: Tensor) -> Tensor:
    return weights @ memory
