"""One memory step of a DNC in eager PyTorch, one write head: the textbook form, and the fastest that operators allow.

interface [B,S] in the order of bench.peers.dnc_textbook, memory [B,N,W], usage [B,N], precedence [B,1,N], link
[B,1,N,N], write_weights [B,1,N], read_weights [B,R,N] -> the same six, reads [B,R,W].
"""

from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import allocation, content_addressing, dnc_textbook, memory_write, temporal_linkage


def _fields(interface: Tensor, memory: Tensor, read_weights: Tensor) -> dnc_textbook.Interface:
    return dnc_textbook.parse(interface, read_weights.shape[1], memory.shape[2])


def textbook(interface: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """The equations as papers and public code write them."""
    before = dnc_textbook.Memory(*state)
    after, reads = dnc_textbook.step(_fields(interface, before.memory, before.read_weights), before)
    return (*after, reads)


def _fast_eager(
    write: Callable[..., Tensor],
    linkage: Callable[..., tuple[Tensor, ...]],
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
) -> tuple[Tensor, ...]:
    f = _fields(interface, memory, read_weights)
    retention = (1 - f.free_gates.unsqueeze(-1) * read_weights).prod(1)
    usage = torch.lerp(usage, torch.ones_like(usage), write_weights.squeeze(1)) * retention
    allocated = allocation.fast_eager(usage)
    found = content_addressing.fast_eager(memory, f.write_key, f.write_strength)
    weights = f.write_gate.unsqueeze(-1) * torch.lerp(found, allocated, f.allocation_gate.unsqueeze(-1))
    memory = write(memory, weights, f.erase, f.values)
    link, precedence, forward, backward = linkage(link, precedence, weights, read_weights)
    content = content_addressing.fast_eager(memory, f.read_keys, f.read_strengths)
    modes = f.read_modes.unsqueeze(-1)
    read_weights = torch.addcmul(modes[:, :, 0] * backward[:, 0], modes[:, :, 1], content)
    read_weights = torch.addcmul(read_weights, modes[:, :, 2], forward[:, 0])
    return memory, usage, precedence, link, weights, read_weights, torch.bmm(read_weights, memory)


def fast_eager(interface: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
    """The fastest eager form of every op, and few temporaries between them."""
    return _fast_eager(memory_write.one_head_eager, temporal_linkage.lerp_eager, interface, *state)


def fast_eager_(interface: Tensor, *arguments: Tensor) -> None:
    """For inference: state and reads in place, but for the link, which moves to a buffer that the caller swaps."""
    *state, reads, new_link = arguments

    def write(memory: Tensor, weights: Tensor, erase: Tensor, values: Tensor) -> Tensor:
        return memory.addcmul_(weights.mT, torch.addcmul(values, erase, memory, value=-1))

    def linkage(link: Tensor, precedence: Tensor, weights: Tensor, read_weights: Tensor) -> tuple[Tensor, ...]:
        ways = temporal_linkage.lerp_eager_(link, precedence, weights, read_weights, new_link)
        return new_link, precedence, *ways

    _, usage, _, _, *others = _fast_eager(write, linkage, interface, *state)
    for old, new in zip((state[1], *state[4:], reads), (usage, *others), strict=True):
        old.copy_(new)
