"""What the sequence ops share: schema, checks, fake, gradient and selection.

They take their many tensors in lists and their options encoded, as shape, options and constants.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastmem import _check, _library, _select
from fastmem.ops import _content
from fastmem.reference._controller import CONTROLLERS
from fastmem.reference._programs import FLAGS as PROGRAM_FLAGS
from fastmem.reference._programs import Programs
from fastmem.reference._sequence import Encoded, Memory

SCHEMA = (
    "(Tensor inputs, Tensor[] parameters, Tensor[] state, Tensor? step_mask, int[] shape, str[] options,"
    " float[] constants, bool save_tape, *, str? backend=None) -> Tensor[]"
)
BACKWARD_SCHEMA = (
    "(Tensor? grad_outputs, Tensor?[] grad_state, Tensor[] tape, Tensor inputs, Tensor[] parameters, Tensor[] state,"
    " Tensor? step_mask, int[] shape, str[] options, float[] constants, bool[] output_mask, *, str? backend=None)"
    " -> Tensor[]"
)


@dataclass(frozen=True)
class ProgramConfig:
    """Sizes and options of stored programs that make the interface vector of a sequence op, checked.

    Args:
        num_programs (int): P, of each control head.
        key_size (int, optional): K, the width of queries and keys. Default: None, P.
        direct_attention (bool): a query is a score for each program, and there are no keys; K is P. Default: False.
        tanh_keys (bool): queries and keys are compared after a tanh; without effect where there are no keys.
            Default: False.
        norm (str), eps (float, optional): their cosine, see :func:`fastmem.content_addressing`. Default: "inner".
    """

    num_programs: int
    key_size: int | None = None
    direct_attention: bool = False
    tanh_keys: bool = False
    norm: str = "inner"
    eps: float | None = None

    def __post_init__(self) -> None:
        count = _check.integer("num_programs", self.num_programs)
        key_size = count if self.key_size is None else _check.integer("key_size", self.key_size)
        _check.flags(direct_attention=self.direct_attention, tanh_keys=self.tanh_keys)
        if self.direct_attention and key_size != count:
            raise ValueError(
                f"key_size: expected {count}, the number of programs, with direct attention, got {key_size}"
            )
        checked = {
            "num_programs": count,
            "key_size": key_size,
            "tanh_keys": self.tanh_keys and not self.direct_attention,
            "eps": _content.resolve_eps(self.norm, self.eps),
        }
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def of(self, runs: tuple[tuple[int, int], ...]) -> Programs:
        """For an interface vector of these runs."""
        assert self.key_size is not None and self.eps is not None  # resolved
        return Programs(
            self.num_programs, self.key_size, runs, self.direct_attention, self.tanh_keys, self.norm, self.eps
        )

    @classmethod
    def like(cls, programs: Programs | None) -> "ProgramConfig | None":
        """`of` undone."""
        if programs is None:
            return None
        count, key_size, _, direct_attention, tanh_keys, norm, eps = programs
        return cls(count, key_size, direct_attention, tanh_keys, norm, eps)


def check_programs(programs: Any) -> None:
    """Checks what a configuration is given for its programs."""
    if programs is not None and not isinstance(programs, ProgramConfig):
        raise TypeError(f"programs: expected a ProgramConfig or None, got {type(programs).__name__}")


class Config(Protocol):
    """A configuration: frozen, and equal to another one by its values."""

    def __hash__(self) -> int: ...

    def encoded(self, spacing: int, accesses: int = -1) -> Encoded: ...


Decoder = Callable[[Sequence[int], Sequence[str], Sequence[float]], Memory]


def spacing(steps: int) -> int:
    """Steps that write or read between two checkpoints: the power of two at or above the root of the steps; of half the
    root up to 4096 steps; at least 8.

    What lies between two checkpoints is made again and waits beside the cache, so the nearer they are, the faster. With
    as many as that, a network keeps at most 2 root + 8 links and four more memories, those made again among them; in
    the measure in which fewer steps write or read, it keeps fewer.
    By comparisons alone, so that a program compiled for any number of steps holds for all with the same spacing.
    """
    if steps <= 4096:
        between = 8
        while 4 * between * between < steps:
            between *= 2
        return between
    between = 128
    while between * between < steps:
        between *= 2
    return between


def arguments(
    memory: Decoder,
    inputs: Tensor,
    parameters: Sequence[Tensor],
    state: Sequence[Tensor],
    step_mask: Tensor | None,
    config: Config,
) -> tuple[Any, ...]:
    """The op's own arguments, from those of the public function and a configuration that encodes itself."""
    _check.tensors([("inputs", False)], [inputs])
    if inputs.dim() != 3:
        raise ValueError(f"inputs: expected 3 dimensions [T, B, X], got shape {list(inputs.shape)}")
    # A compiler follows no cache, and needs none.
    encode = _encoded if torch.compiler.is_compiling() else _encoded_once
    accesses = -1 if step_mask is None else _accesses(step_mask)
    code, parameter_names, state_names = encode(memory, config, spacing(inputs.shape[0]), accesses)
    given = _entries("parameters", parameters, parameter_names)
    parts = _entries("state", state, state_names)
    if step_mask is not None and not torch.compiler.is_compiling():
        _check_bits(code[1][0], step_mask)
    save_tape = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (inputs, *given, *parts))
    return inputs, given, parts, step_mask, *code, save_tape


