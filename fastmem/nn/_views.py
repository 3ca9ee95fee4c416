"""What a module looked at: every weighting and gate of its steps, for plots."""

from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmem.reference import dnc_step, ntm_step
from fastmem.reference._interface import constrain, interface_shapes, split
from fastmem.reference.location_addressing import interpolated, shifted


class DNCViews(NamedTuple):
    """The weightings and gates of a run, outside the graph.

    Each has time first, `[T, B, ...]`, with zeros where a sequence has ended; `[T, ...]` without a batch. A call of a
    DNCCell or of `step` has no T, and always a B.
    """

    usage: Tensor  # [T,B,N]
    retention: Tensor  # [T,B,N], the share of the usage that the free gates kept
    allocation_weights: Tensor  # [T,B,Q,N]
    write_content_weights: Tensor  # [T,B,Q,N]
    write_weights: Tensor  # [T,B,Q,N]
    precedence: Tensor  # [T,B,Q,N]
    link: Tensor  # [T,B,Q,N,N]
    forward_weights: Tensor  # [T,B,Q,R,N], sharpened where the module does so
    backward_weights: Tensor  # [T,B,Q,R,N], sharpened where the module does so
    read_content_weights: Tensor  # [T,B,R,N]
    read_weights: Tensor  # [T,B,R,N]
    free_gates: Tensor  # [T,B,R]
    allocation_gates: Tensor  # [T,B,Q]
    write_gates: Tensor  # [T,B,Q]
    read_modes: Tensor  # [T,B,R,2Q+1]: backward 1..Q, content, forward 1..Q
    erase: Tensor  # [T,B,Q,W]
    values: Tensor  # [T,B,Q,W], what the write heads add
    reads: Tensor  # [T,B,R,W]
    program_weights: Tensor  # [T,B,n,P], of the programs of each control head; n and P are 0 without stored programs


class NTMViews(NamedTuple):
    """The weightings, gates and vectors of a run, outside the graph; laid out in time as :class:`DNCViews` is.

    Heads are in the order of the module's list: A in all, of which R read and Q write.
    """

    content_weights: Tensor  # [T,B,A,N]
    gated_weights: Tensor  # [T,B,A,N], between the content weights and the weights of the step before
    shifted_weights: Tensor  # [T,B,A,N]
    weights: Tensor  # [T,B,A,N], sharpened: what the heads read and write by
    strengths: Tensor  # [T,B,A]
    gates: Tensor  # [T,B,A]: 1 by content, 0 from where the head was
    shifts: Tensor  # [T,B,A,2S+1]: by -S slots first, also where the module stores them reversed
    sharpness: Tensor  # [T,B,A]
    erase: Tensor  # [T,B,Q,W]
    values: Tensor  # [T,B,Q,W], what the write heads add
    reads: Tensor  # [T,B,R,W]
    program_weights: Tensor  # [T,B,n,P], of the programs of each control head; n and P are 0 without stored programs


class LRUAViews(NamedTuple):
    """The weightings, gates and vectors of a run, outside the graph; laid out in time as :class:`DNCViews` is.

    Each of the R heads writes and reads.
    """

    usage: Tensor  # [T,B,N]
    least_used: Tensor  # [T,B,R,N]: 1 at the slot that the head may write to, by the usage of the step before
    write_weights: Tensor  # [T,B,R,N]
    read_weights: Tensor  # [T,B,R,N]
    write_gates: Tensor  # [T,B,R]: 1 where the head read last, 0 to its least used slot
    strengths: Tensor  # [T,B,R]
    keys: Tensor  # [T,B,R,W], what the heads add and look for
    reads: Tensor  # [T,B,R,W]
    program_weights: Tensor  # [T,B,n,P], of the programs of each control head; n and P are 0 without stored programs


def dnc_views(
    interface: Tensor, results: tuple[Tensor, ...], options: dict[str, Any], program_weights: Tensor
) -> DNCViews:
    """From the interface vector, the results of the step with its tape, and its options."""
    interface, memory, usage, precedence, link, write_weights, read_weights, reads, tape = (
        tensor.detach() for tensor in (interface, *results)
    )
    slots, word = memory.shape[1:]
    heads = (read_weights.shape[1], write_weights.shape[1])
    parts = dnc_step.replayed(tape, slots, *heads, options["sharpened"])
    bound = inf if options["clip"] is None else options["clip"]
    raw = split(interface.clamp(-bound, bound), interface_shapes(word, *heads, options["masked"], options["sharpened"]))
    fields = constrain(raw, options["oneplus"], options["mask_floor"])
    return DNCViews(
        usage=usage,
        retention=parts.retention,
        allocation_weights=parts.allocated,
        write_content_weights=parts.found,
        write_weights=write_weights,
        precedence=precedence,
        link=link,
        forward_weights=parts.sharp_forward,
        backward_weights=parts.sharp_backward,
        read_content_weights=parts.content,
        read_weights=read_weights,
        free_gates=fields.free_gates,
        allocation_gates=fields.allocation_gates,
        write_gates=fields.write_gates,
        read_modes=fields.read_modes,
        erase=fields.erase,
        values=fields.values,
        reads=reads,
        program_weights=program_weights,
    )


def ntm_views(
    interface: Tensor,
    before: Tensor,
    results: tuple[Tensor, ...],
    heads: str,
    joint_writes: bool,
    reversed_shift: bool,
    clip: float | None,
    program_weights: Tensor,
) -> NTMViews:
    """From the interface vector, the weights of the step before, the results of the step with its tape, and options."""
    interface, before, memory, weights, reads, tape = (tensor.detach() for tensor in (interface, before, *results))
    contents, _ = ntm_step.replayed(tape, heads, joint_writes, *memory.shape[1:])
    _, fields = ntm_step.told(interface, heads, memory.shape[2], inf if clip is None else clip)
    gates, shifts = (torch.cat([getattr(head, name) for head in fields], 1) for name in ("gate", "shift"))
    gated = interpolated(contents, before, gates)
    none = memory[:, :0]  # of a module that never writes
    return NTMViews(
        content_weights=contents,
        gated_weights=gated,
        shifted_weights=shifted(gated, shifts, reversed_shift),
        weights=weights,
        strengths=torch.cat([head.strength for head in fields], 1),
        gates=gates,
        shifts=shifts.flip(-1) if reversed_shift else shifts,
        sharpness=torch.cat([head.sharpness for head in fields], 1),
        erase=torch.cat([none, *(head.erase for head in fields if head.erase is not None)], 1),
        values=torch.cat([none, *(head.values for head in fields if head.values is not None)], 1),
        reads=reads,
        program_weights=program_weights,
    )
