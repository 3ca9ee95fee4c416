"""The differentiable neural computer as a module, and one step of it as another."""

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
from fastmem.nn._views import DNCViews, dnc_views
from fastmem.ops import _content
from fastmem.ops._sequence import configured
from fastmem.ops.allocation import EPS
from fastmem.ops.dnc_step import taped_dnc_step
from fastmem.reference._interface import interface_runs, interface_size


class DNCState(NamedTuple):
    """What a DNC carries from step to step. Without a batch the B is missing everywhere."""

    memory: Tensor  # [B,N,W]
    usage: Tensor  # [B,N]
    precedence: Tensor  # [B,Q,N]
    link: Tensor  # [B,Q,N,N]
    write_weights: Tensor  # [B,Q,N]
    read_weights: Tensor  # [B,R,N]
    reads: Tensor  # [B,R,W]
    hidden: Tensor  # [B,LH], layer by layer; [B,0] of a feed-forward controller
    cell: Tensor  # [B,LH], layer by layer; [B,0] of a GRU or feed-forward controller

    def detach(self) -> "DNCState":
        """The same state outside the graph, for truncated backpropagation through time."""
        return mapped(Tensor.detach, self)

    def to(self, *args: Any, **kwargs: Any) -> "DNCState":
        """Every tensor through `Tensor.to`: another device or dtype."""
        return mapped(lambda tensor: tensor.to(*args, **kwargs), self)

    def reset(self, rows: Tensor | Sequence[int]) -> "DNCState":
        """A state with some rows of the batch as before the first step, given by their numbers or by a bool each."""
        if self.usage.dim() == 1:
            raise ValueError("state: expected a batch, whose rows are to be reset, got a state without one")
        return _sequence.reset(self, rows)


torch.serialization.add_safe_globals([DNCState])  # for torch.load
register_namedtuple(DNCState, serialized_type_name="fastmem.nn.DNCState")  # for torch.export.save