def _accesses(step_mask: Tensor) -> int:
    """How many steps of a mask write or read; -1, as many as there are, where a compiler cannot count."""
    if torch.compiler.is_compiling():
        return -1
    _check.tensors([("step_mask", True)], [step_mask])
    _check.dtypes("step_mask", step_mask, (torch.uint8,))
    if isinstance(step_mask, FakeTensor) or step_mask.is_meta or step_mask.dim() != 2:
        return -1
    return int((step_mask & 6).any(1).sum())


def _encoded(memory: Decoder, config: Config, between: int, accesses: int) -> tuple[Encoded, list[str], list[str]]:
    """What a configuration becomes, and the names of parameters and state."""
    code = config.encoded(between, accesses)
    shapes = memory(*code)
    return code, list(shapes.parameter_shapes()), list(shapes.state_shapes())


_encoded_once = lru_cache(_encoded)  # it takes as long as a few steps, and equal configurations give the same


def configured(kind: Callable[..., Any], *sizes: Any, **options: Any) -> Any:
    """A configuration of its kind: the same object for equal options, checked the first time."""
    make = _configured if torch.compiler.is_compiling() else _configured_once  # a compiler follows no cache
    try:
        return make(kind, *sizes, **options)
    except TypeError:  # what no cache takes is wrong, and named by the checks
        return _configured(kind, *sizes, **options)


def _configured(kind: Callable[..., Any], *sizes: Any, **options: Any) -> Any:
    return kind(*sizes, **options)


_configured_once = lru_cache(maxsize=128, typed=True)(_configured)  # typed: True and 1 are not the same option


def _entries(argument: str, tensors: Sequence[Tensor], names: list[str]) -> list[Tensor]:
    """A list of the tensors, each checked to be one."""
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{argument}: expected a sequence of Tensors, got {type(tensors).__name__}")
    if len(tensors) != len(names):
        raise ValueError(f"{argument}: expected {len(names)} tensors ({', '.join(names)}), got {len(tensors)}")
    _check.tensors([(name, False) for name in names], tensors)
    return list(tensors)


def check_controller(controller: str) -> None:
    """Checks that a sequence op has a controller inside it."""
    if not isinstance(controller, str) or controller not in CONTROLLERS:
        raise ValueError(f"controller: expected one of {', '.join(CONTROLLERS)}, got {controller!r}")


def check_code(
    shape: Sequence[int],
    options: Sequence[str],
    constants: Sequence[float],
    lengths: tuple[int, int, int],
    flags: tuple[str, ...],
) -> None:
    """Checks that options can be decoded: how many there are, and that flags, which come last of the words, exist.

    Sizes are followed by those of programs: P, K, and two numbers for each run of the interface vector.
    """
    words, names = options[: lengths[1]], options[lengths[1] :]
    stored = len(shape) - lengths[0]
    if (
        (len(words), len(constants)) != lengths[1:]
        or not set(names) <= {*flags, *PROGRAM_FLAGS}
        or stored < 0
        or stored % 2
        or stored == 2
    ):
        raise ValueError(
            f"shape, options, constants: expected {lengths[0]} sizes and those of programs, {lengths[1]} words and some"
            f" of {', '.join((*flags, *PROGRAM_FLAGS))}, {lengths[2]} numbers, got {list(shape)}, {list(options)},"
            f" {list(constants)}"
        )


