"""One memory step of an NTM in eager PyTorch: the textbook form, and the fastest that operators allow.

Pairs of a read head and a write head, each head complete before the next. interface [B,S], head after head: key [W],
strength, gate, shift [3], sharpness, of a write head erase [W] and values [W] too; memory [B,N,W], weights [B,A,N] ->
the same two, reads [B,A/2,W].
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.peers import content_addressing, location_addressing, memory_write, weighted_read

CLIP = 20.0


def textbook(interface: Tensor, memory: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The equations as papers and public code write them, one head after the other."""
    heads, word = weights.shape[1], memory.shape[2]
    address, change = [word, 1, 1, 3, 1], [word, word]
    fields = iter(interface.clamp(-CLIP, CLIP).split((address + address + change) * (heads // 2), -1))
    after, reads = [], []
    for head in range(heads):
        key, strength, gate, shift, sharpness = (next(fields) for _ in address)
        content = content_addressing.textbook(memory, key.unsqueeze(1), F.softplus(strength))
        focus = torch.sigmoid(gate), torch.softmax(shift, -1).unsqueeze(1), 1 + F.softplus(sharpness)
        after.append(location_addressing.textbook(content, weights[:, head : head + 1], *focus))
        if head % 2 == 0:
            reads.append(weighted_read.textbook(memory, after[head]))
        else:
            erase, values = next(fields).unsqueeze(1), next(fields).unsqueeze(1)
            memory = memory_write.textbook(memory, after[head], torch.sigmoid(erase), values)
    return memory, torch.cat(after, 1), torch.cat(reads, 1)


def _fast_eager(
    write: Callable[..., Tensor], interface: Tensor, memory: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    pairs, word = weights.shape[1] // 2, memory.shape[2]
    address = word + 6
    numbers = interface.clamp(-CLIP, CLIP).unflatten(-1, (pairs, -1))
    erase, values = numbers[..., 2 * address :].unflatten(-1, (2, 1, word)).unbind(2)
    erase = torch.sigmoid(erase)
    focus = numbers[..., : 2 * address].unflatten(-1, (2, address))
    strengths, gates, sharpness = F.softplus(focus[..., word]), torch.sigmoid(focus[..., word + 1]), focus[..., -1]
    shifts, sharpness = torch.softmax(focus[..., word + 2 : word + 5], -1), 1 + F.softplus(sharpness)
    after, reads = [], []
    for pair, before in enumerate(weights.split(2, 1)):
        content = content_addressing.fast_eager(memory, focus[:, pair, :, :word], strengths[:, pair])
        both = location_addressing.fast_eager(content, before, gates[:, pair], shifts[:, pair], sharpness[:, pair])
        after.append(both)
        reads.append(torch.bmm(both[:, :1], memory))
        memory = write(memory, both[:, 1:], erase[:, pair], values[:, pair])
    return memory, torch.cat(after, 1), torch.cat(reads, 1)


def fast_eager(interface: Tensor, memory: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ranges of all heads at once; the heads of a pair look at the same memory, and look together."""
    return _fast_eager(memory_write.one_head_eager, interface, memory, weights)


def fast_eager_(interface: Tensor, memory: Tensor, weights: Tensor, reads: Tensor, workspace: Tensor) -> None:
    """The same in place, for inference: the change of the memory goes into a workspace that the caller keeps."""

    def write(memory: Tensor, weights: Tensor, erase: Tensor, values: Tensor) -> Tensor:
        memory_write.one_head_eager_(memory, weights, erase, values, workspace)
        return memory

    _, new_weights, new_reads = _fast_eager(write, interface, memory, weights)
    weights.copy_(new_weights)
    reads.copy_(new_reads)