class _DNC(MemoryNetwork[DNCViews]):
    """Parameters and step of both modules."""

    state_type = DNCState
    sequence_stem = "dnc_sequence"

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        word_size: int,
        num_read_heads: int = 1,
        num_write_heads: int = 1,
        output_size: int | None = None,
        norm: str = "inner",
        eps: float | None = None,
        clip: float | None = 20.0,
        detach_usage_write: bool = False,
        masked: bool = False,
        deallocates: bool = False,
        sharpened: bool = False,
        oneplus: bool = True,
        mask_floor: float = 0.0,
        allocation_eps: float = EPS,
        controller: str = "lstm",
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        sizes = {
            "input_size": input_size, "hidden_size": hidden_size, "num_slots": num_slots, "word_size": word_size,
            "num_read_heads": num_read_heads, "num_write_heads": num_write_heads, "num_layers": num_layers,
            "output_size": hidden_size if output_size is None else output_size,
        }  # fmt: skip
        sizes = {name: _check.integer(name, size) for name, size in sizes.items()}
        _check.clip(clip)
        _check.share("mask_floor", mask_floor)
        _check.share("allocation_eps", allocation_eps)
        _check.flags(
            detach_usage_write=detach_usage_write, masked=masked, deallocates=deallocates, sharpened=sharpened,
            oneplus=oneplus,
        )  # fmt: skip
        dtype = parameter_dtype(dtype)
        hidden_size, num_layers = sizes["hidden_size"], sizes["num_layers"]
        read_size = sizes["num_read_heads"] * sizes["word_size"]
        super().__init__(controller, sizes["input_size"] + read_size, hidden_size, num_layers, device, dtype)

        self.input_size, self.output_size = sizes["input_size"], sizes["output_size"]
        self.num_slots, self.word_size = sizes["num_slots"], sizes["word_size"]
        self.num_read_heads, self.num_write_heads = sizes["num_read_heads"], sizes["num_write_heads"]
        self.norm, self.eps = norm, _content.resolve_eps(norm, eps)
        self.clip = None if clip is None else float(clip)
        self.detach_usage_write = detach_usage_write
        self.masked, self.deallocates, self.sharpened, self.oneplus = masked, deallocates, sharpened, oneplus
        self.mask_floor, self.allocation_eps = float(mask_floor), float(allocation_eps)

        vector_size = interface_size(self.word_size, self.num_read_heads, self.num_write_heads, masked, sharpened)
        self.interface = nn.Linear(hidden_size, vector_size, device=device, dtype=dtype)
        self.output = nn.Linear(hidden_size + read_size, self.output_size, device=device, dtype=dtype)
        self.reset_parameters()

    def initial_state(self, batch_size: int) -> DNCState:
        """The state before the first step: zeros."""
        return self._zeros(_check.integer("batch_size", batch_size, least=0))

    def first_state(self, batch_size: int) -> DNCState:
        if type(self).initial_state is not _DNC.initial_state or "initial_state" in self.__dict__:
            return self.initial_state(batch_size)
        return self._zeros(batch_size, shared=("memory", "link"))

    def _zeros(self, batch_size: int, shared: tuple[str, ...] = ()) -> DNCState:
        """A state of zeros, those of the shared parts of one sample for all."""
        zeros = self.weight_ih_l0.new_zeros
        return DNCState(**{
            name: zeros(1, *shape).expand(batch_size, *shape) if name in shared else zeros(batch_size, *shape)
            for name, shape in self._state_shapes().items()
        })  # fmt: skip

    def project(self, tops: Tensor) -> Tensor:
        output = super().project(tops)
        return output if self.clip is None else output.clamp(-self.clip, self.clip)

    def access(self, interface: Tensor, state: DNCState, in_place: bool = False) -> DNCState:
        """One write and one read of the memory by an interface vector `[B, S]`; hidden and cell pass through."""
        options: dict[str, Any] = {
            "masked": self.masked, "deallocates": self.deallocates, "sharpened": self.sharpened,
            "oneplus": self.oneplus, "mask_floor": self.mask_floor, "clip": self.clip,
            "norm": self.norm, "eps": self.eps, "allocation_eps": self.allocation_eps,
        }  # fmt: skip
        if in_place:
            ops.dnc_step_(interface, *state[:7], **options)  # up to the reads
            return state
        options["detach_usage_write"] = self.detach_usage_write
        results = taped_dnc_step(interface, *state[:6], **options)
        if self._views is not None:
            self._views.append(dnc_views(interface, results, options, self.shares(interface)))
        return DNCState._make([*results[:-1], *state[7:]])

    def sequence_op(
        self, inputs: Tensor, parameters: list[Tensor], state: Any, step_mask: Tensor | None, projected: bool = True
    ) -> Any:
        config = configured(
            ops.DNCConfig, self.input_size, self.hidden_size, self.num_slots, self.word_size, self.num_read_heads,
            self.num_write_heads, self.output.out_features, self.controller, masked=self.masked,
            deallocates=self.deallocates, sharpened=self.sharpened, oneplus=self.oneplus,
            detach_usage_write=self.detach_usage_write, mask_floor=self.mask_floor, clip=self.clip, norm=self.norm,
            eps=self.eps, allocation_eps=self.allocation_eps, projected=projected, programs=self.program_config(),
        )  # fmt: skip
        return ops.dnc_sequence(inputs, parameters, state, config, step_mask)

    def interface_runs(self) -> tuple[tuple[int, int], ...]:
        """Whom the interface vector speaks to, in its order: 0 those who read or 1 those who write; and how wide."""
        heads = (self.num_read_heads, self.num_write_heads)
        return interface_runs(self.word_size, *heads, self.masked, self.sharpened)

    def extra_repr(self) -> str:
        variants = [name for name in ("masked", "deallocates", "sharpened") if getattr(self, name)]
        layers = f"{self.num_layers} {self.controller}"
        return (
            f"{self.input_size}, {self.hidden_size}, num_slots={self.num_slots}, word_size={self.word_size}, "
            f"num_read_heads={self.num_read_heads}, num_write_heads={self.num_write_heads}, "
            f"output_size={self.output_size}, {', '.join([layers, *variants])}"
        )

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
            **super()._state_shapes(),
        }


