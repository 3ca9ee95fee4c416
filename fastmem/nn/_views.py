"""What a DNC looked at: every weighting and gate of its steps, for plots."""

from typing import Any, NamedTuple

from torch import Tensor

from fastmem.reference._interface import constrain, interface_shapes, split
from fastmem.reference.dnc_step import replayed


class DNCViews(NamedTuple):
    """The weightings and gates of a run, outside the graph.

    Each has time first, `[T, B, ...]`, with zeros where a sequence has ended; `[T, ...]` without a batch. A call of a
    DNCCell or of `step` has no T, and always a B.
    """

    usage: Tensor  # [T,B,N]
    retention: Tensor  # [T,B,N], the share of the usage that the free gates kept
    allocation_weights: Tensor  # [T,B,Q,N]
    write_content_weights: Tensor  # [T,B,Q,N]
    write_weights: Tensor  # [T,B,Q,N]
    precedence: Tensor  # [T,B,Q,N]
    link: Tensor  # [T,B,Q,N,N]
    forward_weights: Tensor  # [T,B,Q,R,N], sharpened where the module does so
    backward_weights: Tensor  # [T,B,Q,R,N], sharpened where the module does so
    read_content_weights: Tensor  # [T,B,R,N]
    read_weights: Tensor  # [T,B,R,N]
    free_gates: Tensor  # [T,B,R]
    allocation_gates: Tensor  # [T,B,Q]
    write_gates: Tensor  # [T,B,Q]
    read_modes: Tensor  # [T,B,R,2Q+1]: backward 1..Q, content, forward 1..Q


def views_of_step(interface: Tensor, results: tuple[Tensor, ...], options: dict[str, Any]) -> DNCViews:
    """From the interface vector, the results of the step with its tape, and its options."""
    interface, memory, usage, precedence, link, write_weights, read_weights, _, tape = (
        tensor.detach() for tensor in (interface, *results)
    )
    slots, word = memory.shape[1:]
    heads = (read_weights.shape[1], write_weights.shape[1])
    parts = replayed(tape, slots, *heads, options["sharpened"])
    bound = float("inf") if options["clip"] is None else options["clip"]
    raw = split(interface.clamp(-bound, bound), interface_shapes(word, *heads, options["masked"], options["sharpened"]))
    fields = constrain(raw, options["oneplus"], options["mask_floor"])
    return DNCViews(
        usage=usage,
        retention=parts.retention,
        allocation_weights=parts.allocated,
        write_content_weights=parts.found,
        write_weights=write_weights,
        precedence=precedence,
        link=link,
        forward_weights=parts.sharp_forward,
        backward_weights=parts.sharp_backward,
        read_content_weights=parts.content,
        read_weights=read_weights,
        free_gates=fields.free_gates,
        allocation_gates=fields.allocation_gates,
        write_gates=fields.write_gates,
        read_modes=fields.read_modes,
    )
