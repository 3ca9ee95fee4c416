"""T steps of a DNC with its controller: inputs and a state -> outputs and the state after the last step.

    h, c = control([x_t; reads], h, c)                 (a controller of `_controller`)
    state, reads = dnc_step(W_xi h + b_xi, state)      (the op, parts of it held where the step mask says so)
    y_t = clamp(W_y [h; reads] + b_y, +-clip)

inputs [T,B,X]; parameters: those of the controller, interface weight [S,H] and bias or the programs of `_programs`, one
head for what concerns reading and one for writing, output weight [Y,H+RW] and bias or no output layer;
state: memory [B,N,W], usage [B,N], precedence [B,Q,N], link [B,Q,N,N], write_weights [B,Q,N], read_weights [B,R,N],
reads [B,R,W], hidden and cell [B,H] ([B,0] of a feed-forward controller); step_mask uint8 [T,B] -> outputs [T,B,Y], the
state, and the tape of `_sequence`, whose accesses have the fields

    interface [S] | usage [N] | precedence [Q,N] | write_weights [Q,N] | read_weights [R,N] | allocation [Q,N]
    | content of the write heads [Q,N] and of the read heads [R,N] | retention [N] if it deallocates
    | forward, backward, and both sharpened [Q,R,N] if it sharpens | meta and attention [2,P] of programs

and whose checkpoints are of memory and link. A write that is held leaves memory, usage, precedence, link and write
weights; a read that is held leaves read weights and reads. Usage looks at the weights of the state, held or not.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmem.reference import _sequence
from fastmem.reference._interface import interface_size
from fastmem.reference._masks import Acting, chosen
from fastmem.reference._programs import Programs
from fastmem.reference._sequence import Record, Shapes
from fastmem.reference.dnc_step import Options, State, Tape, access, access_backward, told
from fastmem.reference.memory_write import memory_write
from fastmem.reference.temporal_linkage import along, linked
from fastmem.reference.weighted_read import weighted_read

FLAGS = ("projected", "masked", "deallocates", "sharpened", "oneplus", "detach_usage_write")


class Configuration(NamedTuple):
    """What the op is told besides tensors."""

    input_size: int
    hidden_size: int
    num_slots: int
    word_size: int
    num_read_heads: int
    num_write_heads: int
    output_size: int
    controller: str
    projected: bool
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
    programs: Programs | None


def encoded(configuration: Configuration, spacing: int, accesses: int) -> _sequence.Encoded:
    """The op's shape, options and constants."""
    c = configuration
    words = [c.controller, c.norm]
    return _sequence.encoded(c, c[:7], words, FLAGS, [c.mask_floor, c.clip, c.eps, c.allocation_eps], spacing, accesses)


def decoded(shape: Sequence[int], options: Sequence[str], constants: Sequence[float]) -> tuple[Configuration, int, int]:
    """`encoded` undone: the configuration, the spacing of the checkpoints, and how many accesses there may be."""
    sizes, words, flags, (mask_floor, clip, eps, allocation_eps), programs, spacing, accesses = _sequence.decoded(
        shape, options, constants, 7, 2, FLAGS
    )
    controller, norm = words
    configuration = Configuration._make(
        [*sizes, controller, *flags, mask_floor, clip, norm, eps, allocation_eps, programs]
    )
    return configuration, spacing, accesses


