"""The ops: schema, checks, selection, gradient and public function of each, one file an op."""

from fastmem.ops.temporal_linkage import temporal_linkage, temporal_linkage_

__all__ = ["temporal_linkage", "temporal_linkage_"]
