"""Program lookup: a linear map mixed from stored programs that are found by content.

    program_weights[b,p] = softmax_p( strength[b] * D(query[b], keys[p]) )                         [B,P]
    outputs[b,:] = sum_p program_weights[b,p] (inputs[b] @ weights[p] + biases[p])                 [B,O]

inputs [B,I], query [B,K], strength [B], keys [P,K], weights [P,I,O], biases [P,O] or None. The mixed map [B,I,O] is
never formed. Weights and biases may be bfloat16 or float16 when the rest is float32; their gradients have their dtype.
D and the norms are those of `_similarity`. Source: Le et al., "Neural Stored-program Memory".
"""

import torch
from torch import Tensor

from fastmem.reference._similarity import scores, scores_backward, softmax


def program_mix(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
    outputs = inputs @ weights.to(inputs.dtype)  # [P,B,O]
    if biases is not None:
        outputs = outputs + biases.to(inputs.dtype).unsqueeze(1)
    return torch.einsum("bp,pbo->bo", program_weights, outputs)


def program_lookup(
    inputs: Tensor,
    query: Tensor,
    strength: Tensor,
    keys: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor]:
    score, dead = scores(keys.unsqueeze(0), query.unsqueeze(1), strength.unsqueeze(1), None, None, norm, eps)
    program_weights = softmax(score, dead).squeeze(1)
    return program_mix(inputs, program_weights, weights, biases), program_weights


def program_lookup_backward(
    grad_outputs: Tensor | None,
    grad_program_weights: Tensor | None,
    program_weights: Tensor,
    inputs: Tensor,
    query: Tensor,
    strength: Tensor,
    keys: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    norm: str,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, query, strength, keys, weights and biases; an unwanted or absent one is a size-0 tensor."""
    if grad_outputs is None:
        grad_outputs = inputs.new_zeros(inputs.shape[0], weights.shape[2])
    pulled = grad_outputs @ weights.to(inputs.dtype).mT  # [P,B,I]
    into_weights = torch.einsum("pbi,bi->bp", pulled, inputs)
    if biases is not None:
        into_weights = into_weights + grad_outputs @ biases.to(inputs.dtype).mT
    if grad_program_weights is not None:
        into_weights = into_weights + grad_program_weights

    dead = (program_weights == 0).all(-1)[:, None, None]
    grad_scores = program_weights * (into_weights - (program_weights * into_weights).sum(-1, keepdim=True))
    addressing_mask = [output_mask[3], output_mask[1], output_mask[2], False]
    grad_keys, grad_query, grad_strength, _ = scores_backward(
        grad_scores.unsqueeze(1), dead, keys.unsqueeze(0), query.unsqueeze(1), strength.unsqueeze(1), None, norm, eps,
        addressing_mask,
    )  # fmt: skip
    grad_inputs, grad_weights = inputs.new_empty(0), weights.new_empty(0)
    grad_biases = inputs.new_empty(0) if biases is None else biases.new_empty(0)
    if output_mask[0]:
        grad_inputs = torch.einsum("bp,pbi->bi", program_weights, pulled)
    if output_mask[4]:
        mixed = program_weights.unsqueeze(2) * inputs.unsqueeze(1)  # [B,P,I]
        grad_weights = (mixed.flatten(1).mT @ grad_outputs).view(weights.shape).to(weights.dtype)
    if output_mask[5] and biases is not None:
        grad_biases = (program_weights.mT @ grad_outputs).to(biases.dtype)
    return (
        grad_inputs,
        grad_query.squeeze(1) if output_mask[1] else grad_query,
        grad_strength.squeeze(1) if output_mask[2] else grad_strength,
        grad_keys.squeeze(0) if output_mask[3] else grad_keys,
        grad_weights,
        grad_biases,
    )
