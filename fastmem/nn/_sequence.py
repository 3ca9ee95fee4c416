"""Sequences cut into time steps and put together again, for modules called like torch.nn.LSTM.

A state is a named tuple of tensors with the batch first.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from fastmem import _check

State = TypeVar("State", bound=tuple[Tensor, ...])
Step = Callable[[Tensor, State], tuple[Tensor, State]]


def mapped(function: Callable[..., Tensor], *states: State) -> State:
    """A state made of `function` of each field."""
    make: Any = type(states[0])
    return make(*map(function, *states))


def chosen(batch: int, rows: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """Rows of a batch, given by their numbers or by a bool each, as a bool each."""
    rows = _check.integers("rows", rows, or_bools=True)
    if rows.dtype == torch.bool:
        if rows.shape != (batch,):
            raise ValueError(f"rows: expected shape [{batch}] of bools, got {list(rows.shape)}")
        return rows.to(device)
    if rows.dim() != 1:
        raise ValueError(f"rows: expected one dimension, got shape {list(rows.shape)}")
    # A compiler has no numbers to look at; indexing checks them then.
    if not torch.compiler.is_compiling() and not all(-batch <= row < batch for row in rows.tolist()):
        raise ValueError(f"rows: expected numbers from {-batch} to {batch - 1}, got {rows.tolist()}")
    mask = torch.zeros(batch, dtype=torch.bool, device=device)
    mask[rows.to(device)] = True
    return mask


def reset(state: State, rows: Tensor | Sequence[int]) -> State:
    """The state with zeros in some rows of the batch."""
    mask = chosen(len(state[0]), rows, state[0].device)
    return mapped(lambda tensor: tensor.masked_fill(mask.view(-1, *[1] * (tensor.dim() - 1)), 0), state)


def of_rows(rows: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` in the rows `[B]` that are chosen, `old` in the others."""
    return torch.where(rows.to(new.device).view(-1, *[1] * (new.dim() - 1)), new, old)


def with_zeros(views: Sequence[Any], rows: Sequence[int]) -> list[Any]:
    """Views of steps, with zeros for those that are None; of which one at least is not."""
    like = next(view for view in views if view is not None)
    return [
        mapped(lambda tensor, n=count: tensor.new_zeros(n, *tensor.shape[1:]), like) if view is None else view
        for view, count in zip(views, rows, strict=True)
    ]


def may_write() -> bool:
    """Whether a loop may keep its state in buffers of its own: nothing differentiates, transforms or compiles it."""
    return not (torch.is_grad_enabled() or torch.compiler.is_compiling() or transformed())


def run(step: Step[State], inputs: Iterable[Tensor], state: State) -> tuple[list[Tensor], State]:
    """The outputs of each step `[n, ...]`, and the state of every row after its own last step.

    The rows of a batch end from the last to the first: each step takes the first n rows, and n never grows.
    """
    outputs, ended = [], []
    for step_input in inputs:
        rows = step_input.shape[0]  # len() would fix it in an exported program
        if rows < state[0].shape[0]:
            ended.append(mapped(lambda tensor, n=rows: tensor[n:], state))
            state = mapped(lambda tensor, n=rows: tensor[:n], state)
        output, state = step(step_input, state)
        outputs.append(output)
    return outputs, mapped(lambda *parts: torch.cat(parts), state, *reversed(ended)) if ended else state


