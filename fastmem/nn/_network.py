"""What the modules with a memory share: sizes, checks of input and state, one step and whole sequences."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.rnn import PackedSequence

from fastmem import _check
from fastmem.nn import _sequence
from fastmem.nn._controller import Controller
from fastmem.nn._sequence import Sequences, mapped
from fastmem.nn.program_memory import ProgramMemory
from fastmem.nn.write_schedule import WriteSchedule
from fastmem.ops import ProgramConfig
from fastmem.ops._sequence import of_a_module
from fastmem.reference._controller import CONTROLLERS

Views = TypeVar("Views", bound=tuple[Tensor, ...])  # what a module saw, a named tuple
Schedule = str | WriteSchedule | Tensor | None  # a rule, a schedule, bools [T] or [T,B], or every step


class MemoryNetwork(Controller, ABC, Generic[Views]):
    """A controller with a memory behind it. A module derives from this, and gives the type and shapes of its state."""

    _of_a_step: ClassVar[dict[str, list[Any]]]  # the methods that make a step, as fastmem has them
    _views: list[Views] | None = None  # of the steps done while somebody watches; `access` appends them
    _shares: Tensor | None = None  # the weights of the programs in the step that is done while somebody watches
    state_type: type[Any]
    batch_first: bool | None = None  # of a module that runs sequences; None of a cell
    input_size: int
    output_size: int
    num_slots: int
    interface: Any  # a Linear or ProgramMemory, from the top of the controller to the interface vector
    output: nn.Linear  # from the top of the controller and the reads to the output
    sequence_stem: str | None = None  # the name of the op that takes whole sequences, where there is one

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if cls.__module__.startswith("fastmem.nn."):
            cls._of_a_step = {
                name: _definitions(cls, name) for name in ("control", "step", "top_step", "project", "access")
            }

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """The state before the first step."""

    def first_state(self, batch_size: int) -> Any:
        """What `initial_state` gives, for reading only: large parts may be one for all samples."""
        return self.initial_state(batch_size)

    @abstractmethod
    def access(self, interface: Tensor, state: Any, in_place: bool = False) -> Any:
        """The memory's part of a step, by an interface vector `[B, S]`; hidden and cell pass through."""

    @abstractmethod
    def interface_runs(self) -> tuple[tuple[int, int], ...]:
        """The control heads that the interface vector speaks to: head and width of each run, in its order."""

    def sequence_op(
        self, inputs: Tensor, parameters: list[Tensor], state: Any, step_mask: Tensor | None, projected: bool = True
    ) -> Any:
        """Whole sequences `[T, B, X]` in one op: the outputs and the parts of the state after the last step.

        Not `projected`: the tops and reads in place of the outputs.
        """
        raise NotImplementedError  # asked of a network with a `sequence_stem` alone

    @contextmanager
    def watched(self) -> Iterator[list[Views]]:
        """Every call inside appends what it looked at to the list::

        with net.watched() as views:
            output, state = net(input)
        views[0].read_weights
        """
        before, self._views = self._views, []
        try:
            yield self._views
        finally:
            self._views, self._shares = before, None

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: not that somebody watches, nor what was seen."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_views", "_shares")}

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()
        self.interface.reset_parameters()
        self.output.reset_parameters()

    def step(self, input: Tensor, state: Any, in_place: bool = False) -> tuple[Tensor, Any]:
        """One step: input `[B, X]` and a batched state -> output `[B, Y]` and the next state. Arguments unchecked.

        `in_place`: the new memory overwrites that of the state, without a gradient.
        """
        top, state = self.top_step(input, state, in_place)
        return self.project(torch.cat([top, state.reads.flatten(1)], -1)), state

    def top_step(
        self, input: Tensor, state: Any, in_place: bool = False, writes: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """A step without its output: the top of the controller `[B, H]`, and the next state.

        `writes` `[B]`: the samples whose memory takes part; of the others it stays as it is. None: all.
        """
        seen = torch.cat([input, state.reads.flatten(1)], -1)
        top, hidden, cell = self.control(seen, state.hidden, state.cell)
        if writes is not None and not torch.compiler.is_compiling():  # a compiler has no numbers to look at
            if not writes.any():
                dtype = self.weight_ih_l0.dtype
                return top.to(dtype), state._replace(hidden=hidden.to(dtype), cell=cell.to(dtype))
            writes = None if writes.all() else writes
        if self._views is not None and isinstance(self.interface, ProgramMemory):
            with self.interface.watched() as shares:
                interface = self.interface(top)
            self._shares = shares[0]
        else:
            interface = self.interface(top)
        # Autocast is for the linear maps: the memory and all of the state keep the dtype of the parameters.
        with _no_autocast(input.device.type):
            top, hidden, cell, interface = (t.to(self.weight_ih_l0.dtype) for t in (top, hidden, cell, interface))
            before = state._replace(hidden=hidden, cell=cell)
            if writes is None:
                return top, self.access(interface, before, in_place)
            with nullcontext() if self._views is None else self.watched() as views:
                after = self.access(interface, before)
            if self._views is not None and views:  # of the samples whose memory rests there is nothing to see
                unseen = mapped(torch.zeros_like, views[-1])
                self._views.append(mapped(lambda new, old: _sequence.of_rows(writes, new, old), views[-1], unseen))
            return top, mapped(lambda new, old: _sequence.of_rows(writes, new, old), after, before)

    def project(self, tops: Tensor) -> Tensor:
        """The output `[..., Y]`, from the top of the controller and the reads `[..., H + RW]`."""
        return self.output(tops)

    def shares(self, interface: Tensor) -> Tensor:
        """The weights of the programs that made an interface vector `[B, n, P]`, for views; [B, 0, 0] without any."""
        return interface.new_zeros(len(interface), 0, 0) if self._shares is None else self._shares

    def run_cell(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step, with or without a batch."""
        self._check_cell(input, state)
        unbatched = input.dim() == 1
        if unbatched:
            input = input.unsqueeze(0)
            state = None if state is None else mapped(lambda tensor: tensor.unsqueeze(0), state)
        state = self.initial_state(len(input)) if state is None else state
        output, state = self.step(input.to(self.weight_ih_l0.dtype), state)
        if unbatched:
            output, state = output.squeeze(0), mapped(lambda tensor: tensor.squeeze(0), state)
        return output, state

    def run_sequences(
        self,
        input: Tensor | PackedSequence,
        state: Any,
        lengths: Tensor | Sequence[int] | None,
        write_schedule: Schedule = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """Sequences: the output, laid out as the input, and the state after the last step."""
        sequences = self._checked_sequences(input, state, lengths)
        writes = self.writes(sequences, write_schedule)
        by_op = self._served(sequences.tensor)[0] is not None
        if state is None:
            first_state = self.first_state if by_op else self.initial_state
            state = first_state(sequences.batch_size())
        else:
            state = self.given_state(sequences, state)
        run = self._run_op if by_op else self._run_steps
        output, state = run(sequences, state, writes)
        return output, sequences.as_given(state)

    def given_state(self, sequences: Sequences, state: Any) -> Any:
        """A state of the caller's with a batch, on which everything that is learned of the first state depends too.

        It takes part in a batch of none, and gets a gradient of zero: DistributedDataParallel waits for one of every
        parameter.
        """
        state = sequences.with_batch(state)
        if not torch.is_grad_enabled():
            return state
        return mapped(
            lambda given, first: torch.cat([given, first]) if first.requires_grad else given,
            state,
            self.initial_state(0),
        )

    def taking_part(self, state: Any) -> Any:
        """The state, with a gradient of zero for the parameters that only a write has a use for, where there is none.

        They take part in a batch of none, as in :meth:`given_state`.
        """
        if self._views is not None:  # which a batch of none would be among
            return state
        none = mapped(lambda tensor: tensor[:0], state)
        top = none.hidden.new_empty(0, self.hidden_size)
        return mapped(lambda given, empty: torch.cat([given, empty]), state, self.access(self.interface(top), none))

    def writes(self, sequences: Sequences, schedule: Schedule) -> Tensor | None:
        """In which steps each sequence writes and reads: bools `[T, B]` on the CPU; None: in all."""
        steps, batch = sequences.sizes()
        schedule = WriteSchedule(schedule) if isinstance(schedule, str) else schedule
        if schedule is None or (isinstance(schedule, WriteSchedule) and schedule.rule == "dense"):
            return None
        if self._changes("step"):
            raise NotImplementedError(
                "write_schedule: expected None for a step other than that of fastmem, which knows no steps without a"
                " write; change top_step or project instead"
            )
        if isinstance(schedule, Tensor):
            if schedule.dtype != torch.bool:
                raise TypeError(f"write_schedule: expected dtype torch.bool, got {schedule.dtype}")
            if schedule.shape not in ((steps,), (steps, batch)):
                raise ValueError(
                    f"write_schedule: expected shape [{steps}] or [{steps}, {batch}], got {list(schedule.shape)}"
                )
            return (schedule if schedule.dim() == 2 else schedule.unsqueeze(1).expand(steps, batch)).cpu()
        if not isinstance(schedule, WriteSchedule):
            raise TypeError(
                f"write_schedule: expected a rule, a WriteSchedule, a Tensor or None, got {type(schedule).__name__}"
            )
        lengths = sequences.lengths_of()
        if lengths is None:
            return schedule.steps(steps, self.num_slots).unsqueeze(1).expand(steps, batch)
        return schedule.mask(lengths, steps, self.num_slots)

    def served(
        self,
        input: Tensor | PackedSequence,
        state: Any = None,
        lengths: Tensor | Sequence[int] | None = None,
        write_schedule: Schedule = None,
    ) -> tuple[str, str]:
        """Whether a call runs whole sequences in one op, and why; for :func:`fastmem.explain`."""
        if self.batch_first is None:
            self._check_cell(input, state)
            return "step by step", "a cell is one step"
        sequences = self._checked_sequences(input, state, lengths)
        self.writes(sequences, write_schedule)
        backend, reason = self._served(sequences.tensor)
        return ("step by step" if backend is None else f"sequence op on {backend}"), reason

    def _run_op(self, sequences: Sequences, state: Any, writes: Tensor | None) -> tuple[Tensor | PackedSequence, Any]:
        inputs = sequences.whole()
        all_act = writes is None and sequences.given is None and sequences.lengths is None
        step_mask = None if all_act else sequences.step_mask(writes).to(inputs.device)
        outputs, state = self.sequence_op(inputs, self.op_parameters(), state, step_mask)
        return sequences.laid_out(outputs), self.state_type._make(state)

    def op_parameters(self, projected: bool = True) -> list[Tensor]:
        """As the op on whole sequences takes them."""
        interface = self.interface
        told = (
            interface.parameters_in_order()
            if isinstance(interface, ProgramMemory)
            else [interface.weight, interface.bias]
        )
        return [*self._layer(0), *told, *([self.output.weight, self.output.bias] if projected else [])]

    def program_config(self) -> ProgramConfig | None:
        """Of the stored programs, where they make the interface vector."""
        return self.interface.config if isinstance(self.interface, ProgramMemory) else None

    def _run_steps(
        self, sequences: Sequences, state: Any, writes: Tensor | None
    ) -> tuple[Tensor | PackedSequence, Any]:
        state = sequences.entering(state)
        if writes is not None and torch.is_grad_enabled() and not torch.compiler.is_compiling() and not writes.any():
            state = self.taking_part(state)
        in_place = self._views is None and _sequence.may_write()
        if in_place:
            state = mapped(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), state)
        when = iter(sequences.of_steps(writes))

        def step(input: Tensor, state: Any) -> tuple[Tensor, Any]:
            if writes is None:
                return self.step(input, state, in_place)
            count = 0 if self._views is None else len(self._views)
            top, state = self.top_step(input, state, in_place, next(when))
            if self._views is not None and len(self._views) == count:
                self._views.append(None)  # type: ignore[arg-type]  # nothing to see of a memory that rests
            return self.project(torch.cat([top, state.reads.flatten(1)], -1)), state

        # The steps show in a list of their own: one that raises leaves nothing in the caller's.
        with nullcontext() if self._views is None else self.watched() as seen:
            outputs, state = _sequence.run(step, sequences.steps(), state)
        if self._views is not None and seen and any(seen):
            shown = _sequence.with_zeros(seen, [len(output) for output in outputs])
            self._views.append(mapped(lambda *steps: sequences.padded(list(steps)), *shown))
        if outputs:
            output = sequences.joined(outputs)
        else:  # without a step; of the dtype that a step would have under autocast
            output = self.project(sequences.tensor.new_empty(*sequences.tensor.shape[:-1], self.output.in_features))
        return output, sequences.leaving(state)

    def run_tops(self, inputs: Tensor, state: Any, step_mask: Tensor) -> tuple[Tensor, Any]:
        """Tops and reads `[T, B, H + RW]` of the steps of a step mask `[T, B]`, and the state after them.

        The mask is that of :meth:`Sequences.step_mask`. Sequences are put together from such runs where something
        happens between two steps. Arguments unchecked.
        """
        if self._served(inputs)[0] is not None:
            parameters, mask = self.op_parameters(projected=False), step_mask.to(inputs.device)
            tops, parts = self.sequence_op(inputs, parameters, state, mask, projected=False)
            return tops, self.state_type._make(parts)
        outputs = [inputs.new_zeros(0, inputs.shape[1], self.output.in_features)]
        for input, acts in zip(inputs, step_mask, strict=True):
            alive = acts != 0
            some_ended = torch.compiler.is_compiling() or not alive.all()
            if some_ended:  # what lies past an end may be NaN
                input = _sequence.of_rows(alive, input, torch.zeros_like(input))
            top, after = self.top_step(input, state, writes=acts == 7)
            tops = torch.cat([top, after.reads.flatten(1)], -1)
            if some_ended:
                after = mapped(lambda new, old, rows=alive: _sequence.of_rows(rows, new, old), after, state)
                tops = _sequence.of_rows(alive, tops, torch.zeros_like(tops))
            state = after
            outputs.append(tops.unsqueeze(0))
        return torch.cat(outputs), state

    def _served(self, inputs: Tensor) -> tuple[str | None, str]:
        """The backend of the op that takes whole sequences, and why; or None, and why they run step by step."""
        if self.sequence_stem is None:
            return None, "no sequence op for this network"
        changed, plain = self._changed_method(), self._has_plain_layers()
        for reason, holds in (
            (f"a {self.controller} controller", self.controller not in CONTROLLERS),
            (f"{self.num_layers} layers", self.num_layers > 1),
            (f"a method {changed} other than that of fastmem", changed is not None),
            *self._of_programs(),
            ("an interface or output layer other than a plain torch.nn.Linear or ProgramMemory", not plain),
            ("a hook on all modules", bool(_has_any_global_hook())),
            ("somebody watches", self._views is not None),
            ("autocast", _autocasts(inputs.device.type)),
            ("a transform or a forward-mode derivative", _sequence.transformed()),
        ):
            if holds:
                return None, reason
        return of_a_module(self.sequence_stem, inputs)

    def _of_programs(self) -> list[tuple[str, bool]]:
        """Reasons of stored programs against the op."""
        if not isinstance(self.interface, ProgramMemory):
            return []
        return [
            ("hard programs", self.interface.hard),
            ("programs for other heads", self.interface.runs != self.interface_runs()),
            ("somebody watches its programs", self.interface.is_watched),
        ]

    def _changed_method(self) -> str | None:
        """A method of a step that somebody changed, in a subclass, a mixin, on the instance or later."""
        return next(filter(self._changes, self._of_a_step), None)

    def _changes(self, name: str) -> bool:
        return name in self.__dict__ or _definitions(type(self), name) != self._of_a_step[name]

    def _has_plain_layers(self) -> bool:
        """Whether interface and output are linear maps, and nobody hooks into them."""
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        return all(
            (type(layer) is ProgramMemory or (type(layer) is nn.Linear and layer.bias is not None))
            and "forward" not in layer.__dict__
            and not any(getattr(layer, name) for name in hooks)
            for layer in (self.interface, getattr(self.interface, "meta", self.interface), self.output)
        )

    def _check_cell(self, input: Any, state: Any) -> None:
        self._check_input(input, "[B, X]", "[X]")
        if state is not None:
            self._check_state(state, tuple(input.shape[:-1]))

    def _checked_sequences(
        self, input: Tensor | PackedSequence, state: Any, lengths: Tensor | Sequence[int] | None
    ) -> Sequences:
        batch_first = bool(self.batch_first)
        if isinstance(input, PackedSequence):
            self._check_input(input.data, "[sum of lengths, X]")
        else:
            self._check_input(input, "[B, T, X]" if batch_first else "[T, B, X]", "[T, X]")
        sequences = Sequences(input.to(self.weight_ih_l0.dtype), lengths, batch_first)
        if state is not None:
            self._check_state(state, () if sequences.unbatched else (sequences.batch_size(),))
        return sequences

    def _check_input(self, input: Tensor, *layouts: str) -> None:
        _check.tensors([("input", False)], [input])
        if input.dim() not in [layout.count(",") + 1 for layout in layouts]:
            raise ValueError(f"input: expected {' or '.join(layouts)}, got shape {list(input.shape)}")
        if input.shape[-1] != self.input_size:
            raise ValueError(
                f"input: expected input_size {self.input_size} in the last dimension, got {input.shape[-1]}"
            )
        weight = ("weight_ih_l0", self.weight_ih_l0)
        _check.dtypes(*weight, _check.STATE_DTYPES)  # half() comes after the constructor
        if _autocasts(input.device.type):
            _check.same_kind(weight, ("input", input), device_only=True)
            _check.dtypes("input", input, _check.BANK_DTYPES)
        else:
            _check.same_kind(weight, ("input", input))

    def _check_state(self, state: Any, batch: tuple[int, ...]) -> None:
        shapes = {name: (*batch, *shape) for name, shape in self._state_shapes().items()}
        _check.state("state", state, self.state_type, shapes, ("weight_ih_l0", self.weight_ih_l0))


def _definitions(cls: type, name: str) -> list[Any]:
    """All that `super()` may reach under a name, in its order."""
    return [vars(base)[name] for base in cls.__mro__ if name in vars(base)]


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it: torch.autocast raises on others, as on meta."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def parameter_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype, or the default one where it is None."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in _check.STATE_DTYPES:
        raise TypeError(f"dtype: expected {' or '.join(map(str, _check.STATE_DTYPES))}, got {dtype}")
    return dtype
