"""A sequence of steps of a memory network: controller, interface vector, memory, output; forward and back.

    s = [x_t, reads]             h, c = control(s, h, c)         memory, reads = access(W_xi h + b_xi, memory)
    y_t = clamp(W_y [h, reads] + b_y)

What differs between networks is a `Memory`. A step mask [T,B] says what acts in a step, sample by sample: 1 the
controller, 2 writes, 4 reads. What does not act keeps its values, and an output is 0 where the controller does not.

The tape of T steps, for the backward: tops [T+1,B,H+RW], the top of the controller and the reads before the first step
and after each; steps [T,B,K], what each step recorded; and the parts of the memory that are too large to keep at every
step [n,B,...], as they are before each step that `spacing` divides, but the first. The backward rebuilds those between.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from math import inf, prod

import torch
from torch import Tensor
from torch.nn.functional import linear

from fastmem.reference._controller import control, control_backward, parameter_shapes, state_size
from fastmem.reference._interface import cut, joined
from fastmem.reference._masks import Acting, acting, chosen

Record = Mapping[str, Tensor]  # what a step leaves on the tape, by name
Shapes = dict[str, tuple[int, ...]]


class Memory(ABC):
    """The memory of a network: what a sequence op has besides a controller. Shapes are without the batch."""

    input_size: int
    hidden_size: int
    output_size: int
    spacing: int
    controller: str
    output_clip: float = inf
    checkpointed: tuple[str, ...]  # parts of the state that are kept at every `spacing` steps only

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
        return {
            **parameter_shapes(self.controller, self.input_size + heads * word, self.hidden_size),
            "interface_weight": (self.interface_size(), self.hidden_size),
            "interface_bias": (self.interface_size(),),
            "output_weight": (self.output_size, self.hidden_size + heads * word),
            "output_bias": (self.output_size,),
        }

    def record_shapes(self) -> Shapes:
        """Of the fields of `steps`: interface, controller, the state after the step, and what `access` records."""
        size = state_size(self.controller, self.hidden_size)
        kept = {
            name: shape for name, shape in self.memory_shapes().items() if name not in (*self.checkpointed, "reads")
        }
        sizes = {"interface": (self.interface_size(),), "gates": (4 * size,), "cell": (size,)}
        return {**sizes, **kept, **self.access_shapes()}

    def result_shapes(self, steps: int, batch: int) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
        """Of the results, and of the tape."""
        shapes = self.memory_shapes()
        heads, word = shapes["reads"]
        width = sum(map(prod, self.record_shapes().values()))
        checkpoints = (steps - 1) // self.spacing if steps else 0
        results = [(steps, batch, self.output_size), *((batch, *shape) for shape in self.state_shapes().values())]
        return results, [
            (steps + 1, batch, self.hidden_size + heads * word),
            (steps, batch, width),
            *((checkpoints, batch, *shapes[name]) for name in self.checkpointed),
        ]


def run(
    memory: Memory,
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    step_mask: Tensor | None,
    save_tape: bool,
) -> list[Tensor]:
    """Outputs, the final state, and the tape, if it is to be saved."""
    *layer, interface_weight, interface_bias, output_weight, output_bias = parameters
    *accessed, hidden, cell = (part.clone() for part in state)
    names = list(memory.memory_shapes())
    feedforward = memory.controller == "feedforward"
    top = inputs.new_zeros(inputs.shape[1], memory.hidden_size) if feedforward else hidden
    tops = [torch.cat([top, accessed[-1].flatten(1)], -1)]
    steps: list[Tensor] = []
    checkpoints: dict[str, list[Tensor]] = {name: [] for name in memory.checkpointed}
    for time, acts in enumerate(acting(step_mask, len(inputs))):
        if time and time % memory.spacing == 0:
            for name in memory.checkpointed:
                checkpoints[name].append(accessed[names.index(name)])
        seen = chosen(acts.control, torch.cat([inputs[time], accessed[-1].flatten(1)], -1), 0.0)
        top, new_cell, gates = control(memory.controller, layer, seen, hidden, cell)
        gates = chosen(acts.control, gates, 0.0)
        if feedforward:
            top = chosen(acts.control, top, 0.0)
        else:
            top = hidden = chosen(acts.control, top, hidden)
            cell = chosen(acts.control, new_cell, cell)
        interface = chosen(acts.access, linear(top, interface_weight, interface_bias), 0.0)
        accessed, record = memory.access(interface, accessed, acts)
        tops.append(torch.cat([top, accessed[-1].flatten(1)], -1))
        if save_tape:
            after = dict(zip(names, accessed, strict=True))
            recorded = {"interface": interface, "gates": gates, "cell": cell, **after, **record}
            steps.append(joined(recorded[name] for name in memory.record_shapes()))
    outputs = linear(torch.stack(tops)[1:], output_weight, output_bias).clamp(-memory.output_clip, memory.output_clip)
    results = [_where_controlled(step_mask, outputs), *accessed, hidden, cell]
    if save_tape:
        _, shapes = memory.result_shapes(*inputs.shape[:2])
        for parts, shape in zip((tops, steps, *checkpoints.values()), shapes, strict=True):
            results.append(torch.stack(parts).detach() if parts else inputs.new_empty(shape))
    return results


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
    *layer, interface_weight, _, output_weight, output_bias = parameters
    tops, steps, *checkpoints = tape
    heads = [memory.hidden_size, tops.shape[-1] - memory.hidden_size]
    grad_outputs = inputs.new_zeros(*inputs.shape[:2], memory.output_size) if grad_outputs is None else grad_outputs
    raw = linear(tops[1:], output_weight, output_bias)
    clipped = (raw > memory.output_clip) | (raw < -memory.output_clip)
    into_outputs = _where_controlled(step_mask, grad_outputs.masked_fill(clipped, 0.0))
    into_tops, into_read_tops = (into_outputs @ output_weight).split(heads, -1)

    into_state = [torch.zeros_like(s) if g is None else g for g, s in zip(grad_state, state, strict=True)]
    *into_accessed, into_hidden, into_cell = into_state
    into_inputs = torch.zeros_like(inputs)
    into_interfaces = inputs.new_zeros(*inputs.shape[:2], len(interface_weight))
    into_layer = [torch.zeros_like(parameter) for parameter in layer]
    acts = acting(step_mask, len(inputs))
    names = list(memory.state_shapes())
    shape_of_reads = state[names.index("reads")].shape
    records = [cut(step, memory.record_shapes()) for step in steps]
    first = dict(zip(names, state, strict=True))

    def small(time: int) -> dict[str, Tensor]:
        """What is kept of the state before a step."""
        if time == 0:
            return first
        return {**records[time - 1], "reads": tops[time].split(heads, -1)[1].view(shape_of_reads)}

    for chunk in reversed(range(0, len(inputs), memory.spacing)):
        times = range(chunk, min(chunk + memory.spacing, len(inputs)))
        states = [small(chunk)]
        if chunk:
            kept = (part[chunk // memory.spacing - 1] for part in checkpoints)
            states[0] |= dict(zip(memory.checkpointed, kept, strict=True))
        for time in times:
            states.append({**small(time + 1), **memory.rebuilt(records[time], states[-1], acts[time])})
        for time in reversed(times):
            after, before, record = states[time - chunk + 1], states[time - chunk], records[time]
            controls = acts[time].control
            into_accessed[-1] = into_accessed[-1] + into_read_tops[time].view(shape_of_reads)
            into_interface, into_accessed = memory.access_backward(into_accessed, record, after, before, acts[time])
            into_interfaces[time] = into_interface
            into_top = into_tops[time] + into_interface @ interface_weight
            if memory.controller != "feedforward":
                into_top = into_top + into_hidden
            hidden = tops[time].split(heads, -1)[0] if into_hidden.numel() else into_hidden
            reads = before["reads"].flatten(1)
            seen = chosen(controls, torch.cat([inputs[time], reads], -1), 0.0)
            into_seen, into_hidden_before, into_cell_before, into_parameters = control_backward(
                chosen(controls, into_top, 0.0), chosen(controls, into_cell, 0.0), tops[time + 1].split(heads, -1)[0],
                record["cell"], record["gates"], memory.controller, layer, seen, hidden, before["cell"],
            )  # fmt: skip
            into_seen = chosen(controls, into_seen, 0.0)
            if memory.controller != "feedforward":
                into_hidden = chosen(controls, into_hidden_before, into_top)
                into_cell = chosen(controls, into_cell_before, into_cell)
            into_inputs[time] = into_seen[:, : memory.input_size]
            into_accessed[-1] = into_accessed[-1] + into_seen[:, memory.input_size :].view(shape_of_reads)
            into_layer = [total + more for total, more in zip(into_layer, into_parameters, strict=True)]

    controller_tops = tops[1:].split(heads, -1)[0]
    gradients = [
        into_inputs,
        *into_layer,
        torch.einsum("tbs,tbh->sh", into_interfaces, controller_tops),
        into_interfaces.sum((0, 1)),
        torch.einsum("tby,tbk->yk", into_outputs, tops[1:]),
        into_outputs.sum((0, 1)),
        *into_accessed,
        into_hidden,
        into_cell,
    ]
    return [g.contiguous() if wants else inputs.new_empty(0) for g, wants in zip(gradients, output_mask, strict=True)]


def _where_controlled(step_mask: Tensor | None, values: Tensor) -> Tensor:
    return values if step_mask is None else torch.where((step_mask & 1).bool().unsqueeze(-1), values, 0.0)
