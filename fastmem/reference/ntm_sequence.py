"""T steps of an NTM with its controller: inputs and a state -> outputs and the state after the last step.

    h, c = control([x_t; reads], h, c)                 (a controller of `_controller`)
    state, reads = ntm_step(W_xi h + b_xi, state)      (the op, some heads held where the step mask says so)
    y_t = W_y [h; reads] + b_y

inputs [T,B,X]; parameters: those of the controller, interface weight [S,H] and bias or the programs of `_programs`,
their heads being those of the NTM, output weight [Y,H+RW] and bias or no output layer;
state: memory [B,N,W], weights [B,A,N], reads [B,R,W], hidden and cell [B,H] ([B,0] of a feed-forward controller);
step_mask uint8 [T,B] -> outputs [T,B,Y], the state, and the tape of `_sequence`, whose accesses have the fields

    interface [S] | weights [A,N] | content weights [A,N] | meta and attention [A,P] of programs

and whose checkpoints are of the memory; what heads between two writes saw is rebuilt. A write that is held leaves the
weights of the write heads and the memory; a read that is held leaves the weights of the read heads, and reads.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastmem.reference import _sequence
from fastmem.reference._masks import Acting, chosen
from fastmem.reference._programs import Programs
from fastmem.reference._sequence import Record, Shapes
from fastmem.reference.ntm_step import Options, access, access_backward, interface_size, runs, told, written

FLAGS = ("projected", "joint_writes", "reversed_shift")


class Configuration(NamedTuple):
    """What the op is told besides tensors."""

    input_size: int
    hidden_size: int
    num_slots: int
    word_size: int
    max_shift: int
    output_size: int
    controller: str
    norm: str
    form: str
    heads: str
    projected: bool
    joint_writes: bool
    reversed_shift: bool
    sharpen_eps: float
    clip: float
    eps: float
    programs: Programs | None


def encoded(configuration: Configuration, spacing: int, accesses: int) -> _sequence.Encoded:
    """The op's shape, options and constants."""
    c = configuration
    words = [c.controller, c.norm, c.form, c.heads]
    return _sequence.encoded(c, c[:6], words, FLAGS, [c.sharpen_eps, c.clip, c.eps], spacing, accesses)


def decoded(shape: Sequence[int], options: Sequence[str], constants: Sequence[float]) -> tuple[Configuration, int, int]:
    """`encoded` undone: the configuration, the spacing of the checkpoints, and how many accesses there may be."""
    sizes, words, flags, numbers, programs, spacing, accesses = _sequence.decoded(
        shape, options, constants, 6, 4, FLAGS
    )
    return Configuration._make([*sizes, *words, *flags, *numbers, programs]), spacing, accesses


class NTMMemory(_sequence.Memory):
    """The memory part of the op."""

    checkpointed = ("memory",)

    def __init__(self, shape: Sequence[int], options: Sequence[str], constants: Sequence[float]) -> None:
        self.configuration, self.spacing, self.accesses = decoded(shape, options, constants)
        c = self.configuration
        self.input_size, self.hidden_size, self.output_size = c.input_size, c.hidden_size, c.output_size
        self.controller, self.programs, self.projected = c.controller, c.programs, c.projected
        self.options = Options(
            c.heads, c.joint_writes, c.reversed_shift, c.form == "power", c.sharpen_eps, c.clip, c.norm, c.eps
        )

    def interface_size(self) -> int:
        c = self.configuration
        return interface_size(c.heads, c.word_size, 2 * c.max_shift + 1)

    def memory_shapes(self) -> Shapes:
        c = self.configuration
        return {
            "memory": (c.num_slots, c.word_size),
            "weights": (len(c.heads), c.num_slots),
            "reads": (c.heads.count("r"), c.word_size),
        }

    def access_shapes(self) -> Shapes:
        return {"content": self.memory_shapes()["weights"]}

    def access(self, interface: Tensor, before: Sequence[Tensor], acts: Acting) -> tuple[list[Tensor], Record]:
        memory, weights, reads = before
        memory, weights, read, contents, _ = access(interface, memory, weights, self.options, acts)
        return [memory, weights, chosen(acts.read, read, reads)], {"content": contents}

    def rebuilt(self, record: Record, before: Record, acts: Acting) -> Record:
        *_, memory = self._memories(record, before, acts)
        return {"memory": memory}

    def access_backward(
        self, grads: Sequence[Tensor], record: Record, after: Record, before: Record, acts: Acting
    ) -> tuple[Tensor, list[Tensor]]:
        into_memory, into_weights, into_reads = grads
        *memories, _ = self._memories(record, before, acts)
        into_interface, *into_before = access_backward(
            into_memory, into_weights, into_reads, record["weights"], record["content"], memories, record["interface"],
            before["weights"], self.options, acts,
        )  # fmt: skip
        return into_interface, [*into_before, chosen(acts.read, torch.zeros_like(into_reads), into_reads)]

    def _memories(self, record: Record, before: Record, acts: Acting) -> list[Tensor]:
        """The memory that each run of heads saw, and that after the step."""
        heads, memories = self.options.heads, [before["memory"]]
        _, fields = told(record["interface"], heads, self.configuration.word_size, self.options.clip)
        weights = list(record["weights"].split(1, 1))
        for run in runs(heads, self.options.joint_writes):
            memories.append(written(run, memories[-1], weights, fields, heads, acts))
        return memories


def ntm_sequence(
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    step_mask: Tensor | None,
    shape: Sequence[int],
    options: Sequence[str],
    constants: Sequence[float],
    save_tape: bool,
) -> list[Tensor]:
    memory = NTMMemory(shape, options, constants)
    return _sequence.run(memory, inputs, parameters, state, step_mask, save_tape)


def ntm_sequence_backward(
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
    memory = NTMMemory(shape, options, constants)
    arguments = (grad_outputs, grad_state, tape, inputs, parameters, state, step_mask, output_mask)
    return _sequence.run_backward(memory, *arguments)
