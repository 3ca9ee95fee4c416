"""DNC sequence: T steps of a DNC with its controller in one call. Configuration, schema and the public function."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from fastmem import _check, _library
from fastmem.ops import _content, _sequence
from fastmem.ops.allocation import EPS
from fastmem.reference import dnc_sequence as reference
from fastmem.reference._interface import interface_runs

STEM = "dnc_sequence"
SIZES = (
    "input_size", "hidden_size", "num_slots", "word_size", "num_read_heads", "num_write_heads", "output_size",
)  # fmt: skip


@dataclass(frozen=True)
class DNCConfig:
    """Sizes and options of a :func:`dnc_sequence`, checked; named as those of :class:`fastmem.nn.DNC`.

    Args:
        input_size, hidden_size, num_slots, word_size, num_read_heads, num_write_heads, output_size (int): X, H, N, W,
            R, Q and Y. Default of R and Q: 1, of Y: None, hidden_size.
        controller (str): "lstm", "layernorm_lstm" or "feedforward".
        masked, deallocates, sharpened, oneplus, detach_usage_write (bool), mask_floor (float), norm (str),
            eps (float, optional), allocation_eps (float): as for :func:`dnc_step`.
        clip (float, optional): bound of interface vector and output. Default: 20; None: no bound.
        projected (bool): whether there is an output layer; without one the outputs are `[h_t; r_t]`, H + RW wide, and
            `output_size` says nothing. Default: True.
        programs (ProgramConfig, optional): stored programs make the interface vector. Default: None, a linear layer.
    """

    input_size: int
    hidden_size: int
    num_slots: int
    word_size: int
    num_read_heads: int = 1
    num_write_heads: int = 1
    output_size: int | None = None
    controller: str = "lstm"
    masked: bool = False
    deallocates: bool = False
    sharpened: bool = False
    oneplus: bool = True
    detach_usage_write: bool = False
    mask_floor: float = 0.0
    clip: float | None = 20.0
    norm: str = "inner"
    eps: float | None = None
    allocation_eps: float = EPS
    projected: bool = True
    programs: _sequence.ProgramConfig | None = None

    def __post_init__(self) -> None:
        output_size = self.hidden_size if self.output_size is None else self.output_size
        sizes = {name: getattr(self, name) for name in SIZES} | {"output_size": output_size}
        _sequence.check_controller(self.controller)
        _check.flags(**{name: getattr(self, name) for name in reference.FLAGS})
        _sequence.check_programs(self.programs)
        _check.share("mask_floor", self.mask_floor)
        _check.share("allocation_eps", self.allocation_eps)
        _check.clip(self.clip)
        checked: dict[str, Any] = {name: _check.integer(name, size) for name, size in sizes.items()}
        checked |= {
            "mask_floor": float(self.mask_floor),
            "allocation_eps": float(self.allocation_eps),
            "clip": None if self.clip in (None, inf) else float(self.clip),
            "eps": _content.resolve_eps(self.norm, self.eps),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def encoded(self, spacing: int, accesses: int = -1) -> _sequence.Encoded:
        """The op's shape, options and constants; `spacing`: the accesses between two checkpoints."""
        given = {name: getattr(self, name) for name in reference.Configuration._fields}
        given["clip"] = inf if self.clip is None else self.clip
        given["programs"] = self.programs and self.programs.of(self.runs())
        return reference.encoded(reference.Configuration(**given), spacing, accesses)

    @classmethod
    def decoded(
        cls, shape: Sequence[int], options: Sequence[str], constants: Sequence[float]
    ) -> tuple["DNCConfig", int, int]:
        """`encoded` undone, and checked: the configuration, the spacing, and how many accesses there may be."""
        _sequence.check_code(shape, options, constants, (9, 3, 5), reference.FLAGS)
        configuration, spacing, accesses = reference.decoded(shape, options, constants)
        programs = _sequence.ProgramConfig.like(configuration.programs)
        config = cls(**{**configuration._asdict(), "programs": programs})
        spacing, accesses = _sequence.checked_steps(spacing, accesses)
        _sequence.check_runs(shape, config.encoded(spacing, accesses)[0])
        return config, spacing, accesses

    def runs(self) -> tuple[tuple[int, int], ...]:
        """Whom the interface vector speaks to: 0 those who read or 1 those who write, and how many numbers."""
        heads = (self.num_read_heads, self.num_write_heads)
        return interface_runs(self.word_size, *heads, self.masked, self.sharpened)


