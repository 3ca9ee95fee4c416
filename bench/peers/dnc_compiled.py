"""The DNC of bench.peers.dnc_textbook with its time step under torch.compile, and a Python loop over time.

A graph of the whole sequence would be compiled anew for every length, and takes minutes for each.
"""

import warnings
from typing import Any

import torch

from bench.peers.dnc_textbook import TextbookDNC


class CompiledDNC(TextbookDNC):
    def __init__(self, *sizes: Any, **named: Any) -> None:
        super().__init__(*sizes, **named)
        warnings.filterwarnings("ignore", message=".*lru_cache", category=UserWarning)  # traces the cached mask
        self.advance = torch.compile(self.advance, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
