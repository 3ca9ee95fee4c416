"""Program mix: a linear map mixed from stored programs.

    outputs[b,:] = sum_p program_weights[b,p] (inputs[b] @ weights[p] + biases[p])                 [B,O]

inputs [B,I], program_weights [B,P], weights [P,I,O], biases [P,O] or None. The mixed map [B,I,O] is never formed.
Weights and biases may be bfloat16 or float16 when the rest is float32; their gradients have their dtype.
Source: Le et al., "Neural Stored-program Memory".
"""

import torch
from torch import Tensor


def program_mix(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor | None) -> Tensor:
    # [P,B,O], by one product, where `@` chooses another, with other bits, when a gradient is asked for.
    outputs = inputs.expand(len(weights), -1, -1).bmm(weights.to(inputs.dtype))
    if biases is not None:
        outputs = outputs + biases.to(inputs.dtype).unsqueeze(1)
    return torch.einsum("bp,pbo->bo", program_weights, outputs)


def program_mix_backward(
    grad_outputs: Tensor,
    inputs: Tensor,
    program_weights: Tensor,
    weights: Tensor,
    biases: Tensor | None,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of inputs, program weights, weights and biases; an unwanted or absent one is a size-0 tensor."""
    grad_inputs, grad_program_weights = inputs.new_empty(0), inputs.new_empty(0)
    grad_weights = weights.new_empty(0)
    grad_biases = inputs.new_empty(0) if biases is None else biases.new_empty(0)
    if output_mask[0] or output_mask[1]:
        pulled = grad_outputs @ weights.to(inputs.dtype).mT  # [P,B,I]
    if output_mask[0]:
        grad_inputs = torch.einsum("bp,pbi->bi", program_weights, pulled)
    if output_mask[1]:
        grad_program_weights = torch.einsum("pbi,bi->bp", pulled, inputs)
        if biases is not None:
            grad_program_weights = grad_program_weights + grad_outputs @ biases.to(inputs.dtype).mT
    if output_mask[2]:
        mixed = program_weights.unsqueeze(2) * inputs.unsqueeze(1)  # [B,P,I]
        grad_weights = (mixed.flatten(1).mT @ grad_outputs).view(weights.shape).to(weights.dtype)
    if output_mask[3] and biases is not None:
        grad_biases = (program_weights.mT @ grad_outputs).to(biases.dtype)
    return grad_inputs, grad_program_weights, grad_weights, grad_biases