def checked_steps(spacing: int, accesses: int) -> tuple[int, int]:
    """The spacing of the checkpoints and the number of accesses, which is -1 or such a number."""
    return _check.integer("spacing", spacing), _check.integer("accesses", accesses, least=-1)


def check_runs(shape: Sequence[int], expected: Sequence[int]) -> None:
    """Checks that programs are for the interface vector of the configuration that was decoded."""
    if [*shape] != [*expected]:
        raise ValueError(f"shape: expected {[*expected]}, got {[*shape]}")


def _check_sequence(
    memory: Memory, inputs: Tensor, parameters: Sequence[Tensor], state: Sequence[Tensor], step_mask: Tensor | None
) -> None:
    _check.dtypes("inputs", inputs, _check.STATE_DTYPES)
    parameter_shapes, state_shapes = memory.parameter_shapes(), memory.state_shapes()
    given = [
        *zip(parameter_shapes, _entries("parameters", parameters, list(parameter_shapes)), strict=True),
        *zip(state_shapes, _entries("state", state, list(state_shapes)), strict=True),
    ]
    _check.same_kind(("inputs", inputs), *given)
    sizes = _check.layouts(("inputs", inputs, "T B X"), ("step_mask", step_mask, "T B"))
    if sizes["X"] != memory.input_size:
        raise ValueError(f"inputs: expected input_size {memory.input_size} in the last dimension, got {sizes['X']}")
    shapes = parameter_shapes | {name: (sizes["B"], *shape) for name, shape in state_shapes.items()}
    for name, tensor in given:
        _check.has_shape(name, tensor, shapes[name])
    if step_mask is not None:
        _check.dtypes("step_mask", step_mask, (torch.uint8,))
        _check.same_kind(("inputs", inputs), ("step_mask", step_mask), device_only=True)
        _check_bits(memory.controller, step_mask)
        found = -1 if memory.accesses < 0 else _accesses(step_mask)
        if found > memory.accesses:
            raise ValueError(
                f"accesses: expected at least the {found} steps of step_mask that write or read, got {memory.accesses}"
            )
    elif memory.accesses >= 0 and memory.accesses != sizes["T"]:
        raise ValueError(f"accesses: expected -1 without a step mask, got {memory.accesses}")


def _check_bits(controller: str, step_mask: Tensor) -> None:
    if isinstance(step_mask, FakeTensor) or step_mask.is_meta:
        return
    if step_mask.numel() and step_mask.max() > 7:
        raise ValueError(f"step_mask: expected sums of 1, 2 and 4, got {int(step_mask.max())}")
    if controller == "feedforward":
        bare = (step_mask != 0) & (step_mask & 1 == 0)
        if bare.any():
            raise ValueError(
                "step_mask: expected 1 wherever there is 2 or 4, as a feed-forward controller that is off has nothing"
                f" to say to the memory, got {int(step_mask[bare][0])}"
            )


def select(stem: str, inputs: Tensor, backend: str | None = None) -> _select.Choice:
    """The backend of a sequence op."""
    return _select.choose(stem, inputs, {"cpp": _select.cpp_refusal(inputs), **_lacking(stem)}, backend)


def of_a_module(stem: str, inputs: Tensor) -> tuple[str | None, str]:
    """The backend that runs whole sequences faster than the steps of a module do, and why; or None, and why not."""
    try:
        choice = select(stem, inputs)
    except _select.BackendUnavailable as error:
        return None, str(error)
    if choice.backend == "reference":
        return None, f"a whole sequence would run on the reference: {choice.reason}"
    return choice


def _lacking(stem: str) -> dict[str, str]:
    """The backends without this op, and why."""
    lacking = {"triton": "there are Triton kernels for the steps of a sequence, none for the whole"}
    if not _select.cpp_has(stem):
        lacking["cpp"] = f"the C++ extension has no {stem}"
    return lacking


