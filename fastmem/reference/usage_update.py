"""Usage of the slots after the last write, less what the free gates release.

    retention[i] = prod_r (1 - free_gates[r] read_weights[r,i])
    usage'[i] = (1 - (1 - usage[i]) prod_q (1 - write_weights[q,i])) retention[i]

usage [B,N], write_weights [B,Q,N], read_weights [B,R,N] (both of the step before), free_gates [B,R] -> usage [B,N],
retention [B,N]. Source: Graves et al., "Hybrid computing using a neural network with dynamic external memory".
"""

from torch import Tensor


def usage_update(
    usage: Tensor, write_weights: Tensor, read_weights: Tensor, free_gates: Tensor
) -> tuple[Tensor, Tensor]:
    retention = (1 - free_gates.unsqueeze(-1) * read_weights).prod(1)
    # Head by head: the same product, but a small weight on a free slot is not rounded against 1.
    for weights in write_weights.unbind(1):
        usage = usage + weights - usage * weights
    return usage * retention, retention
