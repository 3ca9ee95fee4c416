"""What the modules with a memory share: sizes, checks of input and state, one step and whole sequences."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastmem import _check
from fastmem.nn import _sequence
from fastmem.nn._controller import Controller
from fastmem.nn._sequence import Sequences, mapped

Views = TypeVar("Views", bound=tuple[Tensor, ...])  # what a module saw, a named tuple


class MemoryNetwork(Controller, ABC, Generic[Views]):
    """A controller with a memory behind it. A module derives from this, and gives the type and shapes of its state."""

    _views: list[Views] | None = None  # of the steps done while somebody watches; `access` appends them
    state_type: type[Any]
    input_size: int
    output_size: int
    interface: nn.Linear  # from the top of the controller to the interface vector
    output: nn.Linear  # from the top of the controller and the reads to the output

    @abstractmethod
    def initial_state(self, batch_size: int) -> Any:
        """The state before the first step."""

    @abstractmethod
    def access(self, interface: Tensor, state: Any, in_place: bool = False) -> Any:
        """The memory's part of a step, by an interface vector `[B, S]`; hidden and cell pass through."""

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
            self._views = before

    def __getstate__(self) -> dict[str, Any]:
        """What copies and pickles take: not that somebody watches, nor what was seen."""
        return {name: value for name, value in self.__dict__.items() if name != "_views"}

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        super().reset_parameters()
        self.interface.reset_parameters()
        self.output.reset_parameters()

    def step(self, input: Tensor, state: Any, in_place: bool = False) -> tuple[Tensor, Any]:
        """One step: input `[B, X]` and a batched state -> output `[B, Y]` and the next state. Arguments unchecked.

        `in_place`: the new memory overwrites that of the state, without a gradient.
        """
        seen = torch.cat([input, state.reads.flatten(1)], -1)
        top, hidden, cell = self.control(seen, state.hidden, state.cell)
        interface = self.interface(top)
        # Autocast is for the linear maps: the memory and all of the state keep the dtype of the parameters.
        with _no_autocast(input.device.type):
            top, hidden, cell, interface = (t.to(self.weight_ih_l0.dtype) for t in (top, hidden, cell, interface))
            state = self.access(interface, state._replace(hidden=hidden, cell=cell), in_place)
        return self.output(torch.cat([top, state.reads.flatten(1)], -1)), state

    def run_cell(self, input: Tensor, state: Any) -> tuple[Tensor, Any]:
        """One step of checked arguments, with or without a batch."""
        self._check_input(input, "[B, X]", "[X]")
        unbatched = input.dim() == 1
        if state is not None:
            self._check_state(state, tuple(input.shape[:-1]))
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
        batch_first: bool,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """Sequences of checked arguments: the output, laid out as the input, and the state after the last step."""
        if isinstance(input, PackedSequence):
            self._check_input(input.data, "[sum of lengths, X]")
        else:
            self._check_input(input, "[B, T, X]" if batch_first else "[T, B, X]", "[T, X]")
        sequences = Sequences(input.to(self.weight_ih_l0.dtype), lengths, batch_first)
        if state is None:
            state = self.initial_state(sequences.batch_size())
        else:
            self._check_state(state, () if sequences.unbatched else (sequences.batch_size(),))
            state = sequences.entering(state)
            if torch.is_grad_enabled():
                # What is learned of the first state takes part in a batch of none, and gets a gradient of zero:
                # DistributedDataParallel waits for one of every parameter.
                state = mapped(
                    lambda given, first: torch.cat([given, first]) if first.requires_grad else given,
                    state,
                    self.initial_state(0),
                )
        in_place = self._views is None and _sequence.may_write()
        if in_place:
            state = mapped(lambda tensor: tensor.clone(memory_format=torch.contiguous_format), state)
        # The steps show in a list of their own: one that raises leaves nothing in the caller's.
        with nullcontext() if self._views is None else self.watched() as seen:
            outputs, state = _sequence.run(lambda x, s: self.step(x, s, in_place), sequences.steps(), state)
        if self._views is not None and seen:
            self._views.append(mapped(lambda *steps: sequences.padded(list(steps)), *seen))
        if outputs:
            output = sequences.joined(outputs)
        else:  # without a step; of the dtype that a step would have under autocast
            output = self.output(sequences.tensor.new_empty(*sequences.tensor.shape[:-1], self.output.in_features))
        return output, sequences.leaving(state)

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
        device = input.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            _check.same_kind(weight, ("input", input), device_only=True)
            _check.dtypes("input", input, _check.BANK_DTYPES)
        else:
            _check.same_kind(weight, ("input", input))

    def _check_state(self, state: Any, batch: tuple[int, ...]) -> None:
        shapes = {name: (*batch, *shape) for name, shape in self._state_shapes().items()}
        _check.state("state", state, self.state_type, shapes, ("weight_ih_l0", self.weight_ih_l0))


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it: torch.autocast raises on others, as on meta."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def parameter_dtype(dtype: torch.dtype | None) -> torch.dtype:
    """The dtype, or the default one where it is None."""
    dtype = torch.get_default_dtype() if dtype is None else dtype
    if dtype not in _check.STATE_DTYPES:
        raise TypeError(f"dtype: expected {' or '.join(map(str, _check.STATE_DTYPES))}, got {dtype}")
    return dtype
