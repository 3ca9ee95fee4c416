"""The differentiable neural computer as a module."""

import operator
from contextlib import AbstractContextManager, nullcontext
from math import prod
from numbers import Real
from typing import Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.utils.rnn import PackedSequence

from fastmem import _check, ops
from fastmem.ops import _content
from fastmem.reference.allocation import allocation
from fastmem.reference.memory_write import memory_write
from fastmem.reference.usage_update import usage_update
from fastmem.reference.weighted_read import weighted_read


class DNCState(NamedTuple):
    """What a DNC carries from step to step. Without a batch (2-D input) the B is missing everywhere."""

    memory: Tensor  # [B,N,W]
    usage: Tensor  # [B,N]
    precedence: Tensor  # [B,Q,N]
    link: Tensor  # [B,Q,N,N]
    write_weights: Tensor  # [B,Q,N]
    read_weights: Tensor  # [B,R,N]
    reads: Tensor  # [B,R,W]
    hidden: Tensor  # [B,H]
    cell: Tensor  # [B,H]

    def detach(self) -> "DNCState":
        """The same state outside the graph, for truncated backpropagation through time."""
        return DNCState(*(tensor.detach() for tensor in self))


class Interface(NamedTuple):
    """What the controller says to the memory in one step, in the order of the interface vector, within its ranges."""

    read_keys: Tensor  # [B,R,W]
    read_strengths: Tensor  # [B,R], at least 1
    write_keys: Tensor  # [B,Q,W]
    write_strengths: Tensor  # [B,Q], at least 1
    erase: Tensor  # [B,Q,W], in [0,1]
    values: Tensor  # [B,Q,W]
    free_gates: Tensor  # [B,R], in [0,1]
    allocation_gates: Tensor  # [B,Q], in [0,1]
    write_gates: Tensor  # [B,Q], in [0,1]
    read_modes: Tensor  # [B,R,2Q+1], sums to 1: backward 1..Q, content, forward 1..Q


