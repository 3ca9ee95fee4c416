"""The neural universal Turing machine: a network with a memory whose interface is made by stored programs."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from fastmem.nn._network import Schedule
from fastmem.nn.dnc import DNC
from fastmem.nn.lrua import LRUA
from fastmem.nn.ntm import NTM
from fastmem.nn.program_memory import ProgramMemory
from fastmem.ops import _content

CORES: dict[str, Any] = {"ntm": NTM, "dnc": DNC, "lrua": LRUA}


class NUTM(nn.Module):
    r"""Neural universal Turing machine, called like :class:`torch.nn.LSTM`.

    An :class:`NTM`, :class:`DNC` or :class:`LRUA` in which each control head has P stored programs, and a meta network
    that mixes them anew at each step: a :class:`ProgramMemory` in place of the linear interface. The heads are those of
    an NTM or LRUA; a DNC has one for what concerns reading (keys, strengths, free gates, modes) and one for writing
    (the published DNC core cuts its vector elsewhere, across fields of both). Source: Le et al. 2020, "Neural
    Stored-program Memory".

    Args:
        input_size (int), hidden_size (int), num_slots (int), word_size (int): X, H, N and W, as for the core.
        num_programs (int): P, of each head. Default: 2.
        key_size (int, optional): width K of queries and keys. Default: None, P.
        core (str): "ntm", "dnc" or "lrua". Default: "ntm".
        direct_attention, hard, tanh_keys, author_init (bool), temperature (float), program_norm (str), program_eps
            (float, optional): as for :class:`ProgramMemory`, whose `norm` and `eps` the last two are.
        **options: further ones of the core: output_size, batch_first, heads, controller, ...

    Inputs, Outputs: as for the core: `input, state, lengths, write_schedule` -> `output, state`.

    Attributes:
        core (Module): the network; `core.interface` is the :class:`ProgramMemory`. input_size, hidden_size,
        output_size, num_slots, word_size, batch_first: those of the core.

    Cost: a step makes P interface vectors, by one matrix product; programs found by content run inside the op on whole
    sequences where the core would, hard ones step by step. `fastmem.explain(net, input)` tells which, and why.

    Raises:
        TypeError: for options that the core does not have, or of another type.
        ValueError: for sizes or options that do not fit.

    Example::

        net = fastmem.nn.NUTM(10, 80, num_slots=256, word_size=20, num_programs=2, output_size=8)
        output, state = net(torch.randn(25, 3, 10))
        loss = output.square().mean() + 0.1 * fastmem.nn.program_diversity_loss(net)
        with net.watched() as views:
            net(torch.randn(25, 3, 10))
        views[0].program_weights    # [25, 3, 2, 2]: by step, sample, head and program
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_slots: int,
        word_size: int,
        num_programs: int = 2,
        key_size: int | None = None,
        core: str = "ntm",
        direct_attention: bool = False,
        hard: bool = False,
        temperature: float = 1.0,
        tanh_keys: bool = False,
        program_norm: str = "inner",
        program_eps: float | None = None,
        author_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if not isinstance(core, str) or core not in CORES:
            raise ValueError(f"core: expected one of {', '.join(CORES)}, got {core!r}")
        program_eps = _content.resolve_eps(program_norm, program_eps, "program_")
        kind: dict[str, Any] = {"device": device, "dtype": dtype}
        self.core: Any = CORES[core](input_size, hidden_size, num_slots, word_size, **options, **kind)
        self.core.interface = ProgramMemory(
            self.core.hidden_size, self.core.interface.out_features, num_programs, key_size, self.core.interface_runs(),
            direct_attention, hard, temperature, tanh_keys, program_norm, program_eps, author_init, **kind,
        )  # fmt: skip
        self.input_size, self.hidden_size, self.output_size = (
            self.core.input_size,
            self.core.hidden_size,
            self.core.output_size,
        )
        self.num_slots, self.word_size = self.core.num_slots, self.core.word_size

    @property
    def batch_first(self) -> bool:
        """Whether input and output have the batch first, as the core has them."""
        return bool(self.core.batch_first)

    def reset_parameters(self) -> None:
        """Draws all parameters anew."""
        self.core.reset_parameters()

    def initial_state(self, batch_size: int) -> Any:
        """The state before the first step, that of the core."""
        return self.core.initial_state(batch_size)

    def watched(self) -> AbstractContextManager[list[Any]]:
        """Every call inside appends what it looked at to the list, the views of the core."""
        return self.core.watched()

    def served(self, *arguments: Any, **named: Any) -> tuple[str, str]:
        """Whether a call runs whole sequences in one op, and why; for :func:`fastmem.explain`."""
        return self.core.served(*arguments, **named)

    def forward(
        self,
        input: Tensor | PackedSequence,
        state: Any = None,
        lengths: Tensor | Sequence[int] | None = None,
        write_schedule: Schedule = None,
    ) -> tuple[Tensor | PackedSequence, Any]:
        """Runs sequences; see the class."""
        return self.core(input, state, lengths, write_schedule)
