"""One memory step of an NTM: the raw numbers of all heads and the state -> reads and the new state.

    content = content_addressing(M, key, strength)
    w = location_addressing(content, w, gate, shift, sharpness)
    a read head: reads = weighted_read(M, w)            a write head: M = memory_write(M, w, erase, values)

w and M on the right are those before, until they are assigned. `heads` has a letter for each head, r or w. They act in
this order, each complete before the next begins, so that a later head sees an earlier write. With joint writes all
heads see the memory before the step, and all writes come together at its end.

interface [B,S], head after head: key [W], strength, gate, shift [2K+1] (-K first), sharpness; of a write head erase [W]
and values [W] too. memory [B,N,W], weights [B,A,N] -> the same two, reads [B,R,W], and a tape [B,.] for the backward:
the content weights of each head [A,N], and the memories [.,N,W] that writes left for later heads to see. Source: Graves
et al., "Neural Turing Machines"; heads in the order of a list: public code of it.
"""

from collections.abc import Iterable
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fastmem.reference._interface import cut, joined, softplus, through_sigmoid, through_softmax, through_softplus
from fastmem.reference._masks import ALL, Acting, chosen
from fastmem.reference.content_addressing import content_addressing, content_addressing_backward
from fastmem.reference.location_addressing import location_addressing, location_addressing_backward
from fastmem.reference.memory_write import memory_write, memory_write_backward
from fastmem.reference.weighted_read import weighted_read, weighted_read_backward


class Options(NamedTuple):
    """The heads, the variant and the constants, in the order of the op's arguments."""

    heads: str
    joint_writes: bool
    reversed_shift: bool
    in_powers: bool
    sharpen_eps: float
    clip: float
    norm: str
    eps: float


class Head(NamedTuple):
    """What the controller says to one head in one step, within its ranges."""

    key: Tensor  # [B,1,W]
    strength: Tensor  # [B,1], at least 0
    gate: Tensor  # [B,1], in [0,1]
    shift: Tensor  # [B,1,2K+1], sums to 1
    sharpness: Tensor  # [B,1], at least 1
    erase: Tensor | None = None  # [B,1,W], in [0,1]
    values: Tensor | None = None  # [B,1,W]


def head_shapes(kind: str, word: int, taps: int) -> dict[str, tuple[int, ...]]:
    """Shape of each field of a head without the batch, in the order of the vector."""
    shapes: dict[str, tuple[int, ...]] = {
        "key": (1, word),
        "strength": (1,),
        "gate": (1,),
        "shift": (1, taps),
        "sharpness": (1,),
    }
    return shapes | {"erase": (1, word), "values": (1, word)} if kind == "w" else shapes


def interface_size(heads: str, word: int, taps: int = 3) -> int:
    return sum(prod(shape) for kind in heads for shape in head_shapes(kind, word, taps).values())


def interface_runs(heads: str, word: int, taps: int) -> tuple[tuple[int, int], ...]:
    """Who the vector speaks to, in its order: each head, and how many numbers."""
    return tuple(enumerate(interface_size(kind, word, taps) for kind in heads))


def taps_of(size: int, heads: str, word: int) -> int:
    """The number of taps of each shift: what an interface of this size leaves for them."""
    return (size - interface_size(heads, word, 0)) // len(heads)


