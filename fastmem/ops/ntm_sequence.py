"""NTM sequence: T steps of an NTM with its controller in one call. Configuration, schema and the public function."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

from torch import Tensor

from fastmem import _check, _library
from fastmem.ops import _content, _forms, _sequence
from fastmem.reference import ntm_sequence as reference
from fastmem.reference.ntm_step import interface_runs

STEM = "ntm_sequence"
SIZES = ("input_size", "hidden_size", "num_slots", "word_size", "output_size")


@dataclass(frozen=True)
class NTMConfig:
    """Sizes and options of a :func:`ntm_sequence`, checked; named as those of :class:`fastmem.nn.NTM`.

    Args:
        input_size, hidden_size, num_slots, word_size, output_size (int): X, H, N, W and Y. Default of Y: None,
            hidden_size.
        heads (str): a letter for each head, r for one that reads and w for one that writes. Default: "rw".
        max_shift (int): heads shift by up to so many slots either way. Default: 1.
        controller (str): "lstm", "layernorm_lstm" or "feedforward".
        joint_writes, reversed_shift (bool), form (str), sharpen_eps (float, optional), norm (str), eps (float,
            optional), clip (float, optional): as for :func:`ntm_step`.
        projected (bool): whether there is an output layer; without one the outputs are `[h_t; r_t]`, H + RW wide, and
            `output_size` says nothing. Default: True.
        programs (ProgramConfig, optional): stored programs make the interface vector. Default: None, a linear layer.
    """

    input_size: int
    hidden_size: int
    num_slots: int
    word_size: int
    heads: str = "rw"
    output_size: int | None = None
    max_shift: int = 1
    controller: str = "lstm"
    joint_writes: bool = False
    reversed_shift: bool = False
    form: str = "softmax"
    sharpen_eps: float | None = None
    norm: str = "inner"
    eps: float | None = None
    clip: float | None = 20.0
    projected: bool = True
    programs: _sequence.ProgramConfig | None = None

    def __post_init__(self) -> None:
        output_size = self.hidden_size if self.output_size is None else self.output_size
        sizes = {name: getattr(self, name) for name in SIZES} | {"output_size": output_size}
        checked: dict[str, Any] = {name: _check.integer(name, size) for name, size in sizes.items()}
        _check.heads(self.heads)
        _sequence.check_controller(self.controller)
        _check.flags(**{name: getattr(self, name) for name in reference.FLAGS})
        _sequence.check_programs(self.programs)
        _check.clip(self.clip)
        checked |= {
            "max_shift": _check.integer("max_shift", self.max_shift, least=0),
            "sharpen_eps": _forms.resolve(self.form, self.sharpen_eps, "sharpen_eps")[1],
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
    ) -> tuple["NTMConfig", int, int]:
        """`encoded` undone, and checked: the configuration, the spacing, and how many accesses there may be."""
        _sequence.check_code(shape, options, constants, (8, 5, 4), reference.FLAGS)
        configuration, spacing, accesses = reference.decoded(shape, options, constants)
        programs = _sequence.ProgramConfig.like(configuration.programs)
        config = cls(**{**configuration._asdict(), "programs": programs})
        spacing, accesses = _sequence.checked_steps(spacing, accesses)
        _sequence.check_runs(shape, config.encoded(spacing, accesses)[0])
        return config, spacing, accesses

    def runs(self) -> tuple[tuple[int, int], ...]:
        """Whom the interface vector speaks to: each head, and how many numbers."""
        return interface_runs(self.heads, self.word_size, 2 * self.max_shift + 1)


def ntm_sequence(
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    config: NTMConfig,
    step_mask: Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    r"""T steps of an NTM with its controller, in one call.

    .. math::
        h_t, c_t &= \mathrm{control}([x_t; r_{t-1}], h_{t-1}, c_{t-1}) &
        s_t, r_t &= \mathrm{ntm\_step}(W_\xi h_t + b_\xi, s_{t-1}) &
        y_t &= W_y [h_t; r_t] + b_y

    with :func:`ntm_step`, its state s, and the controllers of :func:`dnc_sequence`.

    Args:
        inputs (Tensor): Shape `[T, B, X]`.
        parameters (sequence of Tensors): of the controller as for :func:`dnc_sequence`, then interface weight `[S, H]`
            and bias `[S]`, S as for :func:`ntm_step`, and output weight `[Y, H + RW]` and bias `[Y]`. Without an output
            layer or with programs as for :func:`dnc_sequence`; programs have the A heads of the NTM.
        state (sequence of Tensors): the fields of :class:`fastmem.nn.NTMState`: memory `[B, N, W]`, weights
            `[B, A, N]`, reads `[B, R, W]`, hidden and cell `[B, H]`, `[B, 0]` of a feed-forward controller.
        config (NTMConfig): sizes and options.
        step_mask (Tensor, optional): uint8, what acts in a step: sums of 1 controller, 2 the heads that write, 4 those
            that read; 7 is a plain step, 0 padding. A head that does not act keeps its weights, and what it read; the
            output is 0 where the controller does not act. A feed-forward controller may be off only where all is.
            Default: None, all act. Shape `[T, B]`.
        backend (str, optional): forces "cpp" or "reference". Default: chosen, see `fastmem.explain`.

    Returns:
        The outputs `[T, B, Y]`, and the state after the last step, a tuple like the one given.

    Dtype: float32, or float64 throughout; under autocast low-precision tensors become float32. Accumulates in the same
    dtype, in an order that depends on shapes alone: reruns are bitwise equal. Subnormal numbers count as zero in C++.
    Differentiable with respect to all tensors; second derivatives raise NotImplementedError. Under torch.func.grad and
    its kin the PyTorch reference runs, to any order; torch.vmap raises NotImplementedError: fold its dimension into
    the batch.

    Cost: T steps. Where a gradient is asked for, keeps at most about :math:`2 \sqrt{T}` memories, and a few weights of
    each step; the backward rebuilds the others, one stretch between two of them at a time. Steps in which no sample
    writes or reads, and programs, as for :func:`dnc_sequence`.

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
    inputs: Tensor, parameters: Sequence[Tensor], state: Sequence[Tensor], config: NTMConfig, step_mask: Tensor | None
) -> tuple[Any, ...]:
    """The op's own arguments."""
    if not isinstance(config, NTMConfig):
        raise TypeError(f"config: expected an NTMConfig, got {type(config).__name__}")
    return _sequence.arguments(reference.NTMMemory, inputs, parameters, state, step_mask, config)


def _memory(shape: Sequence[int], options: Sequence[str], constants: Sequence[float]) -> reference.NTMMemory:
    NTMConfig.decoded(shape, options, constants)
    return reference.NTMMemory(shape, options, constants)


_sequence.register(STEM, _memory, _arguments)
