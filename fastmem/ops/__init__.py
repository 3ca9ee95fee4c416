"""The ops: schema, checks, selection, gradient and public function of each, one file an op."""

from fastmem.ops._sequence import ProgramConfig
from fastmem.ops.allocation import allocation
from fastmem.ops.cached_attention import cached_attention
from fastmem.ops.content_addressing import content_addressing
from fastmem.ops.content_read import content_read
from fastmem.ops.dnc_sequence import DNCConfig, dnc_sequence
from fastmem.ops.dnc_step import dnc_step, dnc_step_
from fastmem.ops.location_addressing import location_addressing
from fastmem.ops.memory_write import memory_write, memory_write_
from fastmem.ops.ntm_sequence import NTMConfig, ntm_sequence
from fastmem.ops.ntm_step import ntm_step, ntm_step_
from fastmem.ops.program_lookup import program_lookup
from fastmem.ops.program_mix import program_mix
from fastmem.ops.sharpen import sharpen
from fastmem.ops.temporal_linkage import temporal_linkage, temporal_linkage_
from fastmem.ops.usage_update import usage_update
from fastmem.ops.weighted_read import weighted_read

__all__ = [
    "DNCConfig",
    "NTMConfig",
    "ProgramConfig",
    "allocation",
    "cached_attention",
    "content_addressing",
    "content_read",
    "dnc_sequence",
    "dnc_step",
    "dnc_step_",
    "location_addressing",
    "memory_write",
    "memory_write_",
    "ntm_sequence",
    "ntm_step",
    "ntm_step_",
    "program_lookup",
    "program_mix",
    "sharpen",
    "temporal_linkage",
    "temporal_linkage_",
    "usage_update",
    "weighted_read",
]
