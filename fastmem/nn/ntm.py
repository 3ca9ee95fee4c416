"""The Neural Turing Machine as a module, and one step of it as another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import _register_namedtuple as register_namedtuple

from fastmem import _check, ops
from fastmem.nn import _sequence
from fastmem.nn._network import MemoryNetwork, Schedule, parameter_dtype
from fastmem.nn._sequence import mapped
from fastmem.nn._views import NTMViews, ntm_views
from fastmem.ops import _content, _forms
from fastmem.ops._sequence import configured
from fastmem.ops.ntm_step import taped_ntm_step
from fastmem.reference.ntm_step import interface_runs, interface_size

FIRST_MEMORY = 1e-6


class NTMState(NamedTuple):
    """What an NTM carries from step to step. Without a batch the B is missing everywhere."""

    memory: Tensor  # [B,N,W]
    weights: Tensor  # [B,A,N], of each head in the order of the list
    reads: Tensor  # [B,R,W]
    hidden: Tensor  # [B,LH], layer by layer; [B,0] of a feed-forward controller
    cell: Tensor  # [B,LH], layer by layer; [B,0] of a GRU or feed-forward controller

    def detach(self) -> "NTMState":
        """The same state outside the graph, for truncated backpropagation through time."""
        return mapped(Tensor.detach, self)

    def to(self, *args: Any, **kwargs: Any) -> "NTMState":
        """Every tensor through `Tensor.to`: another device or dtype."""
        return mapped(lambda tensor: tensor.to(*args, **kwargs), self)

    def reset(self, rows: Tensor | Sequence[int], initial: "NTMState") -> "NTMState":
        """A state with some rows of the batch, given by their numbers or by a bool each, as in `initial`.

        `initial` is `NTM.initial_state(batch_size)`: an NTM learns the state before the first step.
        """
        if self.memory.dim() == 2:
            raise ValueError("state: expected a batch, whose rows are to be reset, got a state without one")
        shapes = {name: part.shape for name, part in self._asdict().items()}
        _check.state("initial", initial, NTMState, shapes, ("state.memory", self.memory))
        chosen = _sequence.chosen(len(self.memory), rows, self.memory.device)
        return mapped(lambda new, old: torch.where(chosen.view(-1, *[1] * (old.dim() - 1)), new, old), initial, self)


torch.serialization.add_safe_globals([NTMState])
register_namedtuple(NTMState, serialized_type_name="fastmem.nn.NTMState")


class _NTM(MemoryNetwork[NTMViews]):
    """Parameters and step of both modules."""

    state_type = NTMState
    sequence_stem = "ntm_sequence"
    initial_hidden: Tensor
    initial_cell: Tensor
    initial_memory: Tensor

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        word_size: int,
        heads: str = "rw",
        output_size: int | None = None,
        max_shift: int = 1,
        joint_writes: bool = False,
        reversed_shift: bool = False,
        form: str = "softmax",
        sharpen_eps: float | None = None,
        norm: str = "inner",
        eps: float | None = None,
        clip: float | None = 20.0,
        random_memory: bool = False,
        controller: str = "lstm",
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {
            "input_size": input_size, "hidden_size": hidden_size, "num_slots": num_slots, "word_size": word_size,
            "num_layers": num_layers, "output_size": hidden_size if output_size is None else output_size,
        }  # fmt: skip
        sizes = {name: _check.integer(name, size) for name, size in sizes.items()}
        _check.heads(heads)
        max_shift = _check.integer("max_shift", max_shift, least=0)
        _check.clip(clip)
        _check.flags(joint_writes=joint_writes, reversed_shift=reversed_shift, random_memory=random_memory)
        dtype = parameter_dtype(dtype)
        hidden_size, num_layers, word_size = sizes["hidden_size"], sizes["num_layers"], sizes["word_size"]
        num_read_heads = heads.count("r")
        read_size = num_read_heads * word_size
        super().__init__(controller, sizes["input_size"] + read_size, hidden_size, num_layers, device, dtype)

        self.input_size, self.output_size = sizes["input_size"], sizes["output_size"]
        self.num_slots, self.word_size = sizes["num_slots"], word_size
        self.heads, self.num_read_heads, self.max_shift = heads, num_read_heads, max_shift
        self.joint_writes, self.reversed_shift = joint_writes, reversed_shift
        self.form, self.sharpen_eps = form, _forms.resolve(form, sharpen_eps, "sharpen_eps")[1]
        self.norm, self.eps = norm, _content.resolve_eps(norm, eps)
        self.clip = None if clip is None else float(clip)
        self.random_memory = random_memory

        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        vector_size = interface_size(heads, word_size, 2 * max_shift + 1)
        self.interface = nn.Linear(hidden_size, vector_size, **kind)
        self.output = nn.Linear(hidden_size + read_size, self.output_size, **kind)
        self.initial_weights = nn.Parameter(torch.empty(len(heads), self.num_slots, **kind))
        self.initial_reads = nn.Parameter(torch.empty(num_read_heads, word_size, **kind))
        for name, shape in super()._state_shapes().items():
            first = torch.empty(shape, **kind)
            if first.numel():
                setattr(self, f"initial_{name}", nn.Parameter(first))
            else:  # as a parameter it would have no gradient, for which DistributedDataParallel waits
                self.register_buffer(f"initial_{name}", first, persistent=False)
        self.register_buffer("initial_memory", torch.empty(self.num_slots, word_size, **kind))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew, and the first memory where it is random."""
        super().reset_parameters()
        nn.init.normal_(self.initial_weights)  # not all the same: equal slots would stay equal for ever
        for parameter in (self.initial_reads, self.initial_hidden, self.initial_cell):
            nn.init.normal_(parameter, std=0.05)
        if self.random_memory:
            bound = (self.num_slots + self.word_size) ** -0.5
            nn.init.uniform_(self.initial_memory, -bound, bound)
        else:
            nn.init.constant_(self.initial_memory, FIRST_MEMORY)

    def initial_state(self, batch_size: int) -> NTMState:
        """The state before the first step, learned but for the memory; differentiable."""
        batch_size = _check.integer("batch_size", batch_size, least=0)
        parts = (
            self.initial_memory, self.initial_weights.softmax(-1), self.initial_reads.tanh(), self.initial_hidden,
            self.initial_cell,
        )  # fmt: skip
        return NTMState(*(part.expand(batch_size, *part.shape) for part in parts))

    def access(self, interface: Tensor, state: NTMState, in_place: bool = False) -> NTMState:
        """All heads by an interface vector `[B, S]`; hidden and cell pass through."""
        options: tuple[Any, ...] = (
            self.heads, self.joint_writes, self.reversed_shift, self.form, self.sharpen_eps, self.clip, self.norm,
            self.eps,
        )  # fmt: skip
        if in_place:
            ops.ntm_step_(interface, *state[:3], *options)
            return state
        results = taped_ntm_step(interface, *state[:2], *options)
        if self._views is not None:
            layout = (self.heads, self.joint_writes, self.reversed_shift)
            self._views.append(ntm_views(interface, state.weights, results, *layout, self.clip, self.shares(interface)))
        return NTMState._make([*results[:-1], *state[3:]])

    def sequence_op(
        self, inputs: Tensor, parameters: list[Tensor], state: Any, step_mask: Tensor | None, projected: bool = True
    ) -> Any:
        config = configured(
            ops.NTMConfig,
            self.input_size, self.hidden_size, self.num_slots, self.word_size, self.heads, self.output.out_features,
            self.max_shift, self.controller, joint_writes=self.joint_writes, reversed_shift=self.reversed_shift,
            form=self.form, sharpen_eps=self.sharpen_eps, norm=self.norm, eps=self.eps, clip=self.clip,
            projected=projected, programs=self.program_config(),
        )  # fmt: skip
        return ops.ntm_sequence(inputs, parameters, state, config, step_mask)

    def interface_runs(self) -> tuple[tuple[int, int], ...]:
        """The heads that the interface vector speaks to, one after the other; and how wide."""
        return interface_runs(self.heads, self.word_size, 2 * self.max_shift + 1)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_slots={self.num_slots}, word_size={self.word_size}, "
            f"heads={self.heads!r}, output_size={self.output_size}, {self.num_layers} {self.controller}"
        )

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            "memory": (self.num_slots, self.word_size),
            "weights": (len(self.heads), self.num_slots),
            "reads": (self.num_read_heads, self.word_size),
            **super()._state_shapes(),
        }


