"""The ops: schema, checks, selection, gradient and public function of each, one file an op."""

from fastmem.ops.content_addressing import content_addressing
from fastmem.ops.content_read import content_read
from fastmem.ops.location_addressing import location_addressing
from fastmem.ops.program_lookup import program_lookup
from fastmem.ops.sharpen import sharpen
from fastmem.ops.temporal_linkage import temporal_linkage, temporal_linkage_

__all__ = [
    "content_addressing",
    "content_read",
    "location_addressing",
    "program_lookup",
    "sharpen",
    "temporal_linkage",
    "temporal_linkage_",
]