def register(stem: str, decoded: Decoder, translate: Callable[..., tuple[Any, ...]]) -> None:
    """Defines `fastmem::<stem>` and its backward. `decoded` checks what it decodes."""

    def check(
        inputs: Tensor,
        parameters: Sequence[Tensor],
        state: Sequence[Tensor],
        step_mask: Tensor | None,
        shape: Sequence[int],
        options: Sequence[str],
        constants: Sequence[float],
        save_tape: bool,
    ) -> None:
        _check_sequence(decoded(shape, options, constants), inputs, parameters, state, step_mask)

    def fake(inputs: Tensor, *rest: Any) -> list[Tensor]:
        *_, shape, options, constants, save_tape = rest
        results, tape = decoded(shape, options, constants).result_shapes(*inputs.shape[:2])
        return [inputs.new_empty(sizes) for sizes in (*results, *(tape if save_tape else []))]

    def check_backward(
        grad_outputs: Tensor | None,
        grad_state: Sequence[Tensor | None],
        tape: Sequence[Tensor],
        inputs: Tensor,
        parameters: Sequence[Tensor],
        state: Sequence[Tensor],
        step_mask: Tensor | None,
        shape: Sequence[int],
        options: Sequence[str],
        constants: Sequence[float],
        output_mask: Sequence[bool],
    ) -> None:
        memory = decoded(shape, options, constants)
        _check_sequence(memory, inputs, parameters, state, step_mask)
        results, taped = memory.result_shapes(*inputs.shape[:2])
        names = [f"grad_{name}" for name in ("outputs", *memory.state_shapes())]
        names += [f"tape[{i}]" for i in range(len(taped))]
        tensors, shapes = [grad_outputs, *grad_state, *tape], [*results, *taped]
        for argument, given, expected in (
            ("tape", tape, len(taped)),
            ("grad_state", grad_state, len(results) - 1),
            ("output_mask", output_mask, 1 + len(parameters) + len(state)),
        ):
            if len(given) != expected:
                raise ValueError(f"{argument}: expected {expected} entries, got {len(given)}")
        for name, tensor, sizes in zip(names, tensors, shapes, strict=True):
            if tensor is not None:
                _check.same_kind(("inputs", inputs), (name, tensor))
                _check.has_shape(name, tensor, sizes)

    def fake_backward(*given: Any) -> list[Tensor]:
        inputs, parameters, state, *_, output_mask = given[3:]
        tensors = (inputs, *parameters, *state)
        return [t.new_empty(t.shape if wants else 0) for t, wants in zip(tensors, output_mask, strict=True)]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, parameters, state, step_mask, *ctx.options, _ = inputs
        tape = output[1 + len(state) :]
        ctx.counts = (len(tape), 1, len(parameters), len(state), 1)
        ctx.save_for_backward(*tape, tensors, *parameters, *state, step_mask)
        ctx.mark_non_differentiable(*tape)

    def backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        saved = iter(ctx.saved_tensors)
        tape, (inputs,), parameters, state, (step_mask,) = ([next(saved) for _ in range(n)] for n in ctx.counts)
        if not tape:
            raise RuntimeError(f"{stem}: expected save_tape=True where a gradient is asked for, got False")
        needs = ctx.needs_input_grad
        output_mask = [needs[0], *needs[1], *needs[2]]
        grad_outputs, *grad_state = grads[: 1 + len(state)]
        gradients = _library.call(
            f"{stem}_backward", grad_outputs, grad_state, tape, inputs, parameters, state, step_mask, *ctx.options,
            output_mask, backend=ctx.backend,
        )  # fmt: skip
        wanted = [gradient if wants else None for gradient, wants in zip(gradients, output_mask, strict=True)]
        into_inputs, into_parameters, into_state = wanted[0], wanted[1 : 1 + len(parameters)], wanted[-len(state) :]
        return into_inputs, into_parameters, into_state, None, *(None for _ in ctx.options), None

    _library.register(
        stem, stem, SCHEMA, select=_selector(stem, 0), check=check, fake=fake, translate=translate,
        lacking=_lacking(stem),
    )  # fmt: skip
    _library.register(
        stem, f"{stem}_backward", BACKWARD_SCHEMA, select=_selector(stem, 3), check=check_backward, fake=fake_backward
    )
    _library.register_autograd(stem, setup_context, backward)
    _library.register_autocast(stem)
    _library.refuse_vmap(stem, "no vmap of a whole sequence; fold its dimension into the batch")


def _selector(stem: str, position: int) -> Callable[..., _select.Choice]:
    """Chooses by the inputs, which are the argument at this position."""
    return lambda *given, backend=None: select(stem, given[position], backend)
