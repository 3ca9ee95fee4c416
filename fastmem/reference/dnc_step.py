"""One memory step of a DNC: interface vector and state -> reads and the new state.

    u, retention = usage_update(u, w, r, free gates)             a = allocation(u, allocation gates * write gates)
    w = write gate (allocation gate a + (1 - allocation gate) content(M, write keys))
    M = memory_write(M, w, erase, values[, retention])           L, p, f, b = temporal_linkage(L, p, w, r)
    r = read modes . (b, content(M, read keys), f)               reads = weighted_read(M, r)

w and r on the right are those of the step before until they are assigned. Variants: `masked` compares keys and rows
under masks, `deallocates` erases what the free gates release, `sharpened` sharpens f and b.

interface [B,S] in the order of `_interface`, memory [B,N,W], usage [B,N], precedence [B,Q,N], link [B,Q,N,N],
write_weights [B,Q,N], read_weights [B,R,N] -> the same six, reads [B,R,W], and a tape [B,.] for the backward:
retention [N], allocation [Q,N], content of the write heads [Q,N], forward and backward [Q,R,N], the same sharpened
where there is sharpening, content of the read heads [R,N]. Sources: Graves et al., "Hybrid computing using a neural
network with dynamic external memory"; variants: Csordas and Schmidhuber, "Improving Differentiable Neural Computers
Through Memory Masking, De-allocation, and Link Distribution Sharpness Control".
"""

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from fastmem.reference._interface import (
    Interface,
    constrain,
    constrain_backward,
    interface_shapes,
    joined,
    split,
)
from fastmem.reference._masks import ALL, Acting, chosen
from fastmem.reference.allocation import allocation, allocation_backward
from fastmem.reference.content_addressing import content_addressing, content_addressing_backward
from fastmem.reference.memory_write import memory_write, memory_write_backward
from fastmem.reference.sharpen import sharpen, sharpen_backward
from fastmem.reference.temporal_linkage import along, along_backward, linked, linked_backward
from fastmem.reference.usage_update import usage_update, usage_update_backward
from fastmem.reference.weighted_read import weighted_read, weighted_read_backward

SHARPENING_EPS = 1e-6


class State(NamedTuple):
    """The memory with all that goes with it, from step to step; or a gradient of each."""

    memory: Tensor  # [B,N,W]
    usage: Tensor  # [B,N]
    precedence: Tensor  # [B,Q,N]
    link: Tensor  # [B,Q,N,N]
    write_weights: Tensor  # [B,Q,N]
    read_weights: Tensor  # [B,R,N]


class Options(NamedTuple):
    """The variant, and the constants, in the order of the op's arguments."""

    masked: bool
    deallocates: bool
    sharpened: bool
    oneplus: bool
    detach_usage_write: bool
    mask_floor: float
    clip: float
    norm: str
    eps: float
    allocation_eps: float


class Tape(NamedTuple):
    """What the backward takes from the step, besides its results. No gradient goes through it."""

    retention: Tensor  # [B,N]
    allocated: Tensor  # [B,Q,N]
    found: Tensor  # [B,Q,N], by content, of the write heads
    forward: Tensor  # [B,Q,R,N]
    backward: Tensor  # [B,Q,R,N]
    sharp_forward: Tensor  # [B,Q,R,N]
    sharp_backward: Tensor  # [B,Q,R,N]
    content: Tensor  # [B,R,N], of the read heads


def tape_size(slots: int, read_heads: int, write_heads: int, sharpened: bool) -> int:
    return slots * (1 + 2 * write_heads + (4 if sharpened else 2) * write_heads * read_heads + read_heads)


def _recorded(tape: Tape, sharpened: bool) -> Tensor:
    return joined(tape if sharpened else (*tape[:5], tape.content)).detach()