def dnc_sequence(
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    config: DNCConfig,
    step_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""T steps of a DNC with its controller, in one call.

    .. math::
        h_t, c_t &= \mathrm{control}([x_t; r_{t-1}], h_{t-1}, c_{t-1}) &
        s_t, r_t &= \mathrm{dnc\_step}(W_\xi h_t + b_\xi, s_{t-1}) &
        y_t &= \mathrm{clip}(W_y [h_t; r_t] + b_y)

    with :func:`dnc_step` and its state s. Controllers: "lstm" as :class:`torch.nn.LSTM`; "layernorm_lstm", whose gates
    and new cell are normalised over the units, :math:`c_t = \mathrm{LN}_4(f c_{t-1} + i g)` with gates from
    :math:`\mathrm{LN}_k(z_k)`, z = W_ih s + W_hh h (Ba et al. 2016, "Layer Normalization"); "feedforward", which is
    tanh(W_ih s + b_ih).

    Args:
        inputs (Tensor): Shape `[T, B, X]`.
        parameters (sequence of Tensors): of the controller, rows in the order i, f, g, o: "lstm" weight_ih
            `[4H, X + RW]`, weight_hh `[4H, H]`, bias_ih and bias_hh `[4H]`; "layernorm_lstm" weight_ih, weight_hh,
            norm_weight and norm_bias `[5, H]`, of i, f, g, o and the cell; "feedforward" weight_ih `[H, X + RW]` and
            bias_ih `[H]`. Then interface weight `[S, H]` and bias `[S]`, S as for :func:`dnc_step`; with programs in
            their place, as :class:`fastmem.nn.ProgramMemory` names them, meta weight `[2 (K + 1), H]` and bias, keys
            `[2, P, K]`, weights `[P, H, S]` and biases `[P, S]`. Then output weight `[Y, H + RW]` and bias `[Y]`, where
            there is an output layer.
        state (sequence of Tensors): the fields of :class:`fastmem.nn.DNCState`: memory `[B, N, W]`, usage `[B, N]`,
            precedence `[B, Q, N]`, link `[B, Q, N, N]`, write weights `[B, Q, N]`, read weights `[B, R, N]`, reads
            `[B, R, W]`, hidden and cell `[B, H]`, `[B, 0]` of a feed-forward controller.
        config (DNCConfig): sizes and options.
        step_mask (Tensor, optional): uint8, what acts in a step: sums of 1 controller, 2 write, 4 read; 7 is a plain
            step, 0 padding, 5 a step that only reads. What does not act keeps its values; the output is 0 where the
            controller does not. A feed-forward controller may be off only where all is. Default: None, all act.
            Shape `[T, B]`.
        backend (str, optional): forces "cpp" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The outputs `[T, B, Y]`, and the state after the last step, a tuple like the one given.

    Dtype: float32, or float64 throughout; under autocast low-precision tensors become float32. Accumulates in the same
    dtype, in an order that depends on shapes alone: reruns are bitwise equal. Subnormal numbers count as zero in C++.
    Differentiable with respect to all tensors; second derivatives raise NotImplementedError. Under torch.func.grad and
    its kin the PyTorch reference runs, to any order; torch.vmap raises NotImplementedError: fold its dimension into
    the batch.

    Ties: allocation takes the slot used least; where several are equally used, as all are at the start, the last bit of
    a rounding decides, so that the states of two backends, or of this op and single steps, may hold the same in another
    order of slots; their outputs agree.

    Cost: T steps. Where a gradient is asked for, keeps at most about :math:`2 \sqrt{T}` links and memories, and a few
    weights of each step; the backward rebuilds the others, one stretch between two of them at a time. Of steps in which
    no sample writes or reads nothing is kept but what the controller says; they make no interface vector, and what the
    controller sees of reads that stay is multiplied by its weights once. Programs cost as P interface layers.

    Raises:
        TypeError: for a dtype other than float32 and float64, dtypes that differ, or a step mask that is not uint8.
        ValueError: for shapes or devices that do not fit together or the configuration, or bits of the step mask that
            mean nothing.
        BackendUnavailable: for a forced backend that cannot serve the call.
    """
    arguments = _arguments(inputs, parameters, state, config, step_mask)
    outputs, *final = _library.call(STEM, *arguments, backend=backend)[: 1 + len(state)]
    return outputs, tuple(final)


def _arguments(
    inputs: Tensor, parameters: Sequence[Tensor], state: Sequence[Tensor], config: DNCConfig, step_mask: Tensor | None
) -> tuple[Any, ...]:
    """The op's own arguments."""
    if not isinstance(config, DNCConfig):
        raise TypeError(f"config: expected a DNCConfig, got {type(config).__name__}")
    return _sequence.arguments(reference.DNCMemory, inputs, parameters, state, step_mask, config)


def _memory(shape: Sequence[int], options: Sequence[str], constants: Sequence[float]) -> reference.DNCMemory:
    DNCConfig.decoded(shape, options, constants)
    return reference.DNCMemory(shape, options, constants)


_sequence.register(STEM, _memory, _arguments)