class NTMCell(_NTM):
    r"""One step of an :class:`NTM`, called like :class:`torch.nn.LSTMCell`.

    Args, attributes, cost, dtype and errors as for :class:`NTM`, which has one argument more, `batch_first`. Their
    parameters have the same names: one loads the `state_dict` of the other.

    Inputs: input, state
        input `[B, X]`, or `[X]` without a batch. state: an :class:`NTMState`; None: the learned one, whose parameters
        have no gradient where a state is given (for DistributedDataParallel, `find_unused_parameters`). It is never
        written to.

    Outputs: output, state
        output `[B, Y]` or `[Y]`, and the next :class:`NTMState`, differentiable as those of the NTM.
    """

    def forward(self, input: Tensor, state: NTMState | None = None) -> tuple[Tensor, NTMState]:
        """Runs one step; see the class."""
        return self.run_cell(input, state)


class NTM(_NTM):
    r"""Neural Turing Machine, called like :class:`torch.nn.LSTM`.

    At each step the controller sees the input and the last reads, and its output drives all heads
    (:func:`fastmem.ntm_step`):

    .. math::
        h_t &= \mathrm{LSTM}([x_t; r_{t-1}]) & w_t &= \mathrm{sharpen}(\mathrm{shift}(g\, c_t + (1 - g)\, w_{t-1})) \\
        r_t &= w^r_t M & M &\leftarrow M (1 - w^w_t \otimes e_t) + w^w_t \otimes a_t \\
        y_t &= W_y [h_t; r_t] + b_y

    with content weights :math:`c` (:func:`fastmem.content_addressing`). The heads act in the order of their list, each
    complete before the next. Source: Graves et al., "Neural Turing Machines"; the order as in public code of it.

    Args:
        input_size (int): width X of the input.
        hidden_size (int): width H of the controller.
        num_slots (int): memory slots N.
        word_size (int): width W of a slot.
        heads (str): a letter for each head, r for one that reads and w for one that writes. Default: "rw".
        output_size (int, optional): width Y of the output. Default: None, `hidden_size`.
        batch_first (bool): input and output are `[B, T, .]` rather than `[T, B, .]`; the state is not affected.
            Default: False.
        max_shift (int): heads shift by up to so many slots either way. Default: 1.
        joint_writes (bool): all heads see the memory before the step, then all writes come together. Default: False.
        reversed_shift (bool): shifts are stored from the highest down, as in public code. Default: False.
        form (str), sharpen_eps (float, optional): the sharpening, see :func:`fastmem.sharpen`. Default: "softmax".
        norm (str), eps (float, optional): the cosine, see :func:`fastmem.content_addressing`. Default: "inner".
        clip (float, optional): bound of the interface vector, None for no bound. Default: 20.
        random_memory (bool): the first memory is drawn once, uniformly from :math:`\pm 1/\sqrt{N + W}`, and kept with
            the parameters; False: it is 1e-6 everywhere. Default: False.
        controller (str): "lstm", "layernorm_lstm" (see :func:`fastmem.dnc_sequence`), "gru", or "feedforward", whose
            layers are tanh(W x + b). Default: "lstm".
        num_layers (int): layers L of the controller; the heads follow the top one. Default: 1.
        device, dtype: of the parameters. float32 or float64.

    Inputs: input, state, lengths, write_schedule
        input `[T, B, X]`, `[B, T, X]` with `batch_first`, `[T, X]` without a batch, or a `PackedSequence`. state: an
        :class:`NTMState`; None: the learned one, whose parameters have a gradient of zero where a state is given. The
        state given is never written to. lengths: B integers from 1 to T in any order, for padded sequences; None: all
        are T long. write_schedule: as for :class:`DNC`.

    Outputs: output, state
        output as the input but Y wide; packed where the input is, zero past the `lengths`. state: an :class:`NTMState`
        with that of each sequence after its own last step; feeding it back in continues the sequences, and without a
        schedule, a sequence in pieces equals the whole. Both are differentiable with respect to input, parameters and
        the initial state.

    Attributes:
        weight_ih_l0 `[4H, X + RW]`, weight_hh_l0, bias_ih_l0, bias_hh_l0, and so on for each layer: the controller, as
            for :class:`DNC`.
        interface (Linear): from H to the interface vector, its fields in the order of :func:`fastmem.ntm_step`. All
            begin as those of torch.nn.Linear do, within :math:`\pm 1/\sqrt{H}`: gates are then near 1/2, and need no
            bias of their own to keep them from 0, where a head would stay where it is.
        output (Linear): from H + RW to Y.
        initial_weights `[A, N]`, drawn from a normal distribution: the first weights before a softmax.
        initial_reads `[R, W]`: the first reads before tanh. initial_hidden, initial_cell: the first state of the
            controller. initial_memory `[N, W]`: a buffer.

    Cost: a step reads and writes the memory once for each write head, B N W numbers. Where
    :func:`fastmem.ntm_sequence` takes whole sequences, training keeps about :math:`2 \sqrt{T}` memories. It
    does on a CPU, for one layer of a controller that it has (all but the GRU); elsewhere, under autocast, watched,
    hooked or changed in a subclass, sequences run step by step, and training keeps one memory for each write of a step.
    `fastmem.explain(net, input)` tells which, and why. Steps in which the memory rests cost what the controller does;
    step by step under `torch.compile`, as much as others.

    Dtype: float32, or float64 throughout. Under autocast the linear maps and the output have the lower precision, and
    the input may; the state stays float32.

    Determinism: the same call gives the same bits on the same machine, on a CPU.

    Raises:
        TypeError: for a dtype other than that of the parameters, or lengths that are no integers.
        ValueError: for sizes, devices, lengths, heads or options that do not fit.

    Example::

        net = fastmem.nn.NTM(input_size=10, hidden_size=100, num_slots=128, word_size=20, output_size=8)
        output, state = net(torch.randn(25, 3, 10))
        output, state = net(torch.randn(25, 3, 10), state.detach())
        with net.watched() as views:
            net(torch.randn(25, 3, 10))
        views[0].weights    # [25, 3, 2, 128]
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        word_size: int,
        heads: str = "rw",
        output_size: int | None = None,
        batch_first: bool = False,
        max_shift: int = 1,
        joint_writes: bool = False,
        reversed_shift: bool = False,
        form: str = "softmax",
        sharpen_eps: float | None = None,
        norm: str = "inner",
        eps: float | None = None,
        clip: float | None = 20.0,
        random_memory: bool = False,
        controller: str = "lstm",
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.flags(batch_first=batch_first)
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_slots=num_slots, word_size=word_size, heads=heads,
            output_size=output_size, max_shift=max_shift, joint_writes=joint_writes, reversed_shift=reversed_shift,
            form=form, sharpen_eps=sharpen_eps, norm=norm, eps=eps, clip=clip, random_memory=random_memory,
            controller=controller, num_layers=num_layers, device=device, dtype=dtype,
        )  # fmt: skip
        self.batch_first = batch_first

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: NTMState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        write_schedule: Schedule = None,
    ) -> tuple[Tensor | PackedSequence, NTMState]:
        """Runs sequences; see the class."""
        return self.run_sequences(input, state, lengths, write_schedule)