class DNCCell(_DNC):
    r"""One step of a :class:`DNC`, called like :class:`torch.nn.LSTMCell`.

    Args, attributes, cost, dtype and errors as for :class:`DNC`, which has one argument more, `batch_first`. Their
    parameters have the same names: one loads the `state_dict` of the other.

    Inputs: input, state
        input `[B, X]`, or `[X]` without a batch. state: a :class:`DNCState`; None: zeros. It is never written to.

    Outputs: output, state
        output `[B, Y]` or `[Y]`, in [-clip, clip], and the next :class:`DNCState`, differentiable as those of the DNC.

    Example::

        cell = fastmem.nn.DNCCell(input_size=10, hidden_size=64, num_slots=64, word_size=16, num_read_heads=4)
        state = None
        for step_input in torch.randn(25, 3, 10):
            output, state = cell(step_input, state)
    """

    def forward(self, input: Tensor, state: DNCState | None = None) -> tuple[Tensor, DNCState]:
        """Runs one step; see the class."""
        return self.run_cell(input, state)


class DNC(_DNC):
    r"""Differentiable neural computer, called like :class:`torch.nn.LSTM`.

    At each step the controller sees the input and the last reads, and an interface vector made from its output drives
    one write and one read of the memory (:func:`fastmem.dnc_step`):

    .. math::
        h_t &= \mathrm{LSTM}([x_t; r_{t-1}]) & \xi_t &= \mathrm{clip}(W_\xi h_t + b_\xi) \\
        w^w_t &= g^w (g^a a_t + (1 - g^a) c^w_t) & M_t &= M_{t-1} (1 - w^w_t \otimes e_t) + w^w_t \otimes v_t \\
        w^r_t &= \pi_b b_t + \pi_c c^r_t + \pi_f f_t & r_t &= w^r_t M_t \\
        y_t &= \mathrm{clip}(W_y [h_t; r_t] + b_y)

    with allocation :math:`a`, content weights :math:`c` (:func:`fastmem.content_addressing`) and the weights
    :math:`f, b` along the order of writing (:func:`fastmem.temporal_linkage`). Source: Graves et al., "Hybrid computing
    using a neural network with dynamic external memory"; several write heads as in the code published with it. Variants
    (`masked`, `deallocates`, `sharpened`): Csordas and Schmidhuber, "Improving Differentiable Neural Computers Through
    Memory Masking, De-allocation, and Link Distribution Sharpness Control".

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
        norm (str): convention of the cosine, "inner", "outer", "rsqrt", "clamp" or "width", see
            :func:`fastmem.content_addressing`. Default: "inner".
        eps (float, optional): its constant. Default: None, that of the norm.
        clip (float, optional): bound of interface vector and output, None for no bound. Default: 20.
        detach_usage_write (bool): no gradient from the usage into the last write weights, as the published code has it.
            Default: False, the true gradient.
        masked (bool): content lookups compare under a mask of the words. Default: False.
        deallocates (bool): what the free gates release is erased from the memory. Default: False.
        sharpened (bool): forward and backward weights are sharpened. Default: False.
        oneplus (bool): strengths are 1 + softplus; False: softplus alone, as in the published code. Default: True.
        mask_floor (float): masks lie in [mask_floor, 1]; in [0, 1). Default: 0.
        allocation_eps (float): the eps of :func:`fastmem.allocation`, which is 0 in the published code of Uniform
            Writing. Default: 1e-6.
        controller (str): "lstm", "layernorm_lstm" (see :func:`fastmem.dnc_sequence`), "gru", or "feedforward", whose
            layers are tanh(W x + b). Default: "lstm".
        num_layers (int): layers L of the controller; the memory follows the top one. Default: 1.
        device, dtype: of the parameters. float32 or float64.

    Inputs: input, state, lengths, write_schedule
        input `[T, B, X]`, `[B, T, X]` with `batch_first`, `[T, X]` without a batch, or a `PackedSequence`. state: a
        :class:`DNCState`; None: zeros. The state given is never written to. lengths: B integers from 1 to T in any
        order, for padded sequences (a sequence of ints or a tensor); None: all are T long. write_schedule: the steps at
        which the memory is written and read; at the others it rests, and the controller sees the reads it saw before.
        A :class:`WriteSchedule` or the name of its rule, which each sequence follows by its own length, or bools `[T]`
        or `[T, B]`, with `batch_first` too; None: all steps.

    Outputs: output, state
        output as the input but Y wide, in [-clip, clip]; packed where the input is, zero past the `lengths`. state: a
        :class:`DNCState` with that of each sequence after its own last step; feeding it back in continues the
        sequences, and without a schedule, a sequence in pieces equals the whole. Output and state are differentiable
        with respect to input, parameters and the initial state.

    Attributes:
        weight_ih_l0 `[4H, X + RW]`, weight_hh_l0 `[4H, H]`, bias_ih_l0, bias_hh_l0 `[4H]`, and so on for each layer:
            the controller, in the order of gates and with the initialisation of :class:`torch.nn.LSTM`, or, 3H high,
            of :class:`torch.nn.GRU`; a layer-normalised one has norm_weight and norm_bias `[5, H]` for the biases,
            which begin at 1 and 0, the forget gate's at 1; a feed-forward one has weight_ih and bias_ih, H high.
            Columns of the first: the input, then the reads head by head.
        interface (Linear): from H to the interface vector, its fields in the order of :func:`fastmem.dnc_step`.
        output (Linear): from H + RW to Y.

    Cost: a step reads and writes the link, B Q N^2 numbers. Where :func:`fastmem.dnc_sequence` takes whole sequences,
    training keeps about :math:`2 \sqrt{T}` links. It does on a CPU, for one layer of a controller that it has
    (all but the GRU); elsewhere, under autocast, watched, hooked or changed in a subclass, sequences run step by step,
    and training keeps one link per step. `fastmem.explain(net, input)` tells which, and why. Steps in which the memory
    rests cost what the controller does; of the memory nothing is done or kept. Step by step under `torch.compile` they
    cost as much as others.

    Dtype: float32, or float64 throughout. Under autocast the linear maps and the output have the lower precision, and
    the input may; the state stays float32.

    Ties: allocation takes the slot used least; where several are equally used, as all are at the start, the last bit of
    a rounding decides, so that the states of two backends, or of a DNC and a loop over :class:`DNCCell`, may hold the
    same in another order of slots; their outputs agree.

    Determinism: the same call gives the same bits on the same machine, on a CPU.

    Raises:
        TypeError: for a dtype other than that of the parameters, or lengths that are no integers.
        ValueError: for sizes, devices, lengths or options that do not fit.

    Example::

        net = fastmem.nn.DNC(input_size=10, hidden_size=64, num_slots=64, word_size=16, num_read_heads=4, output_size=8)
        output, state = net(torch.randn(25, 3, 10))
        output, state = net(torch.randn(25, 3, 10), state.detach(), lengths=[25, 7, 12])
        with net.watched() as views:
            net(torch.randn(25, 3, 10))
        views[0].read_weights    # [25, 3, 4, 64]
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
        masked: bool = False,
        deallocates: bool = False,
        sharpened: bool = False,
        oneplus: bool = True,
        mask_floor: float = 0.0,
        allocation_eps: float = EPS,
        controller: str = "lstm",
        num_layers: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        _check.flags(batch_first=batch_first)
        super().__init__(
            input_size=input_size, hidden_size=hidden_size, num_slots=num_slots, word_size=word_size,
            num_read_heads=num_read_heads, num_write_heads=num_write_heads, output_size=output_size, norm=norm, eps=eps,
            clip=clip, detach_usage_write=detach_usage_write, masked=masked, deallocates=deallocates,
            sharpened=sharpened, oneplus=oneplus, mask_floor=mask_floor, allocation_eps=allocation_eps,
            controller=controller, num_layers=num_layers,
            device=device, dtype=dtype,
        )  # fmt: skip
        self.batch_first = batch_first

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: DNCState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        write_schedule: Schedule = None,
    ) -> tuple[Tensor | PackedSequence, DNCState]:
        """Runs sequences; see the class."""
        return self.run_sequences(input, state, lengths, write_schedule)
