"""The ops: schema, checks, selection, gradient and public function of each, one file an op."""

from fastmem.ops.content_addressing import content_addressing
from fastmem.ops.content_read import content_read
from fastmem.ops.memory_write import memory_write, memory_write_
from fastmem.ops.program_lookup import program_lookup
from fastmem.ops.temporal_linkage import temporal_linkage, temporal_linkage_
from fastmem.ops.weighted_read import weighted_read

__all__ = [
    "content_addressing",
    "content_read",
    "memory_write",
    "memory_write_",
    "program_lookup",
    "temporal_linkage",
    "temporal_linkage_",
    "weighted_read",
]
