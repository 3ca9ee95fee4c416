"""Weighted read: reads[a] = sum_i weights[a,i] memory[i].

memory [B,N,W], weights [B,A,N] -> reads [B,A,W]. Source: Graves et al., "Neural Turing Machines".
"""

from torch import Tensor


def weighted_read(memory: Tensor, weights: Tensor) -> Tensor:
    return weights @ memory


def weighted_read_backward(
    grad_reads: Tensor, memory: Tensor, weights: Tensor, output_mask: list[bool]
) -> tuple[Tensor, Tensor]:
    """Gradients of the two inputs; an unwanted one is a size-0 tensor.

    grad memory[i] = sum_a weights[a,i] grad_reads[a],   grad weights[a,i] = <grad_reads[a], memory[i]>
    """
    return (
        weights.mT @ grad_reads if output_mask[0] else memory.new_empty(0),
        grad_reads @ memory.mT if output_mask[1] else memory.new_empty(0),
    )