def replayed(tape: Tensor, slots: int, read_heads: int, write_heads: int, sharpened: bool) -> Tape:
    """The tape of a step cut into its parts."""
    writes, ways = (write_heads, slots), (write_heads, read_heads, slots)
    shapes: dict[str, tuple[int, ...]] = {"retention": (slots,), "allocated": writes, "found": writes}
    shapes |= dict.fromkeys(["forward", "backward", *(["sharp_forward", "sharp_backward"] if sharpened else [])], ways)
    shapes["content"] = (read_heads, slots)
    parts = tape.split([prod(shape) for shape in shapes.values()], -1)
    named = {name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    return Tape(**{"sharp_forward": named["forward"], "sharp_backward": named["backward"], **named})


def _per_head(weights: Tensor) -> Tensor:
    """[B,Q,R,N] -> [B,QR,N]; the sharpness of the read heads goes beside it by `_per_write_head`."""
    return weights.flatten(1, 2)


def _per_write_head(sharpness: Tensor, write_heads: int) -> Tensor:
    return sharpness.unsqueeze(1).expand(-1, write_heads, -1).flatten(1)


def _sharpened(weights: Tensor, sharpness: Tensor) -> Tensor:
    sharp = sharpen(_per_head(weights), _per_write_head(sharpness, weights.shape[1]), False, SHARPENING_EPS)
    return sharp.view_as(weights)


def _sharpened_backward(grad: Tensor, sharp: Tensor, weights: Tensor, sharpness: Tensor) -> tuple[Tensor, Tensor]:
    heads = _per_write_head(sharpness, weights.shape[1])
    arguments = (_per_head(grad), _per_head(sharp), _per_head(weights), heads)
    grad_weights, grad_sharpness = sharpen_backward(*arguments, False, SHARPENING_EPS, [True, True])
    return grad_weights.view_as(weights), grad_sharpness.view(weights.shape[:3]).sum(1)


def told(interface: Tensor, state: State, options: Options) -> tuple[Interface, Interface]:
    """The fields as given, but clipped, and within their ranges."""
    heads = (state.read_weights.shape[1], state.write_weights.shape[1])
    shapes = interface_shapes(state.memory.shape[2], *heads, options.masked, options.sharpened)
    raw = split(interface.clamp(-options.clip, options.clip), shapes)
    return raw, constrain(raw, options.oneplus, options.mask_floor)


def access(interface: Tensor, before: State, options: Options, acts: Acting = ALL) -> tuple[State, Tape]:
    """One write, then one read, each for the samples that do so; of the others the state stays, and the tape is 0."""
    _, f = told(interface, before, options)
    written = before.write_weights.detach() if options.detach_usage_write else before.write_weights
    usage, retention = usage_update(before.usage, written, before.read_weights, f.free_gates)
    allocated = allocation(usage, f.allocation_gates * f.write_gates, options.allocation_eps)
    content = (None, options.norm, options.eps)
    found = content_addressing(before.memory, f.write_keys, f.write_strengths, f.write_masks, *content)
    allocation_gates, write_gates = f.allocation_gates.unsqueeze(-1), f.write_gates.unsqueeze(-1)
    write_weights = write_gates * (allocation_gates * allocated + (1 - allocation_gates) * found)
    retained = retention if options.deallocates else None
    memory = memory_write(before.memory, write_weights, f.erase, f.values, retained)
    link, precedence = linked(before.link, before.precedence, write_weights)
    after = State(memory, usage, precedence, link, write_weights, before.read_weights)
    after = State(*(chosen(acts.write, new, old) for new, old in zip(after, before, strict=True)))

    forward, backward = along(after.link, before.read_weights)
    sharp_forward, sharp_backward = forward, backward
    if f.forward_sharpness is not None and f.backward_sharpness is not None:
        sharp_forward = _sharpened(forward, f.forward_sharpness)
        sharp_backward = _sharpened(backward, f.backward_sharpness)
    similar = content_addressing(after.memory, f.read_keys, f.read_strengths, f.read_masks, *content)
    ways = torch.cat([sharp_backward, similar.unsqueeze(1), sharp_forward], 1)  # [B,2Q+1,R,N]
    read_weights = chosen(acts.read, torch.einsum("brm,bmrn->brn", f.read_modes, ways), before.read_weights)
    by_write = (chosen(acts.write, part, 0.0) for part in (retention, allocated, found))
    by_read = (chosen(acts.read, part, 0.0) for part in (forward, backward, sharp_forward, sharp_backward, similar))
    return after._replace(read_weights=read_weights), Tape(*by_write, *by_read)


def dnc_step(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float,
    norm: str,
    eps: float,
    allocation_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    before = State(memory, usage, precedence, link, write_weights, read_weights)
    flags = (masked, deallocates, sharpened, oneplus, detach_usage_write)
    options = Options(*flags, mask_floor, clip, norm, eps, allocation_eps)
    after, tape = access(interface, before, options)
    return *after, weighted_read(after.memory, after.read_weights), _recorded(tape, sharpened)


def dnc_step_(
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    reads: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float,
    norm: str,
    eps: float,
    allocation_eps: float,
) -> None:
    """The same in place: the state becomes the new one, and `reads` [B,R,W] what was read. No autograd."""
    state = (memory, usage, precedence, link, write_weights, read_weights)
    flags = (masked, deallocates, sharpened, oneplus, detach_usage_write)
    made = dnc_step(interface, *state, *flags, mask_floor, clip, norm, eps, allocation_eps)
    for old, new in zip((*state, reads), made[:7], strict=True):
        old.copy_(new)


def access_backward(
    grads: Sequence[Tensor | None],
    grad_reads: Tensor | None,
    after: State,
    tape: Tape,
    interface: Tensor,
    before: State,
    options: Options,
    acts: Acting = ALL,
) -> tuple[Tensor, State]:
    """Gradients of the interface and the state before, from those of the state after and of what was read.

    The step from its end to its beginning, by the closed-form gradients of its ops. What a sample keeps hands its
    gradient on as it is.
    """
    raw, f = told(interface, before, options)
    write_heads = before.write_weights.shape[1]
    upstream = State(
        *(torch.zeros_like(old) if grad is None else grad for grad, old in zip(grads, before, strict=True))
    )

    into_reads = torch.zeros_like(f.read_keys) if grad_reads is None else grad_reads
    by_read, into_read = weighted_read_backward(into_reads, after.memory, after.read_weights, [True, True])
    into_read = into_read + upstream.read_weights
    ways = torch.cat([tape.sharp_backward, tape.content.unsqueeze(1), tape.sharp_forward], 1)
    into_modes = torch.einsum("brn,bmrn->brm", into_read, ways)
    into_ways = torch.einsum("brm,brn->bmrn", f.read_modes, into_read)
    into_backward, into_content, into_forward = into_ways.split([write_heads, 1, write_heads], 1)
    into_sharpness: dict[str, Tensor] = {}
    if f.forward_sharpness is not None and f.backward_sharpness is not None:
        into_forward, into_sharpness["forward_sharpness"] = _sharpened_backward(
            into_forward, tape.sharp_forward, tape.forward, f.forward_sharpness
        )
        into_backward, into_sharpness["backward_sharpness"] = _sharpened_backward(
            into_backward, tape.sharp_backward, tape.backward, f.backward_sharpness
        )
    content = (None, options.norm, options.eps, [True, True, True, options.masked])
    by_content, into_read_keys, into_read_strengths, into_read_masks = content_addressing_backward(
        into_content.squeeze(1), tape.content, after.memory, f.read_keys, f.read_strengths, f.read_masks, *content
    )
    by_ways, into_old_read = along_backward(into_forward, into_backward, after.link, before.read_weights)
    into = upstream._replace(
        memory=upstream.memory + chosen(acts.read, by_read + by_content, 0.0),
        link=upstream.link + chosen(acts.read, by_ways, 0.0),
        read_weights=chosen(acts.read, into_old_read, upstream.read_weights),
    )

    into_link, into_precedence, into_write = linked_backward(
        into.link, into.precedence, before.link, before.precedence, after.write_weights
    )
    retention = tape.retention if options.deallocates else None
    into_memory, by_memory, into_erase, into_values, into_retention = memory_write_backward(
        into.memory, before.memory, after.write_weights, f.erase, f.values, retention,
        [True, True, True, True, options.deallocates],
    )  # fmt: skip
    into_write = into_write + by_memory + into.write_weights
    allocation_gates, write_gates = f.allocation_gates.unsqueeze(-1), f.write_gates.unsqueeze(-1)
    along_allocated = (into_write * tape.allocated).sum(-1)
    along_found = (into_write * tape.found).sum(-1)
    by_content, into_write_keys, into_write_strengths, into_write_masks = content_addressing_backward(
        write_gates * (1 - allocation_gates) * into_write, tape.found, before.memory, f.write_keys, f.write_strengths,
        f.write_masks, *content,
    )  # fmt: skip
    into_usage, into_gates = allocation_backward(
        write_gates * allocation_gates * into_write, tape.allocated, after.usage,
        f.allocation_gates * f.write_gates, options.allocation_eps, [True, True],
    )  # fmt: skip
    into_usage, by_usage, by_free, into_free_gates = usage_update_backward(
        into_usage + into.usage, into_retention if options.deallocates else None, before.usage, before.write_weights,
        before.read_weights, f.free_gates, [True] * 4,
    )  # fmt: skip
    through = State(
        memory=into_memory + by_content,
        usage=into_usage,
        precedence=into_precedence,
        link=into_link,
        write_weights=torch.zeros_like(by_usage) if options.detach_usage_write else by_usage,
        read_weights=into.read_weights + by_free,
    )
    by_writing = {
        "write_keys": into_write_keys,
        "write_strengths": into_write_strengths,
        "erase": into_erase,
        "values": into_values,
        "free_gates": into_free_gates,
        "allocation_gates": f.write_gates * (along_allocated - along_found + into_gates),
        "write_gates": f.allocation_gates * (along_allocated + into_gates) + (1 - f.allocation_gates) * along_found,
        **({"write_masks": into_write_masks} if options.masked else {}),
    }
    by_reading = {
        "read_keys": into_read_keys,
        "read_strengths": into_read_strengths,
        "read_modes": into_modes,
        **({"read_masks": into_read_masks} if options.masked else {}),
        **into_sharpness,
    }
    into_fields = Interface(
        **{name: chosen(acts.write, grad, 0.0) for name, grad in by_writing.items()},
        **{name: chosen(acts.read, grad, 0.0) for name, grad in by_reading.items()},
    )
    clipped = (interface > options.clip) | (interface < -options.clip)
    into_interface = joined(constrain_backward(into_fields, raw, f, options.mask_floor)).masked_fill(clipped, 0.0)
    return into_interface, State(*(chosen(acts.write, new, old) for new, old in zip(through, into, strict=True)))


def dnc_step_backward(
    grad_memory: Tensor | None,
    grad_usage: Tensor | None,
    grad_precedence: Tensor | None,
    grad_link: Tensor | None,
    grad_write_weights: Tensor | None,
    grad_read_weights: Tensor | None,
    grad_reads: Tensor | None,
    new_memory: Tensor,
    new_usage: Tensor,
    new_write_weights: Tensor,
    new_read_weights: Tensor,
    tape: Tensor,
    interface: Tensor,
    memory: Tensor,
    usage: Tensor,
    precedence: Tensor,
    link: Tensor,
    write_weights: Tensor,
    read_weights: Tensor,
    masked: bool,
    deallocates: bool,
    sharpened: bool,
    oneplus: bool,
    detach_usage_write: bool,
    mask_floor: float,
    clip: float,
    norm: str,
    eps: float,
    allocation_eps: float,
    output_mask: list[bool],
) -> tuple[Tensor, ...]:
    """Gradients of the interface and of the six parts of the state; an unwanted one is a size-0 tensor."""
    before = State(memory, usage, precedence, link, write_weights, read_weights)
    flags = (masked, deallocates, sharpened, oneplus, detach_usage_write)
    options = Options(*flags, mask_floor, clip, norm, eps, allocation_eps)
    new_link, new_precedence = linked(link, precedence, new_write_weights)
    after = State(new_memory, new_usage, new_precedence, new_link, new_write_weights, new_read_weights)
    grads = (grad_memory, grad_usage, grad_precedence, grad_link, grad_write_weights, grad_read_weights)
    parts = replayed(tape, memory.shape[1], read_weights.shape[1], write_weights.shape[1], sharpened)
    into_interface, into_state = access_backward(grads, grad_reads, after, parts, interface, before, options)
    gradients = (into_interface, *into_state)
    return tuple(g if wants else memory.new_empty(0) for g, wants in zip(gradients, output_mask, strict=True))
