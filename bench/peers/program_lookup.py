"""Program lookup in eager PyTorch: a mixture of P linear maps, chosen by the cosine between a query and P keys.

inputs [B,I], query [B,K], strength [B], keys [P,K], weights [P,I,O], biases [P,O] -> outputs [B,O], program_weights.
"""

import torch
from torch import Tensor

EPS = 1e-6


def address(query: Tensor, strength: Tensor, keys: Tensor) -> Tensor:
    query_norm = torch.sqrt(query.square().sum(-1, keepdim=True) + EPS)
    key_norm = torch.sqrt(keys.square().sum(-1) + EPS)
    return torch.softmax(strength.unsqueeze(-1) * (query @ keys.mT) / (query_norm * key_norm + EPS), dim=-1)


def textbook(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    """As published: mix the programs for each sample, then apply the mixture. Forms [B,I,O]."""
    program_weights = address(query, strength, keys)
    mixed = torch.einsum("bp,pio->bio", program_weights, weights)
    return torch.einsum("bi,bio->bo", inputs, mixed) + program_weights @ biases, program_weights


def gemm_then_mix(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    """Every program on every sample in one batched product [P,B,O], then the mixture of its rows."""
    program_weights = address(query, strength, keys)
    every = torch.baddbmm(biases.unsqueeze(1), inputs.expand(keys.shape[0], -1, -1), weights)
    return torch.bmm(program_weights.unsqueeze(1), every.transpose(0, 1)).squeeze(1), program_weights


def mix_then_gemm(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    """The published order by matrix products: one for the mixtures [B,I,O], one batched for the outputs."""
    program_weights = address(query, strength, keys)
    mixed = (program_weights @ weights.flatten(1)).view(-1, *weights.shape[1:])
    outputs = torch.baddbmm((program_weights @ biases).unsqueeze(1), inputs.unsqueeze(1), mixed)
    return outputs.squeeze(1), program_weights


def expand_then_gemm(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    """The mixture weights multiply the inputs instead: [B, P I] times the weights as they lie, in one product."""
    program_weights = address(query, strength, keys)
    expanded = (program_weights.unsqueeze(-1) * inputs.unsqueeze(1)).flatten(1)
    return torch.addmm(program_weights @ biases, expanded, weights.flatten(0, 1)), program_weights
