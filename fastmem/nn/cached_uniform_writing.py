"""Cached Uniform Writing: a network with a memory that writes what it attends to of the states since the last write."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from fastmem import _check, ops
from fastmem.nn._network import MemoryNetwork
from fastmem.nn._sequence import mapped, of_rows
from fastmem.nn.nutm import NUTM
from fastmem.nn.write_schedule import WriteSchedule

DEVIATION = 0.1  # of the weights of the attention at first


class CachedUniformWriting(nn.Module):
    r"""A network that writes every L steps, and then starts from all its states since the last write.

    The hidden states of the controller after the last L steps are kept in a cache, :math:`d_1..d_L`. At a write step t
    the controller starts from a mixture of them in place of :math:`h_{t-1}` (the cell of an LSTM stays), then the
    memory is written and read; at the steps between it rests:

    .. math::
        e_j = v^\top \tanh(W h_{t-1} + U d_j + V r_{t-1}), \qquad
        h_{t-1} \leftarrow \sum_j \mathrm{softmax}_j(e)\, d_j

    (:func:`fastmem.cached_attention`). The cache of the first write begins with the initial state. Source: Le et al.
    2019, "Learning to Remember More with Less Memorization", by its equations; the code published with it attends to
    the newest entry alone.

    Args:
        net (Module): a :class:`DNC`, :class:`NTM`, :class:`LRUA`, or :class:`NUTM`, of which the core is taken; with
            one layer of a recurrent controller. It stays usable by itself, with the same parameters: for an answer that
            is written densely, call `net.net(input, state)`.
        interval (int, optional): L. Default: None, :math:`\lfloor T / (N + 1) \rfloor` of each sequence, at least 1.
        attention_size (int): width A of the attention. Default: 16.

    Inputs, Outputs: as for `net`: `input, state, lengths` -> `output, state`; no packed sequences. Sequences that end
    before a write step never come to it. The cache is not part of the state: each call begins with an empty one.

    Attributes:
        net (Module): the network, or core; input_size, hidden_size, output_size and batch_first are its own.
        schedule (WriteSchedule): when it writes.
        query_hidden (Linear): W, from H to A. query_reads (Linear): V, from RW to A. key (Linear): U, from H to A.
        score `[A]`: v. All drawn from a normal distribution of deviation 0.1, as published; none has a bias.

    Cost: the memory acts at every L-th step, and at each there is an attention over L entries. What lies between two
    writes is a call of its own of the op on whole sequences, where `net` has one: it packs the weights and adds to
    their gradients anew, and training keeps a link for each. Where both are small that outweighs what is saved: with 4
    slots and L = 3 training takes twice as long as with a write in every step, with 256 slots and L = 10 half as long.
    There are as many calls as steps in which any sequence of the batch is written: sequences of many lengths want an
    `interval`. `torch.compile` traces each call anew for every T and lengths, and is seldom worth it.

    Raises:
        TypeError: for a net without a memory.
        ValueError: for sizes that do not fit, or a controller that is feed-forward or has several layers.
        NotImplementedError: for a net with a step of its own.

    Example::

        net = fastmem.nn.CachedUniformWriting(fastmem.nn.DNC(10, 95, num_slots=4, word_size=64), interval=5)
        output, state = net(torch.randn(51, 64, 10))
        answer, state = net.net(torch.zeros(51, 64, 10), state)
    """

    def __init__(self, net: MemoryNetwork[Any] | NUTM, interval: int | None = None, attention_size: int = 16) -> None:
        super().__init__()
        net = net.core if isinstance(net, NUTM) else net
        if not isinstance(net, MemoryNetwork) or net.batch_first is None:
            raise TypeError(f"net: expected a DNC, NTM, LRUA or NUTM, got {type(net).__name__}")
        if net.controller == "feedforward" or net.num_layers != 1:
            raise ValueError(
                f"net: expected one layer of a recurrent controller, got {net.num_layers} of {net.controller}"
            )
        if net._changes("step"):
            raise NotImplementedError(
                "net: expected the step of fastmem, as another knows no steps without a write; change top_step or"
                " project instead"
            )
        self.net = net
        self.schedule = WriteSchedule("uniform", interval=interval)
        self.input_size, self.hidden_size, self.output_size = net.input_size, net.hidden_size, net.output_size
        attention_size = _check.integer("attention_size", attention_size)
        like = net.weight_ih_l0
        kind: dict[str, Any] = {"bias": False, "device": like.device, "dtype": like.dtype}
        self.query_hidden = nn.Linear(net.hidden_size, attention_size, **kind)
        self.query_reads = nn.Linear(net.output.in_features - net.hidden_size, attention_size, **kind)
        self.key = nn.Linear(net.hidden_size, attention_size, **kind)
        self.score = nn.Parameter(like.new_empty(attention_size))
        self.reset_attention()

    def reset_attention(self) -> None:
        """Draws the parameters of the attention anew, and none of the net."""
        for layer in (self.query_hidden, self.query_reads, self.key):
            nn.init.normal_(layer.weight, std=DEVIATION)
        nn.init.normal_(self.score, std=DEVIATION)

    @property
    def batch_first(self) -> bool:
        """Whether input and output have the batch first, as the net has them."""
        return bool(self.net.batch_first)

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first step, that of the net."""
        return self.net.initial_state(batch_size)

    def watched(self) -> AbstractContextManager[list[Any]]:
        """Every write inside appends what it looked at to the list, the views of the net's steps."""
        return self.net.watched()

    def served(
        self, input: Tensor, state: Any = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[str, str]:
        """Whether the steps between two writes run in one op, and why; for :func:`fastmem.explain`."""
        backend, reason = self.net.served(input, state, lengths)
        return backend, f"{reason}; a call from each write to the next"

    def attend(self, cache: Tensor, state: Any, mask: Tensor | None = None) -> Tensor:
        """The mixture `[B, H]` of the hidden states in a cache `[L, B, H]`, of those in the mask `[B, L]`."""
        query = self.query_hidden(state.hidden) + self.query_reads(state.reads.flatten(1))
        keys, entries = self.key(cache).transpose(0, 1), cache.transpose(0, 1)
        return ops.cached_attention(query, keys, entries, self.score, mask)[0]

    def forward(
        self, input: Tensor, state: Any = None, lengths: Tensor | Sequence[int] | None = None
    ) -> tuple[Any, Any]:
        """Runs sequences; see the class."""
        net = self.net
        _check.tensors([("input", False)], [input])
        sequences = net._checked_sequences(input, state, lengths)
        inputs, steps, batch = sequences.whole(), *sequences.sizes()
        state = net.initial_state(batch) if state is None else net.given_state(sequences, state)
        step_mask = sequences.step_mask(net.writes(sequences, self.schedule))
        ends = sequences.lengths_of()
        own_steps = [steps] * batch if ends is None else ends.tolist()
        intervals = [self.schedule.interval_of(count, net.num_slots) for count in own_steps]
        writes = {
            step
            for count, interval in set(zip(own_steps, intervals, strict=True))
            for step in range(interval - 1, count, interval)
        }
        if not writes and torch.is_grad_enabled():
            state = self._with_attention(net.taking_part(state))

        longest = max([1, *intervals])
        tops, cache = [], state.hidden.unsqueeze(0)
        begins = sorted({0, *writes})
        for begin, end in zip(begins, [*begins[1:], steps], strict=True):
            if begin in writes:
                mixed = self.attend(cache, state, _newest(len(cache), intervals, cache.device))
                state = state._replace(hidden=of_rows(step_mask[begin] == 7, mixed, state.hidden))
            part, state = net.run_tops(inputs[begin:end], state, step_mask[begin:end])
            hiddens = part[..., : net.hidden_size]
            cache = (hiddens if len(part) >= longest else torch.cat([cache, hiddens]))[-longest:]
            tops.append(part)
        outputs = net.project(torch.cat(tops))
        if ends is not None:
            outputs = outputs.masked_fill((step_mask == 0).unsqueeze(-1).to(outputs.device), 0.0)
        return sequences.laid_out(outputs), sequences.as_given(state)

    def _with_attention(self, state: Any) -> Any:
        """The state, with a gradient of zero for the attention, as of :meth:`MemoryNetwork.taking_part`."""
        none = mapped(lambda tensor: tensor[:0], state)
        return state._replace(hidden=torch.cat([state.hidden, self.attend(none.hidden.unsqueeze(0), none)]))


def _newest(entries: int, intervals: list[int], device: torch.device) -> Tensor | None:
    """Which entries of a cache are among as many of the newest as the interval of a sample, `[B, L]`; None: all."""
    if min(intervals) >= entries:
        return None
    age = torch.arange(entries, 0, -1, device="cpu")
    return (age <= torch.tensor(intervals, device="cpu").unsqueeze(1)).to(device)
