"""Modules built from the ops, called like torch.nn.LSTM."""

from fastmem.nn._views import DNCViews, LRUAViews, NTMViews
from fastmem.nn.dnc import DNC, DNCCell, DNCState
from fastmem.nn.lrua import LRUA, LRUACell, LRUAState
from fastmem.nn.ntm import NTM, NTMCell, NTMState
from fastmem.nn.write_schedule import WriteSchedule

__all__ = [
    "DNC",
    "LRUA",
    "NTM",
    "DNCCell",
    "DNCState",
    "DNCViews",
    "LRUACell",
    "LRUAState",
    "LRUAViews",
    "NTMCell",
    "NTMState",
    "NTMViews",
    "WriteSchedule",
]
