"""A network that writes where it read last or to the least recently used slots, and one step of it as another."""

from collections.abc import Sequence
from math import inf, prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import _register_namedtuple as register_namedtuple

from fastmem import _check, ops
from fastmem.nn import _sequence
from fastmem.nn._network import MemoryNetwork, Schedule, parameter_dtype
from fastmem.nn._sequence import mapped
from fastmem.nn._views import LRUAViews
from fastmem.ops import _content
from fastmem.reference._interface import cut, softplus

FIRST_MEMORY = 1e-6


class LRUAState(NamedTuple):
    """What an LRUA carries from step to step. Without a batch the B is missing everywhere."""

    memory: Tensor  # [B,N,W]
    usage: Tensor  # [B,N]
    read_weights: Tensor  # [B,R,N]
    reads: Tensor  # [B,R,W]
    hidden: Tensor  # [B,LH], layer by layer; [B,0] of a feed-forward controller
    cell: Tensor  # [B,LH], layer by layer; [B,0] of a GRU or feed-forward controller

    def detach(self) -> "LRUAState":
        """The same state outside the graph, for truncated backpropagation through time."""
        return mapped(Tensor.detach, self)

    def to(self, *args: Any, **kwargs: Any) -> "LRUAState":
        """Every tensor through `Tensor.to`: another device or dtype."""
        return mapped(lambda tensor: tensor.to(*args, **kwargs), self)

    def reset(self, rows: Tensor | Sequence[int]) -> "LRUAState":
        """A state with some rows of the batch as before the first step, given by their numbers or by a bool each."""
        if self.usage.dim() == 1:
            raise ValueError("state: expected a batch, whose rows are to be reset, got a state without one")
        chosen = _sequence.chosen(len(self.usage), rows, self.usage.device)
        memory = self.memory.masked_fill(chosen.view(-1, 1, 1), FIRST_MEMORY)
        return _sequence.reset(self, chosen)._replace(memory=memory)


torch.serialization.add_safe_globals([LRUAState])
register_namedtuple(LRUAState, serialized_type_name="fastmem.nn.LRUAState")


class _LRUA(MemoryNetwork[LRUAViews]):
    """Parameters and step of both modules."""

    state_type = LRUAState

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        word_size: int,
        num_read_heads: int = 1,
        output_size: int | None = None,
        decay: float = 0.95,
        strengths: bool = False,
        norm: str = "inner",
        eps: float | None = None,
        clip: float | None = 20.0,
        controller: str = "lstm",
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {
            "input_size": input_size, "hidden_size": hidden_size, "num_slots": num_slots, "word_size": word_size,
            "num_read_heads": num_read_heads, "num_layers": num_layers,
            "output_size": hidden_size if output_size is None else output_size,
        }  # fmt: skip
        sizes = {name: _check.integer(name, size) for name, size in sizes.items()}
        slots, word, heads = sizes["num_slots"], sizes["word_size"], sizes["num_read_heads"]
        if heads > slots:
            raise ValueError(f"num_read_heads: expected at most num_slots, {slots}, got {heads}")
        if not (_check.is_number(decay) and 0 <= decay <= 1):
            raise ValueError(f"decay: expected a number in [0, 1], got {decay!r}")
        _check.clip(clip)
        _check.flags(strengths=strengths)
        dtype = parameter_dtype(dtype)
        hidden_size, num_layers = sizes["hidden_size"], sizes["num_layers"]
        super().__init__(controller, sizes["input_size"] + heads * word, hidden_size, num_layers, device, dtype)

        self.input_size, self.output_size = sizes["input_size"], sizes["output_size"]
        self.num_slots, self.word_size, self.num_read_heads = slots, word, heads
        self.decay, self.strengths = float(decay), strengths
        self.norm, self.eps = norm, _content.resolve_eps(norm, eps)
        self.clip = None if clip is None else float(clip)

        vector_size = sum(map(prod, self._interface_shapes().values()))
        self.interface = nn.Linear(hidden_size, vector_size, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_size + heads * word, self.output_size, device=device, dtype=dtype)
        self.reset_parameters()

    def initial_state(self, batch_size: int) -> LRUAState:
        """The state before the first step: zeros, but a memory of 1e-6."""
        batch_size = _check.integer("batch_size", batch_size, least=0)
        zeros = self.weight_ih_l0.new_zeros
        state = LRUAState(**{name: zeros(batch_size, *shape) for name, shape in self._state_shapes().items()})
        return state._replace(memory=torch.full_like(state.memory, FIRST_MEMORY))

    def access(self, interface: Tensor, state: LRUAState, in_place: bool = False) -> LRUAState:
        """One write and one read of the memory by an interface vector `[B, S]`; hidden and cell pass through."""
        bound = inf if self.clip is None else self.clip
        fields = cut(interface.clamp(-bound, bound), self._interface_shapes())
        keys, gates = fields["keys"], fields["write_gates"].sigmoid()
        strengths = 1 + softplus(fields["strengths"]) if self.strengths else torch.ones_like(gates)

        # A choice has no gradient; the lower of two slots used alike comes first.
        order = state.usage.detach().argsort(dim=-1, stable=True)[:, : self.num_read_heads]
        slots = torch.arange(self.num_slots, device=order.device)
        least_used = (order.unsqueeze(-1) == slots).to(keys.dtype)
        write_weights = torch.lerp(least_used, state.read_weights, gates.unsqueeze(-1))
        write = write_weights, torch.zeros_like(keys), keys, 1 - least_used[:, 0]
        if in_place:
            memory = state.memory
            ops.memory_write_(memory, *write)
        else:
            memory = ops.memory_write(state.memory, *write)
        read_weights = ops.content_addressing(memory, keys, strengths, norm=self.norm, eps=self.eps)
        reads = ops.weighted_read(memory, read_weights)
        usage = self.decay * state.usage + (read_weights + write_weights).sum(1)
        if self._views is not None:
            seen = usage, least_used, write_weights, read_weights, gates, strengths, keys, reads, self.shares(interface)
            self._views.append(mapped(Tensor.detach, LRUAViews(*seen)))
        return LRUAState(memory, usage, read_weights, reads, state.hidden, state.cell)

    def interface_runs(self) -> tuple[tuple[int, int], ...]:
        """The heads that the interface vector speaks to, field by field; and how wide."""
        return tuple((head, prod(shape[1:])) for shape in self._interface_shapes().values() for head in range(shape[0]))

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_slots={self.num_slots}, word_size={self.word_size}, "
            f"num_read_heads={self.num_read_heads}, output_size={self.output_size}, "
            f"{self.num_layers} {self.controller}{', strengths' if self.strengths else ''}"
        )

    def _interface_shapes(self) -> dict[str, tuple[int, ...]]:
        heads = (self.num_read_heads,)
        shapes = {"keys": (*heads, self.word_size), "write_gates": heads}
        return {**shapes, "strengths": heads} if self.strengths else shapes

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "memory": (self.num_slots, self.word_size),
            "usage": (self.num_slots,),
            "read_weights": (self.num_read_heads, self.num_slots),
            "reads": (self.num_read_heads, self.word_size),
            **super()._state_shapes(),
        }


