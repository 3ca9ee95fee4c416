"""The DNC as one writes it from the paper in eager PyTorch, with the parameters and the maths of fastmem.nn.DNC.

One write head. Interface vector: read keys [R,W], read strengths [R], write key [W], write strength, erase [W], values
[W], free gates [R], allocation gate, write gate, read modes [R,3] in the order backward, content, forward.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.peers import content_addressing, temporal_linkage

EPS = 1e-6
CLIP = 20.0


class Memory(NamedTuple):
    memory: Tensor  # [B,N,W]
    usage: Tensor  # [B,N]
    precedence: Tensor  # [B,1,N]
    link: Tensor  # [B,1,N,N]
    write_weights: Tensor  # [B,1,N]
    read_weights: Tensor  # [B,R,N]


class Interface(NamedTuple):
    read_keys: Tensor
    read_strengths: Tensor
    write_key: Tensor
    write_strength: Tensor
    erase: Tensor
    values: Tensor
    free_gates: Tensor
    allocation_gate: Tensor
    write_gate: Tensor
    read_modes: Tensor


def interface_size(heads: int, word: int) -> int:
    return heads * word + 3 * word + 5 * heads + 3


def parse(interface: Tensor, heads: int, word: int) -> Interface:
    sizes = [heads * word, heads, word, 1, word, word, heads, 1, 1, 3 * heads]
    parts = interface.clamp(-CLIP, CLIP).split(sizes, dim=-1)
    return Interface(
        parts[0].unflatten(-1, (heads, word)),
        1 + F.softplus(parts[1]),
        parts[2].unsqueeze(1),
        1 + F.softplus(parts[3]),
        torch.sigmoid(parts[4]).unsqueeze(1),
        parts[5].unsqueeze(1),
        torch.sigmoid(parts[6]),
        torch.sigmoid(parts[7]),
        torch.sigmoid(parts[8]),
        torch.softmax(parts[9].unflatten(-1, (heads, 3)), dim=-1),
    )


def empty(batch: int, slots: int, word: int, heads: int, like: Tensor) -> Memory:
    shapes = ((slots, word), (slots,), (1, slots), (1, slots, slots), (1, slots), (heads, slots))
    return Memory(*(like.new_zeros(batch, *shape) for shape in shapes))


def allocate(usage: Tensor) -> Tensor:
    used, order = torch.sort(EPS + (1 - EPS) * usage, dim=-1, stable=True)
    earlier = torch.cumprod(torch.cat([torch.ones_like(used[:, :1]), used[:, :-1]], dim=-1), dim=-1)
    return torch.zeros_like(used).scatter(-1, order, (1 - used) * earlier)


def write(fields: Interface, state: Memory) -> tuple[Tensor, Tensor, Tensor]:
    """The new usage, write weights and memory."""
    written = state.write_weights.squeeze(1)
    retention = torch.prod(1 - fields.free_gates.unsqueeze(-1) * state.read_weights, dim=1)
    usage = (state.usage + written - state.usage * written) * retention
    content = content_addressing.textbook(state.memory, fields.write_key, fields.write_strength)
    allocation = allocate(usage).unsqueeze(1)
    gate, choice = fields.write_gate.unsqueeze(-1), fields.allocation_gate.unsqueeze(-1)
    weights = gate * (choice * allocation + (1 - choice) * content)
    memory = state.memory * (1 - weights.mT * fields.erase) + weights.mT * fields.values
    return usage, weights, memory


def step(fields: Interface, state: Memory) -> tuple[Memory, Tensor]:
    """One step of the memory: the new state, and the words read [B,R,W]."""
    usage, write_weights, memory = write(fields, state)
    link, precedence, forward, backward = temporal_linkage.textbook(
        state.link, state.precedence, write_weights, state.read_weights
    )
    content = content_addressing.textbook(memory, fields.read_keys, fields.read_strengths)
    modes = fields.read_modes.unsqueeze(-1)
    read_weights = modes[:, :, 0] * backward[:, 0] + modes[:, :, 1] * content + modes[:, :, 2] * forward[:, 0]
    return Memory(memory, usage, precedence, link, write_weights, read_weights), read_weights @ memory


class TextbookDNC(nn.Module):
    """Called like fastmem.nn.DNC, time-major; takes its parameters by load_state_dict."""

    def __init__(
        self, input_size: int, hidden_size: int, num_slots: int, word_size: int, num_read_heads: int, output_size: int
    ) -> None:
        super().__init__()
        self.slots, self.word, self.heads, self.hidden = num_slots, word_size, num_read_heads, hidden_size
        read_size = num_read_heads * word_size
        self.weight_ih_l0 = nn.Parameter(torch.zeros(4 * hidden_size, input_size + read_size))
        self.weight_hh_l0 = nn.Parameter(torch.zeros(4 * hidden_size, hidden_size))
        self.bias_ih_l0 = nn.Parameter(torch.zeros(4 * hidden_size))
        self.bias_hh_l0 = nn.Parameter(torch.zeros(4 * hidden_size))
        self.interface = nn.Linear(hidden_size, interface_size(num_read_heads, word_size))
        self.output = nn.Linear(hidden_size + read_size, output_size)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Memory]:
        batch = inputs.shape[1]
        hidden = cell = inputs.new_zeros(batch, self.hidden)
        reads = inputs.new_zeros(batch, self.heads * self.word)
        state = empty(batch, self.slots, self.word, self.heads, inputs)
        outputs = []
        for x in inputs.unbind(0):
            output, hidden, cell, reads, state = self.advance(x, hidden, cell, reads, state)
            outputs.append(output)
        return torch.stack(outputs), state

    def advance(
        self, x: Tensor, hidden: Tensor, cell: Tensor, reads: Tensor, state: Memory
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Memory]:
        """One time step: the output, and what the next one starts from."""
        hidden, cell = torch.lstm_cell(
            torch.cat([x, reads], dim=-1), (hidden, cell),
            self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0,
        )  # fmt: skip
        state, words = self.access(self.interface(hidden), state)
        reads = words.flatten(1)
        output = self.output(torch.cat([hidden, reads], dim=-1)).clamp(-CLIP, CLIP)
        return output, hidden, cell, reads, state

    def access(self, interface: Tensor, state: Memory) -> tuple[Memory, Tensor]:
        return step(parse(interface, self.heads, self.word), state)
