"""Modules built from the ops, called like torch.nn.LSTM."""

from fastmem.nn.dnc import DNC, DNCState

__all__ = ["DNC", "DNCState"]