def runs(heads: str, joint_writes: bool) -> list[range]:
    """Heads that see the same memory: all up to the next write, which ends a run, or all with joint writes."""
    ends = (
        [len(heads)] if joint_writes else [i + 1 for i, kind in enumerate(heads) if kind == "w" or i + 1 == len(heads)]
    )
    return [range(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def tape_size(heads: str, joint_writes: bool, slots: int, word: int) -> int:
    return slots * (len(heads) + (len(runs(heads, joint_writes)) - 1) * word)


def replayed(tape: Tensor, heads: str, joint_writes: bool, slots: int, word: int) -> tuple[Tensor, Tensor]:
    """The tape of a step cut into its parts: content weights [B,A,N], and memories that later heads saw [B,.,N,W]."""
    later = len(runs(heads, joint_writes)) - 1
    contents, memories = tape.split([len(heads) * slots, later * slots * word], -1)
    return contents.unflatten(-1, (len(heads), slots)), memories.unflatten(-1, (later, slots, word))


def _constrain(raw: Head) -> Head:
    """Each field within its range."""
    return raw._replace(
        strength=softplus(raw.strength),
        gate=raw.gate.sigmoid(),
        shift=raw.shift.softmax(-1),
        sharpness=1 + softplus(raw.sharpness),
        erase=None if raw.erase is None else raw.erase.sigmoid(),
    )


def told(interface: Tensor, heads: str, word: int, clip: float) -> tuple[list[Head], list[Head]]:
    """What an interface vector says to each head: as given but clipped, and within its ranges."""
    taps = taps_of(interface.shape[1], heads, word)
    parts = interface.clamp(-clip, clip).split([interface_size(kind, word, taps) for kind in heads], -1)
    raw = [Head(**cut(part, head_shapes(kind, word, taps))) for kind, part in zip(heads, parts, strict=True)]
    return raw, [_constrain(head) for head in raw]


def _constrain_backward(grads: Head, raw: Head, fields: Head) -> Head:
    """Gradients of the raw fields from those of the fields."""
    through = grads._replace(
        strength=through_softplus(grads.strength, raw.strength),
        gate=through_sigmoid(grads.gate, raw.gate),
        shift=through_softmax(grads.shift, fields.shift),
        sharpness=through_softplus(grads.sharpness, raw.sharpness),
    )
    if grads.erase is None or raw.erase is None:
        return through
    return through._replace(erase=through_sigmoid(grads.erase, raw.erase))


def _written(writers: list[int], weights: list[Tensor], fields: list[Head]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, erase and values of some write heads, each together."""

    def together(parts: Iterable[Tensor | None]) -> Tensor:
        return torch.cat([part for part in parts if part is not None], 1)

    chosen = [fields[h] for h in writers]
    return (
        together(weights[h] for h in writers),
        together(head.erase for head in chosen),
        together(head.values for head in chosen),
    )


def _acts(kind: str, acts: Acting) -> Tensor | None:
    return acts.read if kind == "r" else acts.write


def written(
    run: range, memory: Tensor, weights: list[Tensor], fields: list[Head], heads: str, acts: Acting = ALL
) -> Tensor:
    """The memory after the writes at the end of a run, a new tensor."""
    writers = [h for h in run if heads[h] == "w"]
    if not writers:
        return memory.clone()
    return chosen(acts.write, memory_write(memory, *_written(writers, weights, fields), None), memory)


def access(
    interface: Tensor, memory: Tensor, weights: Tensor, options: Options, acts: Acting = ALL
) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """All heads; memory, weights, reads, content weights, and the memory that each run saw.

    The samples for which a head does not act keep its weights, and what it would write; what it reads has no meaning,
    and its content weights are 0.
    """
    heads = options.heads
    location = (options.reversed_shift, options.in_powers, options.sharpen_eps)
    _, fields = told(interface, heads, memory.shape[2], options.clip)
    before = weights.split(1, 1)
    contents: list[Tensor] = []
    after: list[Tensor] = []
    reads = [memory[:, :0]]
    memories: list[Tensor] = []
    for run in runs(heads, options.joint_writes):
        memories.append(memory)
        for h in run:
            f, acting = fields[h], _acts(heads[h], acts)
            content = content_addressing(memory, f.key, f.strength, None, None, options.norm, options.eps)
            moved = location_addressing(content, before[h], f.gate, f.shift, f.sharpness, *location)
            contents.append(chosen(acting, content, 0.0))
            after.append(chosen(acting, moved, before[h]))
            if heads[h] == "r":
                reads.append(weighted_read(memory, after[h]))
        memory = written(run, memory, after, fields, heads, acts)
    return memory, torch.cat(after, 1), torch.cat(reads, 1), torch.cat(contents, 1), memories


def ntm_step(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = Options(heads, joint_writes, reversed_shift, in_powers, sharpen_eps, clip, norm, eps)
    memory, weights, reads, contents, memories = access(interface, memory, weights, options)
    return memory, weights, reads, joined([contents, *memories[1:]]).detach()


def ntm_step_(
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    reads: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
) -> None:
    """The same in place: the state becomes the new one, and `reads` [B,R,W] what was read. No autograd."""
    options = (heads, joint_writes, reversed_shift, in_powers, sharpen_eps, clip, norm, eps)
    for old, new in zip((memory, weights, reads), ntm_step(interface, memory, weights, *options)[:3], strict=True):
        old.copy_(new)


def access_backward(
    grad_memory: Tensor | None,
    grad_weights: Tensor | None,
    grad_reads: Tensor | None,
    new_weights: Tensor,
    contents: Tensor,
    memories: list[Tensor],
    interface: Tensor,
    weights: Tensor,
    options: Options,
    acts: Acting = ALL,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the interface, the memory and the weights.

    The step from its end to its beginning, by the closed-form gradients of its ops. What a sample keeps hands its
    gradient on as it is.
    """
    heads, memory = options.heads, memories[0]
    location = (options.reversed_shift, options.in_powers, options.sharpen_eps, [True] * 5)
    raw, fields = told(interface, heads, memory.shape[2], options.clip)
    before, after, found = weights.split(1, 1), list(new_weights.split(1, 1)), contents.split(1, 1)

    # The gradient of the memory as it is at each point on the way back, and that of each head's new weights.
    into_memory = torch.zeros_like(memory) if grad_memory is None else grad_memory
    into_after = list((torch.zeros_like(weights) if grad_weights is None else grad_weights).split(1, 1))
    into_reads = [] if grad_reads is None else list(grad_reads.split(1, 1))
    into_before: dict[int, Tensor] = {}
    into_raw: dict[int, Head] = {}
    for run, memory in zip(reversed(runs(heads, options.joint_writes)), reversed(memories), strict=True):
        writers = [h for h in run if heads[h] == "w"]
        into_erase: dict[int, Tensor] = {}
        into_values: dict[int, Tensor] = {}
        if writers:
            through, *parts, _ = memory_write_backward(
                into_memory, memory, *_written(writers, after, fields), None, [True, True, True, True, False]
            )
            into_memory = chosen(acts.write, through, into_memory)
            into_write, into_erase, into_values = (
                dict(zip(writers, chosen(acts.write, part, 0.0).split(1, 1), strict=True)) for part in parts
            )
            for h in writers:
                into_after[h] = into_after[h] + into_write[h]
        for h in reversed(run):
            f, acting = fields[h], _acts(heads[h], acts)
            if heads[h] == "r" and into_reads:
                by_read, into_read = weighted_read_backward(into_reads.pop(), memory, after[h], [True, True])
                into_memory = into_memory + chosen(acting, by_read, 0.0)
                into_after[h] = into_after[h] + chosen(acting, into_read, 0.0)
            into_content, into_moved, into_gate, into_shift, into_sharpness = location_addressing_backward(
                into_after[h], after[h], found[h], before[h], f.gate, f.shift, f.sharpness, *location
            )
            into_before[h] = chosen(acting, into_moved, into_after[h])
            by_content, into_key, into_strength, _ = content_addressing_backward(
                into_content, found[h], memory, f.key, f.strength, None, None, options.norm, options.eps,
                [True, True, True, False],
            )  # fmt: skip
            into_memory = into_memory + chosen(acting, by_content, 0.0)
            into_fields = (into_key, into_strength, into_gate, into_shift, into_sharpness)
            heard = (chosen(acting, grad, 0.0) for grad in into_fields)
            grads = Head._make([*heard, into_erase.get(h), into_values.get(h)])
            into_raw[h] = _constrain_backward(grads, raw[h], f)
    clipped = (interface > options.clip) | (interface < -options.clip)
    order = range(len(heads))
    into_interface = joined(field for h in order for field in into_raw[h]).masked_fill(clipped, 0.0)
    return into_interface, into_memory, torch.cat([into_before[h] for h in order], 1)


def ntm_step_backward(
    grad_memory: Tensor | None,
    grad_weights: Tensor | None,
    grad_reads: Tensor | None,
    new_weights: Tensor,
    tape: Tensor,
    interface: Tensor,
    memory: Tensor,
    weights: Tensor,
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    in_powers: bool,
    sharpen_eps: float,
    clip: float,
    norm: str,
    eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the interface, the memory and the weights; an unwanted one is a size-0 tensor."""
    options = Options(heads, joint_writes, reversed_shift, in_powers, sharpen_eps, clip, norm, eps)
    contents, kept = replayed(tape, heads, joint_writes, *memory.shape[1:])
    upstream = (grad_memory, grad_weights, grad_reads)
    gradients = access_backward(
        *upstream, new_weights, contents, [memory, *kept.unbind(1)], interface, weights, options
    )
    return tuple(g if wants else memory.new_empty(0) for g, wants in zip(gradients, output_mask, strict=True))
