"""The DNC of bench.peers.dnc_textbook in JAX: one jitted scan over the sequence, with or without checkpoints.

Equations, constants and the order of the interface vector are those of the textbook. A checkpoint around the step keeps
the states alone and computes everything else once more in the backward.
"""

from functools import partial
from typing import NamedTuple

import jax
from jax import Array, lax
from jax import numpy as jnp
from torch import Tensor

import fastmem
from bench.peers.dnc_textbook import CLIP, EPS

Parameters = dict[str, Array]


class State(NamedTuple):
    hidden: Array  # [B,H]
    cell: Array  # [B,H]
    reads: Array  # [B,R,W]
    memory: Array  # [B,N,W]
    usage: Array  # [B,N]
    precedence: Array  # [B,N]
    link: Array  # [B,N,N]
    write_weights: Array  # [B,N]
    read_weights: Array  # [B,R,N]


def empty(batch: int, hidden: int, slots: int, word: int, heads: int) -> State:
    shapes = ((hidden,), (hidden,), (heads, word), (slots, word), (slots,), (slots,), (slots, slots), (slots,))
    return State(*(jnp.zeros((batch, *shape)) for shape in (*shapes, (heads, slots))))


def lstm(parameters: Parameters, seen: Array, hidden: Array, cell: Array) -> tuple[Array, Array]:
    gates = seen @ parameters["weight_ih_l0"].T + parameters["bias_ih_l0"]
    gates = gates + hidden @ parameters["weight_hh_l0"].T + parameters["bias_hh_l0"]
    enter, forget, new, show = jnp.split(gates, 4, axis=-1)
    cell = jax.nn.sigmoid(forget) * cell + jax.nn.sigmoid(enter) * jnp.tanh(new)
    return jax.nn.sigmoid(show) * jnp.tanh(cell), cell


def lookup(memory: Array, keys: Array, strengths: Array) -> Array:
    """Content addressing: memory [B,N,W], keys [B,A,W], strengths [B,A] -> weights [B,A,N]."""
    key_norm = jnp.sqrt(jnp.square(keys).sum(-1) + EPS)
    memory_norm = jnp.sqrt(jnp.square(memory).sum(-1) + EPS)
    similarity = jnp.einsum("bnw,baw->ban", memory, keys) / (key_norm[..., None] * memory_norm[:, None] + EPS)
    return jax.nn.softmax(strengths[..., None] * similarity, axis=-1)


def allocate(usage: Array) -> Array:
    slots = jnp.broadcast_to(jnp.arange(usage.shape[-1]), usage.shape)
    used, order = lax.sort_key_val(EPS + (1 - EPS) * usage, slots, is_stable=True)
    earlier = jnp.cumprod(jnp.concatenate([jnp.ones_like(used[:, :1]), used[:, :-1]], axis=-1), axis=-1)
    rows = jnp.arange(len(usage))[:, None]
    return jnp.zeros_like(used).at[rows, order].set((1 - used) * earlier, unique_indices=True)


def step(parameters: Parameters, state: State, x: Array) -> tuple[State, Array]:
    batch, heads, word = state.reads.shape
    seen = jnp.concatenate([x, state.reads.reshape(batch, -1)], axis=-1)
    hidden, cell = lstm(parameters, seen, state.hidden, state.cell)

    interface = jnp.clip(hidden @ parameters["interface.weight"].T + parameters["interface.bias"], -CLIP, CLIP)
    sizes = (heads * word, heads, word, 1, word, word, heads, 1, 1, 3 * heads)
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes) - 1)]
    fields = jnp.split(interface, ends, axis=-1)
    read_keys, read_strengths = fields[0].reshape(batch, heads, word), 1 + jax.nn.softplus(fields[1])
    write_key, write_strength = fields[2][:, None], 1 + jax.nn.softplus(fields[3])
    erase, values, free_gates = jax.nn.sigmoid(fields[4]), fields[5], jax.nn.sigmoid(fields[6])
    allocation_gate, write_gate = jax.nn.sigmoid(fields[7]), jax.nn.sigmoid(fields[8])
    modes = jax.nn.softmax(fields[9].reshape(batch, heads, 3), axis=-1)

    retention = jnp.prod(1 - free_gates[..., None] * state.read_weights, axis=1)
    usage = (state.usage + state.write_weights - state.usage * state.write_weights) * retention
    content = lookup(state.memory, write_key, write_strength)[:, 0]
    weights = write_gate * (allocation_gate * allocate(usage) + (1 - allocation_gate) * content)
    memory = state.memory * (1 - weights[..., None] * erase[:, None]) + weights[..., None] * values[:, None]

    w_i, w_j = weights[:, :, None], weights[:, None, :]
    off_diagonal = 1 - jnp.eye(weights.shape[-1])
    link = ((1 - w_i - w_j) * state.link + w_i * state.precedence[:, None]) * off_diagonal
    precedence = (1 - weights.sum(-1, keepdims=True)) * state.precedence + weights
    forward = jnp.einsum("bij,brj->bri", link, state.read_weights)
    backward = jnp.einsum("bij,bri->brj", link, state.read_weights)
    found = lookup(memory, read_keys, read_strengths)
    read_weights = modes[..., :1] * backward + modes[..., 1:2] * found + modes[..., 2:] * forward
    reads = jnp.einsum("brn,bnw->brw", read_weights, memory)

    shown = jnp.concatenate([hidden, reads.reshape(batch, -1)], axis=-1)
    output = jnp.clip(shown @ parameters["output.weight"].T + parameters["output.bias"], -CLIP, CLIP)
    return State(hidden, cell, reads, memory, usage, precedence, link, weights, read_weights), output


def sequence(parameters: Parameters, inputs: Array, first: State, checkpoint: bool) -> Array:
    body = partial(step, parameters)
    return lax.scan(jax.checkpoint(body, prevent_cse=False) if checkpoint else body, first, inputs)[1]


class JaxDNC:
    """With the parameters of a fastmem.nn.DNC, on one input; both calls wait for their results."""

    def __init__(self, network: fastmem.nn.DNC, inputs: Tensor, checkpoint: bool) -> None:
        self.parameters = {name: jnp.asarray(value.numpy()) for name, value in network.state_dict().items()}
        sizes = (network.num_slots, network.word_size, network.num_read_heads)
        first = empty(inputs.shape[1], network.hidden_size, *sizes)
        self.arguments = (jnp.asarray(inputs.numpy()), first)
        run = partial(sequence, checkpoint=checkpoint)
        self.run = jax.jit(run)
        self.differentiate = jax.jit(jax.value_and_grad(lambda *arguments: jnp.square(run(*arguments)).mean()))

    def forward(self) -> Array:
        return jax.block_until_ready(self.run(self.parameters, *self.arguments))

    def gradients(self) -> Parameters:
        _, gradients = jax.block_until_ready(self.differentiate(self.parameters, *self.arguments))
        return gradients
