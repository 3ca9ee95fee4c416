"""Content addressing: attention weights over memory rows by cosine similarity.

    weights[b,a,i] = softmax_i( strengths[b,a] * D(keys[b,a], memory[b,i]) )       [B,A,N]

memory [B,N,W], keys [B,A,W], strengths [B,A], key_mask [B,A,W] or None, slot_mask [B,N] bool or None. D, the norms and
the special scores are those of `_similarity`. Sources: Graves et al., "Neural Turing Machines" and "Hybrid computing
using a neural network with dynamic external memory"; key mask: Csordas and Schmidhuber, "Improving Differentiable
Neural Computers Through Memory Masking, De-allocation, and Link Distribution Sharpness Control".
"""

from torch import Tensor

from fastmem.reference._similarity import scores, scores_backward, softmax, visible


def content_addressing(
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
) -> Tensor:
    return softmax(*scores(visible(memory, slot_mask), keys, strengths, key_mask, slot_mask, norm, eps))


def content_addressing_backward(
    grad_weights: Tensor,
    weights: Tensor,
    memory: Tensor,
    keys: Tensor,
    strengths: Tensor,
    key_mask: Tensor | None,
    slot_mask: Tensor | None,
    norm: str,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of memory, keys, strengths and key_mask; an unwanted or absent one is a size-0 tensor."""
    dead = (weights == 0).all(-1, keepdim=True)
    grad_scores = weights * (grad_weights - (weights * grad_weights).sum(-1, keepdim=True))
    rows = visible(memory, slot_mask)
    grad_memory, grad_keys, grad_strengths, grad_key_mask = scores_backward(
        grad_scores, dead, rows, keys, strengths, key_mask, norm, eps, output_mask
    )
    if output_mask[0]:
        grad_memory = visible(grad_memory, slot_mask)
    return grad_memory, grad_keys, grad_strengths, grad_key_mask
