"""The tests that every sequence op passes: the suite of all ops on its tensors by name, and the laws of sequences."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import fastmem
from fastmem.ops._sequence import spacing
from fastmem.reference._sequence import Memory
from tests.helpers import as_tuple, assert_close, is_differentiable
from tests.ops.suite import OpSuite


class SequenceSuite(OpSuite):
    public_op: Callable[..., Any]  # the function that takes lists, wrapped in staticmethod
    memory: Callable[..., Memory]  # the reference's, from an encoded configuration
    time_major = ("inputs", "output 0")
    backends = ("reference", "cpp")

    @classmethod
    def taken_apart(cls, values: Any) -> list[Any]:
        """The arguments of the public function from a flat list of all tensors, the step mask and the configuration."""
        inputs, *tensors, step_mask, config = values
        count = len(cls.memory(*config.encoded(4)).parameter_shapes())
        return [inputs, tensors[:count], tensors[count:], config, step_mask]

    def public(self, values: dict[str, Any]) -> list[Any]:
        return self.taken_apart(values.values())

    def encoded(self, values: Any, save_tape: bool) -> tuple[Any, ...]:
        """The arguments of the op itself."""
        inputs, parameters, state, config, step_mask = self.taken_apart(values)
        return inputs, parameters, state, step_mask, *config.encoded(spacing(len(inputs))), save_tape

    def plain(self, *values: Any) -> Any:
        return super().plain(*self.encoded(values, False))

    def names_of_state(self, values: dict[str, Any]) -> list[str]:
        return list(self.memory(*values["config"].encoded(4)).state_shapes())

    def by_sample(self, name: str, value: Tensor) -> Tensor:
        return value.transpose(0, 1) if name in self.time_major else value
