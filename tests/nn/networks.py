"""The networks in small, and what tests need to know of each to try what all of them promise."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastmem.nn import DNC, LRUA, NTM, DNCCell, DNCState, LRUACell, LRUAState, NTMCell, NTMState, ProgramMemory
from tests.golden import error


@dataclass(frozen=True)
class Network:
    sequence: type[Any]
    cell: type[Any]
    state: type[Any]
    step_: str  # the op that runs it in place
    options: dict[str, Any]  # of the small one
    variants: dict[str, dict[str, Any]]
    reset: Callable[..., Any]  # a state, rows and the network -> the state with these rows as before the first step
    written: tuple[int, int | None] = (1, None)  # which of that op's arguments are written to: from, and up to

    def small(self, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
        return self._made(self.sequence, dtype, seed, **options)

    def small_cell(self, dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> Any:
        return self._made(self.cell, dtype, seed, **options)

    def _made(
        self,
        module: type[Any],
        dtype: torch.dtype,
        seed: int,
        programs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """`programs`: options of the stored programs that make its interface vector; None: a linear layer does."""
        torch.manual_seed(seed)
        options = {"num_slots": 7, "output_size": 3, **self.options, **options}
        net = module(4, 6, word_size=5, dtype=dtype, **options)
        if programs is not None:
            kind = {"device": options.get("device"), "dtype": dtype}
            size, runs = net.interface.out_features, net.interface_runs()
            net.interface = ProgramMemory(net.hidden_size, size, **programs, runs=runs, **kind)
        return net

    def assert_state_close(self, actual: Any, expected: Any, tolerance: float = 1e-13) -> None:
        assert isinstance(actual, self.state)
        for name, a, e in zip(self.state._fields, actual, expected, strict=True):
            assert error(a, e) < tolerance, name


NETWORKS = {
    "dnc": Network(
        DNC, DNCCell, DNCState, "dnc_step_",
        options={"num_read_heads": 2, "num_write_heads": 2},
        variants={
            "plain": {},
            "masked": {"masked": True, "mask_floor": 0.1},
            "deallocates": {"deallocates": True},
            "sharpened": {"sharpened": True, "norm": "outer"},
            "all": {"masked": True, "deallocates": True, "sharpened": True, "norm": "rsqrt"},
            "softplus": {"oneplus": False, "norm": "clamp", "clip": None},
            "gru": {"controller": "gru"},
            "feedforward": {"controller": "feedforward"},
            "layernorm": {"controller": "layernorm_lstm"},
            "two_layers": {"num_layers": 2},
            "two_layers_layernorm": {"controller": "layernorm_lstm", "num_layers": 2},
            "three_layers_gru": {"controller": "gru", "num_layers": 3, "masked": True},
            "two_layers_feedforward": {"controller": "feedforward", "num_layers": 2},
            "programs": {"programs": {"num_programs": 3, "key_size": 2}},
            "attended_programs": {"programs": {"num_programs": 2, "direct_attention": True}, "masked": True},
        },
        reset=lambda state, rows, net: state.reset(rows),
    ),
    "ntm": Network(
        NTM, NTMCell, NTMState, "ntm_step_",
        options={"heads": "rw"},
        variants={
            "plain": {},
            "write_first": {"heads": "wr"},
            "pairs": {"heads": "rwrw"},
            "joint": {"heads": "rwwr", "joint_writes": True},
            "published": {
                "form": "power", "reversed_shift": True, "norm": "clamp", "clip": None, "random_memory": True,
            },
            "far": {"max_shift": 2},
            "no_shift": {"max_shift": 0},
            "read_only": {"heads": "r"},
            "gru": {"controller": "gru", "num_layers": 2},
            "layernorm": {"controller": "layernorm_lstm"},
            "feedforward": {"controller": "feedforward"},
            "programs": {"programs": {"num_programs": 2, "key_size": 3}, "heads": "rwr"},
            "published_programs": {
                "programs": {"num_programs": 2, "tanh_keys": True, "norm": "width", "author_init": True},
                "form": "power", "reversed_shift": True, "norm": "clamp", "clip": None,
            },
        },
        reset=lambda state, rows, net: state.reset(rows, net.initial_state(len(state.memory))),
    ),
    "lrua": Network(
        LRUA, LRUACell, LRUAState, "memory_write_",
        options={"num_read_heads": 2},
        variants={
            "plain": {},
            "strengths": {"strengths": True, "norm": "outer"},
            "one_head": {"num_read_heads": 1, "num_slots": 3, "norm": "rsqrt"},
            "as_many_heads_as_slots": {"num_read_heads": 3, "num_slots": 3},
            "unbounded": {"clip": None, "decay": 0.5, "norm": "clamp"},
            "gru": {"controller": "gru", "num_layers": 2},
            "layernorm": {"controller": "layernorm_lstm"},
            "feedforward": {"controller": "feedforward", "strengths": True},
            "programs": {"programs": {"num_programs": 2}, "strengths": True},
        },
        reset=lambda state, rows, net: state.reset(rows),
        written=(0, 1),
    ),
}  # fmt: skip

IN_ONE_OP = {name: network for name, network in NETWORKS.items() if network.sequence.sequence_stem is not None}


def sequence(steps: int = 6, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(steps, batch, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def by_hand(net: Any, x: Tensor, state: Any, writes: Tensor | None = None, lengths: Any = None) -> tuple[Tensor, Any]:
    """A sequence `[T, B, X]` after the other, by the parts of a step: where it does not write the memory rests."""
    outputs, states = [], []
    for row, length in enumerate([len(x)] * x.shape[1] if lengths is None else lengths):
        own, told = type(state)._make(part[row : row + 1] for part in state), []
        for time in range(length):
            seen = torch.cat([x[time, row : row + 1], own.reads.flatten(1)], -1)
            top, hidden, cell = net.control(seen, own.hidden, own.cell)
            own = own._replace(hidden=hidden, cell=cell)
            if writes is None or writes[time, row]:
                own = net.access(net.interface(top), own)
            told.append(net.project(torch.cat([top, own.reads.flatten(1)], -1)))
        outputs.append(torch.cat([*told, x.new_zeros(len(x) - length, net.output_size)]))
        states.append(own)
    return torch.stack(outputs, 1), type(state)(*(torch.cat(parts) for parts in zip(*states, strict=True)))


def leaves_of(state: Any) -> Any:
    """The same state without a graph, to differentiate by."""
    return type(state)._make(part.detach().clone().requires_grad_() for part in state)


def assert_same_run(actual: Any, expected: Any, inputs: Any, tolerance: float = 1e-12) -> None:
    """Outputs, last states, and the gradients of all inputs from random weights of both."""
    runs = [(output, *state) for output, state in (actual, expected)]
    for i, (a, e) in enumerate(zip(*runs, strict=True)):
        assert error(a, e) < tolerance, f"part {i} of output and state"
    runs = [[a for a, e in zip(run, runs[1], strict=True) if e.requires_grad] for run in runs]
    weights = [torch.randn_like(part) for part in runs[1]]
    gradients = [torch.autograd.grad(run, inputs, weights, materialize_grads=True, retain_graph=True) for run in runs]
    for i, (a, e) in enumerate(zip(*gradients, strict=True)):
        assert error(a, e) < tolerance, f"gradient {i}"
