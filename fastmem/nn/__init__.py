"""Modules built from the ops, called like torch.nn.LSTM."""

from fastmem.nn._views import DNCViews, LRUAViews, NTMViews
from fastmem.nn.cached_uniform_writing import CachedUniformWriting
from fastmem.nn.dnc import DNC, DNCCell, DNCState
from fastmem.nn.lrua import LRUA, LRUACell, LRUAState
from fastmem.nn.ntm import NTM, NTMCell, NTMState
from fastmem.nn.nutm import NUTM
from fastmem.nn.program_memory import (
    ProgramMemory,
    program_diversity_loss,
    program_diversity_weight,
    program_orthogonality_loss,
)
from fastmem.nn.write_schedule import WriteSchedule, contribution_bound, optimal_intervals

__all__ = [
    "DNC",
    "LRUA",
    "NTM",
    "NUTM",
    "CachedUniformWriting",
    "DNCCell",
    "DNCState",
    "DNCViews",
    "LRUACell",
    "LRUAState",
    "LRUAViews",
    "NTMCell",
    "NTMState",
    "NTMViews",
    "ProgramMemory",
    "WriteSchedule",
    "contribution_bound",
    "optimal_intervals",
    "program_diversity_loss",
    "program_diversity_weight",
    "program_orthogonality_loss",
]
