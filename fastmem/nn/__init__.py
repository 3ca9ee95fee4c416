"""Modules built from the ops, called like torch.nn.LSTM."""

from fastmem.nn._views import DNCViews
from fastmem.nn.dnc import DNC, DNCCell, DNCState

__all__ = ["DNC", "DNCCell", "DNCState", "DNCViews"]
