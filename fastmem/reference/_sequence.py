"""A sequence of steps of a memory network: controller, interface vector, memory, output; forward and back.

    s = [x_t, reads]             h, c = control(s, h, c)         memory, reads = access(W_xi h + b_xi, memory)
    y_t = clamp(W_y [h, reads] + b_y)

What differs between networks is a `Memory`. The interface vector may come from stored programs instead (`_programs`),
and a network without an output layer gives [h, reads] itself. A step mask [T,B] says what acts in a step, sample by
sample: 1 the controller, 2 writes, 4 reads. What does not act keeps its values, and an output is 0 where the controller
does not. A step in which some sample writes or reads is an access; nothing of the memory is kept of the others.

The tape of T steps with n accesses, for the backward: tops [T+1,B,H+RW], the top of the controller and the reads before
the first step and after each; steps [T,B,5H], gates and cell; accesses [n,B,K], what each access recorded; and the
parts of the memory that are too large to keep at every access [m,B,...], as they are before each access that `spacing`
divides, but the first. The backward rebuilds those between. A tape may have room for more accesses than there are.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastmem.reference._controller import control, control_backward, parameter_shapes, state_size
from fastmem.reference._interface import cut, joined
from fastmem.reference._masks import Acting, acting, chosen
from fastmem.reference._programs import Programs, interface_backward, interface_of

Record = Mapping[str, Tensor]  # what a step leaves on the tape, by name
Shapes = dict[str, tuple[int, ...]]
Encoded = tuple[list[int], list[str], list[float]]  # shape, options, constants


class Memory(ABC):
    """The memory of a network: what a sequence op has besides a controller. Shapes are without the batch."""

    input_size: int
    hidden_size: int
    output_size: int
    spacing: int
    accesses: int  # steps of a sequence that write or read, at most; -1: all
    controller: str
    programs: Programs | None  # that make the interface vector
    projected: bool  # whether there is an output layer
    output_clip: float = inf
    checkpointed: tuple[str, ...]  # parts of the state that are kept at every `spacing` accesses only

    @abstractmethod
    def interface_size(self) -> int: ...

    @abstractmethod
    def memory_shapes(self) -> Shapes:
        """Of the state up to the reads, these last; in the order of the op."""

    @abstractmethod
    def access_shapes(self) -> Shapes:
        """Of what `access` records."""

    @abstractmethod
    def access(self, interface: Tensor, before: Sequence[Tensor], acts: Acting) -> tuple[list[Tensor], Record]:
        """The state after, reads last, and what the backward needs; 0 of what did not act."""

    @abstractmethod
    def rebuilt(self, record: Record, before: Record, acts: Acting) -> Record:
        """The checkpointed parts after a step, from what it recorded and the whole state before."""

    @abstractmethod
    def access_backward(
        self,
        grads: Sequence[Tensor],
        record: Record,
        after: Record,
        before: Record,
        acts: Acting,
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the interface and of the state before, from those of the state after; `rebuilt` made both."""

    def state_shapes(self) -> Shapes:
        size = state_size(self.controller, self.hidden_size)
        return {**self.memory_shapes(), "hidden": (size,), "cell": (size,)}

    def parameter_shapes(self) -> Shapes:
        heads, word = self.memory_shapes()["reads"]
        size, top = self.interface_size(), self.hidden_size + heads * word
        interface: Shapes = {"interface_weight": (size, self.hidden_size), "interface_bias": (size,)}
        output: Shapes = {"output_weight": (self.output_size, top), "output_bias": (self.output_size,)}
        return {
            **parameter_shapes(self.controller, self.input_size + heads * word, self.hidden_size),
            **(self.programs.parameter_shapes(self.hidden_size) if self.programs else interface),
            **(output if self.projected else {}),
        }

    def step_shapes(self) -> Shapes:
        """Of the fields of `steps`."""
        size = state_size(self.controller, self.hidden_size)
        return {"gates": (4 * size,), "cell": (size,)}

    def record_shapes(self) -> Shapes:
        """Of the fields of `accesses`: interface, the state after, what `access` records, and the programs."""
        kept = {
            name: shape for name, shape in self.memory_shapes().items() if name not in (*self.checkpointed, "reads")
        }
        programs = self.programs.record_shapes() if self.programs else {}
        return {"interface": (self.interface_size(),), **kept, **self.access_shapes(), **programs}

    def result_shapes(self, steps: int, batch: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Of the results, and of the tape."""
        shapes = self.memory_shapes()
        heads, word = shapes["reads"]
        top = self.hidden_size + heads * word
        accesses = steps if self.accesses < 0 else self.accesses
        checkpoints = (accesses - 1) // self.spacing if accesses else 0
        output_size = self.output_size if self.projected else top
        results = [(steps, batch, output_size), *((batch, *shape) for shape in self.state_shapes().values())]
        return results, [
            (steps + 1, batch, top),
            (steps, batch, _size(self.step_shapes())),
            (accesses, batch, _size(self.record_shapes())),
            *((checkpoints, batch, *shapes[name]) for name in self.checkpointed),
        ]


def encoded(
    configuration: Any,
    sizes: Sequence[int],
    words: Sequence[str],
    flags: Sequence[str],
    constants: Sequence[float],
    spacing: int,
    accesses: int,
) -> Encoded:
    """A configuration as the op takes it; its programs come last in each list, but for the flags."""
    stored: tuple[list[int], str, list[str], float] = ([], "", [], 0.0)
    if configuration.programs:
        stored = configuration.programs.encoded()
    program_sizes, program_norm, program_flags, program_eps = stored
    on = [name for name in flags if getattr(configuration, name)]
    return (
        [*sizes, spacing, accesses, *program_sizes],
        [*words, program_norm, *on, *program_flags],
        [*constants, program_eps],
    )


def decoded(
    shape: Sequence[int],
    options: Sequence[str],
    constants: Sequence[float],
    size_count: int,
    word_count: int,
    flags: Sequence[str],
) -> tuple[Sequence[int], Sequence[str], list[bool], Sequence[float], Programs | None, int, int]:
    """`encoded` undone: sizes, words, flags, constants, programs, spacing and accesses."""
    sizes, (spacing, accesses, *program_sizes) = shape[:size_count], shape[size_count:]
    words, (program_norm, *names) = options[:word_count], options[word_count:]
    *numbers, program_eps = constants
    programs = Programs.decoded(program_sizes, program_norm, names, program_eps)
    return sizes, words, [name in names for name in flags], numbers, programs, spacing, accesses


def _size(shapes: Shapes) -> int:
    return sum(map(prod, shapes.values()))


def accesses(step_mask: Tensor | None, steps: int) -> list[int]:
    """The steps in which any sample writes or reads."""
    if step_mask is None:
        return list(range(steps))
    return [int(step) for step in ((step_mask & 6) != 0).any(1).nonzero()]


class Parameters(NamedTuple):
    """Those of a network, by what they are for."""

    layer: Sequence[Tensor]
    interface: Sequence[Tensor]
    output: Sequence[Tensor]  # weight and bias; none where there is no output layer

    @classmethod
    def of(cls, memory: Memory, parameters: Sequence[Tensor]) -> "Parameters":
        end = len(parameters) - (2 if memory.projected else 0)
        begin = end - (5 if memory.programs else 2)
        return cls(parameters[:begin], parameters[begin:end], parameters[end:])


def run(
    memory: Memory,
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    step_mask: Tensor | None,
    save_tape: bool,
) -> list[Tensor]:
    """Outputs, the final state, and the tape, if it is to be saved."""
    layer, interface_layer, output_layer = Parameters.of(memory, parameters)
    *accessed, hidden, cell = (part.clone() for part in state)
    names = list(memory.memory_shapes())
    feedforward = memory.controller == "feedforward"
    top = inputs.new_zeros(inputs.shape[1], memory.hidden_size) if feedforward else hidden
    tops = [torch.cat([top, accessed[-1].flatten(1)], -1)]
    steps: list[Tensor] = []
    records: list[Tensor] = []
    checkpoints: dict[str, list[Tensor]] = {name: [] for name in memory.checkpointed}
    at = set(accesses(step_mask, len(inputs)))
    for time, acts in enumerate(acting(step_mask, len(inputs))):
        seen = chosen(acts.control, torch.cat([inputs[time], accessed[-1].flatten(1)], -1), 0.0)
        top, new_cell, gates = control(memory.controller, layer, seen, hidden, cell)
        gates = chosen(acts.control, gates, 0.0)
        if feedforward:
            top = chosen(acts.control, top, 0.0)
        else:
            top = hidden = chosen(acts.control, top, hidden)
            cell = chosen(acts.control, new_cell, cell)
        if time in at:
            if records and len(records) % memory.spacing == 0:
                for name in memory.checkpointed:
                    checkpoints[name].append(accessed[names.index(name)])
            told = _told(memory, interface_layer, top)
            told = {name: chosen(acts.access, value, 0.0) for name, value in told.items()}
            accessed, record = memory.access(told["interface"], accessed, acts)
            recorded = {**told, **dict(zip(names, accessed, strict=True)), **record}
            records.append(joined(recorded[name] for name in memory.record_shapes()))
        tops.append(torch.cat([top, accessed[-1].flatten(1)], -1))
        steps.append(joined([gates, cell]))
    outputs = torch.stack(tops)[1:]
    if output_layer:
        outputs = linear(outputs, *output_layer).clamp(-memory.output_clip, memory.output_clip)
    results = [_where_controlled(step_mask, outputs), *accessed, hidden, cell]
    if save_tape:
        _, shapes = memory.result_shapes(*inputs.shape[:2])
        for parts, shape in zip((tops, steps, records, *checkpoints.values()), shapes, strict=True):
            taped = inputs.new_zeros(shape)
            if parts:
                taped[: len(parts)] = torch.stack(parts).detach()
            results.append(taped)
    return results


def _told(memory: Memory, interface_layer: Sequence[Tensor], top: Tensor) -> dict[str, Tensor]:
    """The interface vector, and what the programs that made it leave on the tape."""
    if memory.programs is None:
        return {"interface": linear(top, *interface_layer)}
    interface, meta, attention = interface_of(memory.programs, interface_layer, top)
    return {"interface": interface, "meta": meta, "attention": attention}


def _told_backward(
    grad: Tensor, memory: Memory, interface_layer: Sequence[Tensor], record: Record, top: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """Gradients of the top, and of each parameter of the interface."""
    if memory.programs is None:
        return grad @ interface_layer[0], [grad.mT @ top, grad.sum(0)]
    return interface_backward(grad, record["meta"], record["attention"], memory.programs, interface_layer, top)


def run_backward(
    memory: Memory,
    grad_outputs: Tensor | None,
    grad_state: Sequence[Tensor | None],
    tape: Sequence[Tensor],
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    step_mask: Tensor | None,
    output_mask: Sequence[bool],
) -> list[Tensor]:
    """Gradients of inputs, parameters and initial state; an unwanted one is a size-0 tensor.

    From the last step to the first; the memory between two checkpoints is rebuilt from the first of them.
    """
    layer, interface_layer, output_layer = Parameters.of(memory, parameters)
    tops, steps, taped, *checkpoints = tape
    heads = [memory.hidden_size, tops.shape[-1] - memory.hidden_size]
    if grad_outputs is None:
        grad_outputs = inputs.new_zeros(memory.result_shapes(*inputs.shape[:2])[0][0])
    into_outputs = grad_outputs
    if output_layer:
        raw = linear(tops[1:], *output_layer)
        clipped = (raw > memory.output_clip) | (raw < -memory.output_clip)
        into_outputs = into_outputs.masked_fill(clipped, 0.0)
    into_outputs = _where_controlled(step_mask, into_outputs)
    into_tops = into_outputs @ output_layer[0] if output_layer else into_outputs
    into_tops, into_read_tops = into_tops.split(heads, -1)

    into_state = [torch.zeros_like(s) if g is None else g for g, s in zip(grad_state, state, strict=True)]
    *into_accessed, into_hidden, into_cell = into_state
    into_inputs = torch.zeros_like(inputs)
    into_layer = [torch.zeros_like(parameter) for parameter in layer]
    into_interface_layer = [torch.zeros_like(parameter) for parameter in interface_layer]
    acts = acting(step_mask, len(inputs))
    at = accesses(step_mask, len(inputs))
    names = list(memory.state_shapes())
    shape_of_reads = state[names.index("reads")].shape
    first = dict(zip(names, state, strict=True))
    controls = [cut(step, memory.step_shapes()) for step in steps]
    records = [cut(record, memory.record_shapes()) for record in taped]

    def top_of(time: int) -> Tensor:
        return tops[time].split(heads, -1)[0]

    def reads_of(time: int) -> Tensor:
        return tops[time].split(heads, -1)[1]

    def small(access: int) -> dict[str, Tensor]:
        """What is kept of the memory's state before an access, or after the last."""
        if access == 0:
            return first
        return {**records[access - 1], "reads": reads_of(at[access - 1] + 1).view(shape_of_reads)}

    def rebuilt(chunk: int) -> list[dict[str, Tensor]]:
        """The states before each access from a checkpoint to the next, and after the last of them."""
        states = [small(chunk)]
        if chunk:
            kept = (part[chunk // memory.spacing - 1] for part in checkpoints)
            states[0] = {**states[0], **dict(zip(memory.checkpointed, kept, strict=True))}
        for access in range(chunk, min(chunk + memory.spacing, len(at))):
            large = memory.rebuilt(records[access], states[-1], acts[at[access]])
            states.append({**small(access + 1), **large})
        return states

    access = len(at)
    states: list[dict[str, Tensor]] = []
    for time in reversed(range(len(inputs))):
        into_accessed[-1] = into_accessed[-1] + into_read_tops[time].view(shape_of_reads)
        into_top = into_tops[time]
        if access and time == at[access - 1]:
            access -= 1
            chunk, step = access - access % memory.spacing, access % memory.spacing
            if access == len(at) - 1 or step == memory.spacing - 1:
                states = rebuilt(chunk)
            record = records[access]
            into_interface, into_accessed = memory.access_backward(
                into_accessed, record, states[step + 1], states[step], acts[time]
            )
            told, into_parameters = _told_backward(into_interface, memory, interface_layer, record, top_of(time + 1))
            into_top = into_top + told
            into_interface_layer = _summed(into_interface_layer, into_parameters)
        if memory.controller != "feedforward":
            into_top = into_top + into_hidden
        controlled = acts[time].control
        hidden = top_of(time) if into_hidden.numel() else into_hidden
        cell = controls[time - 1]["cell"] if time else first["cell"]
        seen = chosen(controlled, torch.cat([inputs[time], reads_of(time)], -1), 0.0)
        into_seen, into_hidden_before, into_cell_before, into_parameters = control_backward(
            chosen(controlled, into_top, 0.0), chosen(controlled, into_cell, 0.0), top_of(time + 1),
            controls[time]["cell"], controls[time]["gates"], memory.controller, layer, seen, hidden, cell,
        )  # fmt: skip
        into_seen = chosen(controlled, into_seen, 0.0)
        if memory.controller != "feedforward":
            into_hidden = chosen(controlled, into_hidden_before, into_top)
            into_cell = chosen(controlled, into_cell_before, into_cell)
        into_inputs[time] = into_seen[:, : memory.input_size]
        into_accessed[-1] = into_accessed[-1] + into_seen[:, memory.input_size :].view(shape_of_reads)
        into_layer = _summed(into_layer, into_parameters)

    into_output_layer = []
    if output_layer:
        into_output_layer = [torch.einsum("tby,tbk->yk", into_outputs, tops[1:]), into_outputs.sum((0, 1))]
    gradients = [
        into_inputs, *into_layer, *into_interface_layer, *into_output_layer, *into_accessed, into_hidden, into_cell
    ]  # fmt: skip
    return [g.contiguous() if wants else inputs.new_empty(0) for g, wants in zip(gradients, output_mask, strict=True)]


def _summed(totals: list[Tensor], more: Sequence[Tensor]) -> list[Tensor]:
    return [total + part for total, part in zip(totals, more, strict=True)]


def _where_controlled(step_mask: Tensor | None, values: Tensor) -> Tensor:
    return values if step_mask is None else torch.where((step_mask & 1).bool().unsqueeze(-1), values, 0.0)
