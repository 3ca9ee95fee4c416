"""Tasks of the papers: data, losses and metrics."""

from fastmem.tasks.repeat_copy import RepeatCopy

__all__ = ["RepeatCopy"]