class DNC(nn.Module):
    r"""Differentiable neural computer with an LSTM controller, called like :class:`torch.nn.LSTM`.

    At each step the controller sees the input and the last reads, and an interface vector made from its output drives
    one write and one read of the memory:

    .. math::
        h_t &= \mathrm{LSTM}([x_t; r_{t-1}]) & \xi_t &= \mathrm{clip}(W_\xi h_t + b_\xi) \\
        w^w_t &= g^w (g^a a_t + (1 - g^a) c^w_t) & M_t &= M_{t-1} (1 - w^w_t \otimes e_t) + w^w_t \otimes v_t \\
        w^r_t &= \pi_b b_t + \pi_c c^r_t + \pi_f f_t & r_t &= w^r_t M_t \\
        y_t &= \mathrm{clip}(W_y [h_t; r_t] + b_y)

    with allocation :math:`a`, content weights :math:`c` (:func:`fastmem.content_addressing`) and the weights
    :math:`f, b` along the order of writing (:func:`fastmem.temporal_linkage`). Source: Graves et al., "Hybrid computing
    using a neural network with dynamic external memory"; several write heads as in the code published with it.

    Args:
        input_size (int): width X of the input.
        hidden_size (int): width H of the controller.
        num_slots (int): memory slots N.
        word_size (int): width W of a slot.
        num_read_heads (int): R. Default: 1.
        num_write_heads (int): Q. Default: 1.
        output_size (int, optional): width Y of the output. Default: None, `hidden_size`.
        batch_first (bool): input and output are `[B, T, .]` rather than `[T, B, .]`; the state is not affected.
            Default: False.
        norm (str): convention of the cosine, "inner", "outer", "rsqrt" or "clamp", see
            :func:`fastmem.content_addressing`. Default: "inner".
        eps (float, optional): its constant. Default: None, that of the norm.
        clip (float, optional): bound of interface vector and output, None for no bound. Default: 20.
        detach_usage_write (bool): no gradient from the usage into the last write weights, as the published code has it.
            Default: False, the true gradient.
        device, dtype: of the parameters. float32 or float64.

    Inputs: input, state
        input `[T, B, X]`, `[B, T, X]` with `batch_first`, or `[T, X]` without a batch. state: a :class:`DNCState`;
        None: zeros. The state given is never written to.

    Outputs: output, state
        output as the input but Y wide, in [-clip, clip]. state: the last :class:`DNCState`; feeding it back in
        continues the sequence, and a sequence in pieces equals the whole. Output and state are differentiable with
        respect to input, parameters and the initial state.

    Attributes:
        weight_ih_l0 `[4H, X + RW]`, weight_hh_l0 `[4H, H]`, bias_ih_l0, bias_hh_l0 `[4H]`: the controller, gates in the
            order i, f, g, o, drawn uniformly from :math:`\pm 1/\sqrt{H}`, all as in :class:`torch.nn.LSTM`. Columns:
            the input, then the reads head by head.
        interface (Linear): from H to R(W + 2Q + 3) + Q(3W + 3) in the order of :class:`Interface`. Strengths pass
            1 + softplus, erase and gates sigmoid, read modes softmax.
        output (Linear): from H + RW to Y.

    Cost: a step reads and writes the link, B Q N^2 numbers; training keeps one link per step.

    Dtype: float32, or float64 throughout. Under autocast the linear maps and the output have the lower precision, and
    the input may; the state stays float32.

    Determinism: the same call gives the same bits on the same machine, on a CPU.

    Raises:
        TypeError: for a `PackedSequence` (not supported), or a dtype other than that of the parameters.
        ValueError: for sizes, devices or options that do not fit.

    Example::

        net = fastmem.nn.DNC(input_size=10, hidden_size=64, num_slots=64, word_size=16, num_read_heads=4, output_size=8)
        output, state = net(torch.randn(25, 3, 10))
        output, state = net(torch.randn(25, 3, 10), state.detach())
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        word_size: int,
        num_read_heads: int = 1,
        num_write_heads: int = 1,
        output_size: int | None = None,
        batch_first: bool = False,
        norm: str = "inner",
        eps: float | None = None,
        clip: float | None = 20.0,
        detach_usage_write: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.input_size = _positive("input_size", input_size)
        self.hidden_size = _positive("hidden_size", hidden_size)
        self.num_slots = _positive("num_slots", num_slots)
        self.word_size = _positive("word_size", word_size)
        self.num_read_heads = _positive("num_read_heads", num_read_heads)
        self.num_write_heads = _positive("num_write_heads", num_write_heads)
        self.output_size = self.hidden_size if output_size is None else _positive("output_size", output_size)
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, Real) or not clip > 0):
            raise ValueError(f"clip: expected a positive number or None, got {clip!r}")
        dtype = torch.get_default_dtype() if dtype is None else dtype
        if dtype not in _check.STATE_DTYPES:
            raise TypeError(f"dtype: expected {' or '.join(map(str, _check.STATE_DTYPES))}, got {dtype}")
        self.batch_first = batch_first
        self.norm = norm
        self.eps = _content.resolve_eps(norm, eps)
        self.clip = None if clip is None else float(clip)
        self.detach_usage_write = detach_usage_write

        heads, write_heads, word = self.num_read_heads, self.num_write_heads, self.word_size
        self._interface_shapes: dict[str, tuple[int, ...]] = {
            "read_keys": (heads, word),
            "read_strengths": (heads,),
            "write_keys": (write_heads, word),
            "write_strengths": (write_heads,),
            "erase": (write_heads, word),
            "values": (write_heads, word),
            "free_gates": (heads,),
            "allocation_gates": (write_heads,),
            "write_gates": (write_heads,),
            "read_modes": (heads, 2 * write_heads + 1),
        }
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        gates = 4 * self.hidden_size
        self.weight_ih_l0 = nn.Parameter(torch.empty(gates, self.input_size + heads * word, **kind))
        self.weight_hh_l0 = nn.Parameter(torch.empty(gates, self.hidden_size, **kind))
        self.bias_ih_l0 = nn.Parameter(torch.empty(gates, **kind))
        self.bias_hh_l0 = nn.Parameter(torch.empty(gates, **kind))
        self.interface = nn.Linear(self.hidden_size, sum(map(prod, self._interface_shapes.values())), **kind)
        self.output = nn.Linear(self.hidden_size + heads * word, self.output_size, **kind)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        bound = self.hidden_size**-0.5
        for parameter in (self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0):
            nn.init.uniform_(parameter, -bound, bound)
        self.interface.reset_parameters()
        self.output.reset_parameters()

    def initial_state(self, batch_size: int) -> DNCState:
        """The state before the first step: zeros."""
        zeros = self.weight_hh_l0.new_zeros
        return DNCState(**{name: zeros(batch_size, *shape) for name, shape in self._state_shapes().items()})

    def forward(self, input: Tensor, state: DNCState | None = None) -> tuple[Tensor, DNCState]:
        """Runs a sequence; see the class."""
        self._check_arguments(input, state)
        input = input.to(self.weight_ih_l0.dtype)
        unbatched, batch_dim = input.dim() == 2, 0 if self.batch_first else 1
        if unbatched:
            input = input.unsqueeze(batch_dim)
            state = None if state is None else DNCState(*(tensor.unsqueeze(0) for tensor in state))
        if state is None:
            state = self.initial_state(input.shape[batch_dim])

        outputs = []
        for step_input in input.unbind(1 - batch_dim):
            step_output, state = self.step(step_input, state)
            outputs.append(step_output)
        shape = (*input.shape[:-1], self.output_size)
        output = torch.stack(outputs, 1 - batch_dim) if outputs else input.new_empty(shape)
        if unbatched:
            output, state = output.squeeze(batch_dim), DNCState(*(tensor.squeeze(0) for tensor in state))
        return output, state

    def step(self, input: Tensor, state: DNCState) -> tuple[Tensor, DNCState]:
        """One step: input `[B, X]` and a batched state -> output `[B, Y]` and the next state. Arguments unchecked."""
        seen = torch.cat([input, state.reads.flatten(1)], -1)
        hidden, cell = torch.lstm_cell(
            seen, (state.hidden, state.cell), self.weight_ih_l0, self.weight_hh_l0, self.bias_ih_l0, self.bias_hh_l0
        )
        vector = self._clip(self.interface(hidden))
        # Autocast is for the linear maps: the memory and all of the state keep the dtype of the parameters.
        with _no_autocast(input.device.type):
            hidden, cell, vector = (tensor.to(self.weight_hh_l0.dtype) for tensor in (hidden, cell, vector))
            state = self.access(self.parse(vector), state._replace(hidden=hidden, cell=cell))
        return self._clip(self.output(torch.cat([hidden, state.reads.flatten(1)], -1))), state

    def parse(self, vector: Tensor) -> Interface:
        """Cuts the interface vector `[B, .]` into its fields and takes each into its range."""
        shapes = self._interface_shapes.items()
        parts = vector.split([prod(shape) for _, shape in shapes], -1)
        fields = Interface(
            **{name: part.unflatten(-1, shape) for (name, shape), part in zip(shapes, parts, strict=True)}
        )
        return fields._replace(
            read_strengths=1 + softplus(fields.read_strengths),
            write_strengths=1 + softplus(fields.write_strengths),
            erase=fields.erase.sigmoid(),
            free_gates=fields.free_gates.sigmoid(),
            allocation_gates=fields.allocation_gates.sigmoid(),
            write_gates=fields.write_gates.sigmoid(),
            read_modes=fields.read_modes.softmax(-1),
        )

    def access(self, fields: Interface, state: DNCState) -> DNCState:
        """One write and one read of the memory; hidden and cell pass through."""
        written = state.write_weights.detach() if self.detach_usage_write else state.write_weights
        usage, _ = usage_update(state.usage, written, state.read_weights, fields.free_gates)
        allocated = allocation(usage, fields.allocation_gates * fields.write_gates)
        found = self._lookup(state.memory, fields.write_keys, fields.write_strengths)
        allocation_gates, write_gates = fields.allocation_gates.unsqueeze(-1), fields.write_gates.unsqueeze(-1)
        write_weights = write_gates * (allocation_gates * allocated + (1 - allocation_gates) * found)
        memory = memory_write(state.memory, write_weights, fields.erase, fields.values, None)

        link, precedence, forward, backward = ops.temporal_linkage(
            state.link, state.precedence, write_weights, state.read_weights
        )
        content = self._lookup(memory, fields.read_keys, fields.read_strengths)
        ways = torch.cat([backward, content.unsqueeze(1), forward], 1)  # [B,2Q+1,R,N]
        read_weights = torch.einsum("brm,bmrn->brn", fields.read_modes, ways)
        reads = weighted_read(memory, read_weights)
        return DNCState(memory, usage, precedence, link, write_weights, read_weights, reads, state.hidden, state.cell)

    def extra_repr(self) -> str:
        return (
            f"{self.input_size}, {self.hidden_size}, num_slots={self.num_slots}, word_size={self.word_size}, "
            f"num_read_heads={self.num_read_heads}, num_write_heads={self.num_write_heads}, "
            f"output_size={self.output_size}"
        )

    def _lookup(self, memory: Tensor, keys: Tensor, strengths: Tensor) -> Tensor:
        return ops.content_addressing(memory, keys, strengths, norm=self.norm, eps=self.eps)

    def _clip(self, tensor: Tensor) -> Tensor:
        return tensor if self.clip is None else tensor.clamp(-self.clip, self.clip)

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        slots, word, heads, write_heads = self.num_slots, self.word_size, self.num_read_heads, self.num_write_heads
        return {
            "memory": (slots, word),
            "usage": (slots,),
            "precedence": (write_heads, slots),
            "link": (write_heads, slots, slots),
            "write_weights": (write_heads, slots),
            "read_weights": (heads, slots),
            "reads": (heads, word),
            "hidden": (self.hidden_size,),
            "cell": (self.hidden_size,),
        }

    def _check_arguments(self, input: Tensor, state: DNCState | None) -> None:
        if isinstance(input, PackedSequence):
            raise TypeError("input: expected a Tensor, got a PackedSequence, which DNC does not support")
        _check.tensors([("input", False)], [input])
        if input.dim() not in (2, 3):
            layout = "[B, T, X]" if self.batch_first else "[T, B, X]"
            raise ValueError(f"input: expected {layout} or [T, X], got shape {list(input.shape)}")
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
        if state is None:
            return
        if not isinstance(state, DNCState):
            raise TypeError(f"state: expected a DNCState or None, got {type(state).__name__}")
        batch = () if input.dim() == 2 else (input.shape[0 if self.batch_first else 1],)
        for name, shape in self._state_shapes().items():
            field, tensor = f"state.{name}", getattr(state, name)
            _check.tensors([(field, False)], [tensor])
            if tensor.shape != (*batch, *shape):
                raise ValueError(f"{field}: expected shape {[*batch, *shape]}, got {list(tensor.shape)}")
            _check.same_kind(weight, (field, tensor))


def _no_autocast(device: str) -> AbstractContextManager[Any]:
    """Autocast off, on devices that have it: torch.autocast raises on others, as on meta."""
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def _positive(name: str, value: SupportsIndex) -> int:
    """Any integer, NumPy's too; a bool counts as one in Python and is a mistake here."""
    try:
        size = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = 0
    if size < 1:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")
    return size
