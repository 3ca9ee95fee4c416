"""Program lookup: a linear map mixed from stored programs that are found by content.

    program_weights[b,p] = softmax_p( strength[b] * D(query[b], keys[p]) )                         [B,P]
    outputs = program_mix(inputs, program_weights, weights, biases)                                [B,O]

inputs [B,I], query [B,K], strength [B], keys [P,K], weights [P,I,O], biases [P,O] or None. D and the norms are those of
`_similarity`. Source: Le et al., "Neural Stored-program Memory".
"""

from torch import Tensor

from fastmem.reference._similarity import scores, scores_backward, softmax
from fastmem.reference.program_mix import program_mix, program_mix_backward


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
    grad_inputs, into_weights, grad_weights, grad_biases = program_mix_backward(
        grad_outputs, inputs, program_weights, weights, biases, [output_mask[0], True, *output_mask[4:]]
    )
    if grad_program_weights is not None:
        into_weights = into_weights + grad_program_weights

    dead = (program_weights == 0).all(-1)[:, None, None]
    grad_scores = program_weights * (into_weights - (program_weights * into_weights).sum(-1, keepdim=True))
    addressing_mask = [output_mask[3], output_mask[1], output_mask[2], False]
    grad_keys, grad_query, grad_strength, _ = scores_backward(
        grad_scores.unsqueeze(1), dead, keys.unsqueeze(0), query.unsqueeze(1), strength.unsqueeze(1), None, norm, eps,
        addressing_mask,
    )  # fmt: skip
    return (
        grad_inputs,
        grad_query.squeeze(1) if output_mask[1] else grad_query,
        grad_strength.squeeze(1) if output_mask[2] else grad_strength,
        grad_keys.squeeze(0) if output_mask[3] else grad_keys,
        grad_weights,
        grad_biases,
    )