class DNCMemory(_sequence.Memory):
    """The memory part of the op."""

    checkpointed = ("memory", "link")

    def __init__(self, shape: Sequence[int], options: Sequence[str], constants: Sequence[float]) -> None:
        self.configuration, self.spacing, self.accesses = decoded(shape, options, constants)
        c = self.configuration
        self.input_size, self.hidden_size, self.output_size = c.input_size, c.hidden_size, c.output_size
        self.controller, self.programs, self.projected = c.controller, c.programs, c.projected
        self.output_clip = c.clip
        self.options = Options(*(getattr(c, name) for name in Options._fields))

    def interface_size(self) -> int:
        c = self.configuration
        return interface_size(c.word_size, c.num_read_heads, c.num_write_heads, c.masked, c.sharpened)

    def memory_shapes(self) -> Shapes:
        c = self.configuration
        slots, heads, write_heads = c.num_slots, c.num_read_heads, c.num_write_heads
        return {
            "memory": (slots, c.word_size),
            "usage": (slots,),
            "precedence": (write_heads, slots),
            "link": (write_heads, slots, slots),
            "write_weights": (write_heads, slots),
            "read_weights": (heads, slots),
            "reads": (heads, c.word_size),
        }

    def access_shapes(self) -> Shapes:
        c = self.configuration
        writes, reads = (c.num_write_heads, c.num_slots), (c.num_read_heads, c.num_slots)
        shapes: Shapes = {"allocated": writes, "found": writes, "content": reads}
        if c.deallocates:
            shapes["retention"] = (c.num_slots,)
        if c.sharpened:
            names = ("forward", "backward", "sharp_forward", "sharp_backward")
            shapes |= dict.fromkeys(names, (c.num_write_heads, *reads))
        return shapes

    def access(self, interface: Tensor, before: Sequence[Tensor], acts: Acting) -> tuple[list[Tensor], Record]:
        *state, reads = before
        after, tape = access(interface, State(*state), self.options, acts)
        reads = chosen(acts.read, weighted_read(after.memory, after.read_weights), reads)
        return [*after, reads], tape._asdict()

    def rebuilt(self, record: Record, before: Record, acts: Acting) -> Record:
        _, f = told(record["interface"], _state(before), self.options)
        write_weights = record["write_weights"]
        memory = memory_write(before["memory"], write_weights, f.erase, f.values, record.get("retention"))
        link, _ = linked(before["link"], before["precedence"], write_weights)
        return {
            "memory": chosen(acts.write, memory, before["memory"]),
            "link": chosen(acts.write, link, before["link"]),
        }

    def access_backward(
        self, grads: Sequence[Tensor], record: Record, after: Record, before: Record, acts: Acting
    ) -> tuple[Tensor, list[Tensor]]:
        *into_state, into_reads = grads
        found: dict[str, Any] = {"retention": None, **record}  # nobody asks for it where nothing deallocates
        if not self.options.sharpened:
            forward, backward = along(after["link"], before["read_weights"])
            found |= {"forward": forward, "backward": backward, "sharp_forward": forward, "sharp_backward": backward}
        tape = Tape._make(found[name] for name in Tape._fields)
        into_interface, into_before = access_backward(
            into_state, chosen(acts.read, into_reads, 0.0), _state(after), tape, record["interface"], _state(before),
            self.options, acts,
        )  # fmt: skip
        return into_interface, [*into_before, chosen(acts.read, torch.zeros_like(into_reads), into_reads)]


def _state(parts: Record) -> State:
    return State(*(parts[name] for name in State._fields))


def dnc_sequence(
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    step_mask: Tensor | None,
    shape: Sequence[int],
    options: Sequence[str],
    constants: Sequence[float],
    save_tape: bool,
) -> list[Tensor]:
    memory = DNCMemory(shape, options, constants)
    return _sequence.run(memory, inputs, parameters, state, step_mask, save_tape)


def dnc_sequence_backward(
    grad_outputs: Tensor | None,
    grad_state: Sequence[Tensor | None],
    tape: Sequence[Tensor],
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    step_mask: Tensor | None,
    shape: Sequence[int],
    options: Sequence[str],
    constants: Sequence[float],
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """Gradients of inputs, each parameter and each part of the state; an unwanted one is a size-0 tensor."""
    memory = DNCMemory(shape, options, constants)
    arguments = (grad_outputs, grad_state, tape, inputs, parameters, state, step_mask, output_mask)
    return _sequence.run_backward(memory, *arguments)
