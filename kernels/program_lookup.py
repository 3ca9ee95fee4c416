"""Program lookup in Triton: outputs = sum over p of a_p (inputs @ weights_p + biases_p), a a softmax of content scores.

Addressing is that of content_addressing with the program keys as memory and the batch as heads; the mixing is that of
program_mix.
"""

from torch import Tensor

from .content_addressing import content_addressing, content_addressing_backward
from .program_mix import mix_gradients, program_mix


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
    program_weights = content_addressing(keys[None], query[None], strength[None], None, None, norm, eps)[0]
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
    want_inputs, want_query, want_strength, want_keys, want_weights, want_biases = output_mask
    want_addressing = want_query or want_strength or want_keys
    program_weights = program_weights.contiguous()
    grad_inputs, grad_program_weights, grad_weights, grad_biases = mix_gradients(
        grad_outputs, grad_program_weights, inputs, program_weights, weights, biases,
        [want_inputs, want_addressing, want_weights, want_biases],
    )  # fmt: skip
    if not want_addressing:
        return grad_inputs, query.new_empty(0), strength.new_empty(0), keys.new_empty(0), grad_weights, grad_biases
    addressing_mask = [want_keys, want_query, want_strength, False]
    grad_keys, grad_query, grad_strength, _ = content_addressing_backward(
        grad_program_weights[None], program_weights[None], keys[None], query[None], strength[None],
        None, None, norm, eps, addressing_mask,
    )  # fmt: skip
    return (
        grad_inputs,
        grad_query[0] if want_query else grad_query,
        grad_strength[0] if want_strength else grad_strength,
        grad_keys[0] if want_keys else grad_keys,
        grad_weights,
        grad_biases,
    )
