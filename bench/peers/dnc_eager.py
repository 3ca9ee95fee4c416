"""The DNC of bench.peers.dnc_textbook with the fastest memory step that eager operators allow."""

from torch import Tensor

from bench.peers import dnc_step
from bench.peers.dnc_textbook import Memory, TextbookDNC


class EagerDNC(TextbookDNC):
    def access(self, interface: Tensor, state: Memory) -> tuple[Memory, Tensor]:
        *after, reads = dnc_step.fast_eager(interface, *state)
        return Memory(*after), reads
