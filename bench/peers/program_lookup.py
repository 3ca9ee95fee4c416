"""Program lookup in eager PyTorch: a mixture of P linear maps, chosen by the cosine between a query and P keys.

Each form of the mixture is that of `bench/peers/program_mix.py`.

inputs [B,I], query [B,K], strength [B], keys [P,K], weights [P,I,O], biases [P,O] -> outputs [B,O], program_weights.
"""

import torch
from torch import Tensor

from bench.peers import program_mix

EPS = 1e-6


def address(query: Tensor, strength: Tensor, keys: Tensor) -> Tensor:
    query_norm = torch.sqrt(query.square().sum(-1, keepdim=True) + EPS)
    key_norm = torch.sqrt(keys.square().sum(-1) + EPS)
    return torch.softmax(strength.unsqueeze(-1) * (query @ keys.mT) / (query_norm * key_norm + EPS), dim=-1)


def textbook(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    program_weights = address(query, strength, keys)
    return program_mix.textbook(inputs, program_weights, weights, biases), program_weights


def gemm_then_mix(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    program_weights = address(query, strength, keys)
    return program_mix.gemm_then_mix(inputs, program_weights, weights, biases), program_weights


def mix_then_gemm(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    program_weights = address(query, strength, keys)
    return program_mix.mix_then_gemm(inputs, program_weights, weights, biases), program_weights


def expand_then_gemm(
    inputs: Tensor, query: Tensor, strength: Tensor, keys: Tensor, weights: Tensor, biases: Tensor
) -> tuple[Tensor, Tensor]:
    program_weights = address(query, strength, keys)
    return program_mix.expand_then_gemm(inputs, program_weights, weights, biases), program_weights
