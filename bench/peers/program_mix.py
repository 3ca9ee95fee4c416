"""Program mix in eager PyTorch: a mixture of P linear maps with given weights.

inputs [B,I], program_weights [B,P], weights [P,I,O], biases [P,O] -> outputs [B,O].
"""

import torch
from torch import Tensor


def textbook(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """As published: mix the programs for each sample, then apply the mixture. Forms [B,I,O]."""
    mixed = torch.einsum("bp,pio->bio", program_weights, weights)
    return torch.einsum("bi,bio->bo", inputs, mixed) + program_weights @ biases


def gemm_then_mix(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """Every program on every sample in one batched product [P,B,O], then the mixture of its rows."""
    every = torch.baddbmm(biases.unsqueeze(1), inputs.expand(weights.shape[0], -1, -1), weights)
    return torch.bmm(program_weights.unsqueeze(1), every.transpose(0, 1)).squeeze(1)


def mix_then_gemm(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """The published order by matrix products: one for the mixtures [B,I,O], one batched for the outputs."""
    mixed = (program_weights @ weights.flatten(1)).view(-1, *weights.shape[1:])
    return torch.baddbmm((program_weights @ biases).unsqueeze(1), inputs.unsqueeze(1), mixed).squeeze(1)


def expand_then_gemm(inputs: Tensor, program_weights: Tensor, weights: Tensor, biases: Tensor) -> Tensor:
    """The mixture weights multiply the inputs instead: [B, P I] times the weights as they lie, in one product."""
    expanded = (program_weights.unsqueeze(-1) * inputs.unsqueeze(1)).flatten(1)
    return torch.addmm(program_weights @ biases, expanded, weights.flatten(0, 1))