class LRUACell(_LRUA):
    r"""One step of an :class:`LRUA`, called like :class:`torch.nn.LSTMCell`.

    Args, attributes, cost, dtype and errors as for :class:`LRUA`, which has one argument more, `batch_first`. Their
    parameters have the same names: one loads the `state_dict` of the other.

    Inputs: input, state
        input `[B, X]`, or `[X]` without a batch. state: an :class:`LRUAState`; None: that of `initial_state`. It is
        never written to.

    Outputs: output, state
        output `[B, Y]` or `[Y]`, and the next :class:`LRUAState`, differentiable as those of the LRUA.
    """

    def forward(self, input: Tensor, state: LRUAState | None = None) -> tuple[Tensor, LRUAState]:
        """Runs one step; see the class."""
        return self.run_cell(input, state)


class LRUA(_LRUA):
    r"""Memory-augmented network with least recently used access, called like :class:`torch.nn.LSTM`.

    At each step the controller sees the input and the last reads. Each head i then writes its key, by a gate between
    where it read last and the i-th least used slot, and reads by the same key:

    .. math::
        h_t &= \mathrm{LSTM}([x_t; r_{t-1}]) &
        w^w_{t,i} &= \sigma(\alpha_i)\, w^r_{t-1,i} + (1 - \sigma(\alpha_i))\, w^{lu}_{t-1,i} \\
        M_t &= \psi_t M_{t-1} + \textstyle\sum_i w^w_{t,i} \otimes k_{t,i} &
        w^r_{t,i} &= \mathrm{softmax}(\cos(k_{t,i}, M_t)), \qquad r_{t,i} = w^r_{t,i} M_t \\
        w^u_t &= \gamma\, w^u_{t-1} + \textstyle\sum_i (w^r_{t,i} + w^w_{t,i}) & y_t &= W_y [h_t; r_t] + b_y

    The weights :math:`w^{lu}_{t-1,i}` are 1 at the slot with the i-th smallest usage :math:`w^u_{t-1}`, the lower of
    two that are used alike, and have no gradient; :math:`\psi_t` is 0 at the least used slot of all, which is wiped
    before the write, and 1 elsewhere. Source: Santoro et al. 2016, "Meta-Learning with Memory-Augmented Neural
    Networks". That the i-th head goes with the i-th slot, and that of the R least used slots only the first is wiped,
    is as in public code of it; there too the state begins with a memory of 1e-6, but usage and read weights with 1 at
    one slot. Ours are zeros at first, a gate for each head, the bound `clip`, and the option `strengths`.

    The published softmax is of the cosines alone, which lie in [-1, 1]: no slot gets more than e^2 times the weight of
    another, and over many slots all reads are near the mean of the memory. With `strengths` each head has a strength of
    at least 1 for its cosine, as a :class:`DNC` does, and can read one slot.

    Args:
        input_size (int): width X of the input.
        hidden_size (int): width H of the controller.
        num_slots (int): memory slots N.
        word_size (int): width W of a slot.
        num_read_heads (int): R, at most N. Default: 1.
        output_size (int, optional): width Y of the output. Default: None, `hidden_size`.
        batch_first (bool): input and output are `[B, T, .]` rather than `[T, B, .]`; the state is not affected.
            Default: False.
        decay (float): share :math:`\gamma` of the usage that a step keeps, in [0, 1]. Default: 0.95.
        strengths (bool): the cosines have strengths, 1 + softplus. Default: False, as published.
        norm (str), eps (float, optional): the cosine, see :func:`fastmem.content_addressing`. Default: "inner".
        clip (float, optional): bound of the interface vector, None for no bound. Default: 20.
        controller (str): "lstm", "layernorm_lstm" (see :func:`fastmem.dnc_sequence`), "gru", or "feedforward", whose
            layers are tanh(W x + b). Default: "lstm".
        num_layers (int): layers L of the controller; the memory follows the top one. Default: 1.
        device, dtype: of the parameters. float32 or float64.

    Inputs: input, state, lengths, write_schedule
        input `[T, B, X]`, `[B, T, X]` with `batch_first`, `[T, X]` without a batch, or a `PackedSequence`. state: an
        :class:`LRUAState`; None: that of `initial_state`. The state given is never written to. lengths: B integers from
        1 to T in any order, for padded sequences; None: all are T long. write_schedule: as for :class:`DNC`.

    Outputs: output, state
        output as the input but Y wide; packed where the input is, zero past the `lengths`. state: an :class:`LRUAState`
        with that of each sequence after its own last step; feeding it back in continues the sequences, and without a
        schedule, a sequence in pieces equals the whole. Both are differentiable with respect to input, parameters and
        the initial state; the usage reaches the output through choices alone, and has no gradient from it.

    Attributes:
        weight_ih_l0 `[4H, X + RW]`, weight_hh_l0, bias_ih_l0, bias_hh_l0, and so on for each layer: the controller, as
            for :class:`DNC`.
        interface (Linear): from H to the interface vector: keys [R,W], gates :math:`\alpha` [R], and with `strengths`
            these [R], before sigmoid and 1 + softplus.
        output (Linear): from H + RW to Y.

    Cost: a step reads the memory three times and writes it once, B N W numbers each, and sorts the usage. There is no
    op for whole sequences: they run step by step, and training keeps one memory a step.

    Dtype: float32, or float64 throughout. Under autocast the linear maps and the output have the lower precision, and
    the input may; the state stays float32.

    Ties: slots that nothing was written to are used alike but for roundings, which may decide between them; the states
    of two backends may then hold the same in another order of slots, and their outputs agree.

    Determinism: the same call gives the same bits on the same machine, on a CPU.

    Raises:
        TypeError: for a dtype other than that of the parameters, or lengths that are no integers.
        ValueError: for sizes, devices, lengths or options that do not fit.

    Example::

        net = fastmem.nn.LRUA(input_size=25, hidden_size=200, num_slots=128, word_size=40, num_read_heads=4)
        output, state = net(torch.randn(50, 16, 25))
        with net.watched() as views:
            net(torch.randn(50, 16, 25))
        views[0].write_weights    # [50, 16, 4, 128]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        word_size: int,
        num_read_heads: int = 1,
        output_size: int | None = None,
        batch_first: bool = False,
        decay: float = 0.95,
        strengths: bool = False,
        norm: str = "inner",
        eps: float | None = None,
        clip: float | None = 20.0,
        controller: str = "lstm",
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.flags(batch_first=batch_first)
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_slots=num_slots, word_size=word_size,
            num_read_heads=num_read_heads, output_size=output_size, decay=decay, strengths=strengths, norm=norm,
            eps=eps, clip=clip, controller=controller, num_layers=num_layers, device=device, dtype=dtype,
        )  # fmt: skip
        self.batch_first = batch_first

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: LRUAState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        write_schedule: Schedule = None,
    ) -> tuple[Tensor | PackedSequence, LRUAState]:
        """Runs sequences; see the class."""
        return self.run_sequences(input, state, lengths, write_schedule)