def transformed() -> bool:
    """Whether a transform of torch.func or a forward-mode derivative is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


class Sequences:
    """The input of one call: a tensor with or without a batch, padded sequences and their lengths, or packed ones."""

    def __init__(
        self, input: Tensor | PackedSequence, lengths: Tensor | Sequence[int] | None = None, batch_first: bool = False
    ) -> None:
        self.given = input if isinstance(input, PackedSequence) else None
        self.tensor = input if isinstance(input, Tensor) else input.data
        self.unbatched = self.given is None and self.tensor.dim() == 2
        self.batch_first = batch_first and not self.unbatched
        self.time_dim = int(self.batch_first)
        self.lengths = None if lengths is None else self._checked(lengths)
        self._packed = self.given

    @property
    def packed(self) -> PackedSequence | None:
        """The input as the steps take it where sequences end one after the other."""
        if self._packed is None and self.lengths is not None and len(self.lengths):
            self._packed = pack_padded_sequence(self.tensor, self.lengths, self.batch_first, enforce_sorted=False)
        return self._packed

    def batch_size(self) -> int:
        if self.given is not None:
            return int(self.given.batch_sizes[0])
        return 1 if self.unbatched else self.tensor.shape[1 - self.time_dim]

    def sizes(self) -> tuple[int, int]:
        """T of the longest sequence, and B."""
        if self.given is not None:
            return len(self.given.batch_sizes), self.batch_size()
        return self.tensor.shape[self.time_dim], self.batch_size()

    def lengths_of(self) -> Tensor | None:
        """The length of each sequence, `[B]` on the CPU; None where all are T long."""
        if self.given is None:
            return self.lengths
        sizes, order = self.given.batch_sizes, self.given.unsorted_indices
        lengths = (sizes.unsqueeze(1) > torch.arange(self.batch_size(), device="cpu")).sum(0)
        return lengths if order is None else lengths[order.cpu()]

    def of_steps(self, rows: Tensor | None) -> list[Tensor]:
        """Something of each row and step `[T, B]`, as the rows of `steps` lie."""
        if rows is None:
            return []
        if self.packed is None:
            return [*rows]
        order = self.packed.sorted_indices
        rows = rows if order is None else rows[:, order.cpu()]
        return [row[:count] for row, count in zip(rows, self.packed.batch_sizes.tolist(), strict=False)]

    def steps(self) -> Sequence[Tensor]:
        """The input of each step, `[n, X]` as `run` takes it."""
        if self.packed is not None:
            return self.packed.data.split(self.packed.batch_sizes.tolist())
        return (self.tensor.unsqueeze(1) if self.unbatched else self.tensor).unbind(self.time_dim)

    def whole(self) -> Tensor:
        """The input `[T, B, X]`, padded."""
        if self.given is not None:
            return pad_packed_sequence(self.given)[0]
        if self.unbatched:
            return self.tensor.unsqueeze(1)
        return self.tensor.transpose(0, 1) if self.batch_first else self.tensor

    def step_mask(self, writes: Tensor | None = None) -> Tensor:
        """As the ops take it, `[T, B]` on the CPU: 7, but 1 where `writes` is false, and 0 past an end.

        `writes`: bools `[T, B]` on the CPU; None: true in all.
        """
        writes = torch.ones(self.sizes(), dtype=torch.bool, device="cpu") if writes is None else writes
        mask, lengths = (1 + 6 * writes).to(torch.uint8), self.lengths_of()
        if lengths is None:
            return mask
        return mask.masked_fill(torch.arange(len(mask), device="cpu").unsqueeze(1) >= lengths, 0)

    def laid_out(self, outputs: Tensor) -> Tensor | PackedSequence:
        """Outputs `[T, B, Y]` laid out as the input."""
        if self.given is not None:
            batch_sizes, order, _ = self.given[1:]
            outputs = outputs if order is None else outputs.index_select(1, order)
            steps = [step[:rows] for step, rows in zip(outputs, batch_sizes.tolist(), strict=True)]
            return self._together(steps)
        if self.unbatched:
            return outputs.squeeze(1)
        return outputs.transpose(0, 1) if self.batch_first else outputs

    def with_batch(self, state: State) -> State:
        """The caller's state with a batch."""
        return mapped(lambda tensor: tensor.unsqueeze(0), state) if self.unbatched else state

    def as_given(self, state: State) -> State:
        """`with_batch` undone."""
        return mapped(lambda tensor: tensor.squeeze(0), state) if self.unbatched else state

    def entering(self, state: State) -> State:
        """The rows of a state in the order of the steps."""
        return _ordered(state, None if self.packed is None else self.packed.sorted_indices)

    def leaving(self, state: State) -> State:
        """`entering` undone."""
        return _ordered(state, None if self.packed is None else self.packed.unsorted_indices)

    def joined(self, outputs: list[Tensor]) -> Tensor | PackedSequence:
        """The outputs of all steps, of which there is one at least, laid out as the input."""
        return self._together(outputs) if self.given is not None else self.padded(outputs, self.batch_first)

    def padded(self, steps: list[Tensor], batch_first: bool = False) -> Tensor:
        """What the steps gave as `[T, B, ...]`, zero where a sequence has ended; `[T, ...]` without a batch."""
        if self.packed is None:
            together = torch.stack(steps, int(batch_first))
            return together.squeeze(1) if self.unbatched else together
        length = None if self.given is not None else self.tensor.shape[self.time_dim]
        return pad_packed_sequence(self._together(steps), batch_first, total_length=length)[0]

    def _together(self, steps: list[Tensor]) -> PackedSequence:
        assert self.packed is not None
        return PackedSequence(torch.cat(steps), *self.packed[1:])

    def _checked(self, lengths: Tensor | Sequence[int]) -> Tensor:
        if self.given is not None or self.unbatched:
            given = "a PackedSequence" if self.given is not None else "an input without a batch"
            raise ValueError(f"lengths: expected None, as the input is {given}")
        lengths = _check.integers("lengths", lengths).cpu()
        batch, steps = self.tensor.shape[1 - self.time_dim], self.tensor.shape[self.time_dim]
        if lengths.shape != (batch,):
            raise ValueError(f"lengths: expected shape [{batch}], got {list(lengths.shape)}")
        if batch and not 1 <= lengths.min() <= lengths.max() <= steps:
            raise ValueError(f"lengths: expected numbers from 1 to {steps}, got {lengths.tolist()}")
        return lengths


def _ordered(state: State, order: Tensor | None) -> State:
    return state if order is None else mapped(lambda tensor: tensor.index_select(0, order), state)
