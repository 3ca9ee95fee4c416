"""Modules built from the ops, called like torch.nn.LSTM."""

from fastmem.nn._views import DNCViews, NTMViews
from fastmem.nn.dnc import DNC, DNCCell, DNCState
from fastmem.nn.ntm import NTM, NTMCell, NTMState
from fastmem.nn.write_schedule import WriteSchedule

__all__ = ["DNC", "NTM", "DNCCell", "DNCState", "DNCViews", "NTMCell", "NTMState", "NTMViews", "WriteSchedule"]
