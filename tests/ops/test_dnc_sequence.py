from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmem
from fastmem.nn import DNCState
from fastmem.ops import DNCConfig
from fastmem.reference import dnc_sequence as reference
from fastmem.reference._interface import constrain, interface_shapes, split
from tests.cases import dnc_sequence as cases
from tests.helpers import run_with_gradients
from tests.ops.sequences import PROGRAMS, SequenceSuite, controlled, flat, output_by_hand, told_by_hand
from tests.ops.suite import native


class TestDNCSequence(SequenceSuite):
    op = staticmethod(flat(fastmem.dnc_sequence))
    memory = reference.DNCMemory
    reference = reference
    cases = cases
    differentiable_outputs = 10
    batched = ("inputs", *DNCState._fields)
    strided = "link"

    def smooth_inputs(self, case: str) -> dict[str, Any]:
        """Without the cut in the gradient, which a difference cannot see."""
        return self.inputs(case, detach_usage_write=False)

    @staticmethod
    def step(
        x: Tensor, p: dict[str, Tensor], state: dict[str, Tensor], bits: int, c: DNCConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of one sample, what the bits say of it."""
        s, top = dict(state), state["hidden"]
        if bits & 1:
            seen = torch.cat([x, s["reads"].flatten(1)], -1)
            top, s["cell"] = controlled(c, p, seen, s)
            s["hidden"] = s["hidden"] if c.controller == "feedforward" else top
        bound = float("inf") if c.clip is None else c.clip
        if bits & 6:
            raw = told_by_hand(c, p, top).clamp(-bound, bound)
            shapes = interface_shapes(c.word_size, c.num_read_heads, c.num_write_heads, c.masked, c.sharpened)
            f = constrain(split(raw, shapes), c.oneplus, c.mask_floor)
            content = {"norm": c.norm, "eps": c.eps}
        before = s["read_weights"]
        if bits & 2:
            written = s["write_weights"].detach() if c.detach_usage_write else s["write_weights"]
            s["usage"], retention = fastmem.usage_update(s["usage"], written, before, f.free_gates)
            allocated = fastmem.allocation(s["usage"], f.allocation_gates * f.write_gates, c.allocation_eps)
            found = fastmem.content_addressing(s["memory"], f.write_keys, f.write_strengths, f.write_masks, **content)
            mixed = f.allocation_gates.unsqueeze(-1) * allocated + (1 - f.allocation_gates).unsqueeze(-1) * found
            s["write_weights"] = f.write_gates.unsqueeze(-1) * mixed
            s["memory"] = fastmem.memory_write(
                s["memory"], s["write_weights"], f.erase, f.values, retention if c.deallocates else None
            )
            s["link"], s["precedence"], *_ = fastmem.temporal_linkage(
                s["link"], s["precedence"], s["write_weights"], before
            )
        if bits & 4:
            forward = torch.einsum("bqij,brj->bqri", s["link"], before)
            backward = torch.einsum("bqij,bri->bqrj", s["link"], before)
            if c.sharpened:
                forward, backward = (
                    torch.stack([fastmem.sharpen(part, sharpness) for part in ways.unbind(1)], 1)
                    for ways, sharpness in ((forward, f.forward_sharpness), (backward, f.backward_sharpness))
                )
            similar = fastmem.content_addressing(s["memory"], f.read_keys, f.read_strengths, f.read_masks, **content)
            ways = torch.cat([backward, similar.unsqueeze(1), forward], 1)
            s["read_weights"] = torch.einsum("brm,bmrn->brn", f.read_modes, ways)
            s["reads"] = s["read_weights"] @ s["memory"]
        output = output_by_hand(c, p, top, s["reads"], bits)
        return output.clamp(-bound, bound) if c.projected else output, s


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(0, 20), batch=st.integers(0, 3), hidden_size=st.integers(1, 20), slots=st.integers(1, 20),
    word=st.integers(1, 9), read_heads=st.integers(1, 4), write_heads=st.integers(1, 3), masked=st.booleans(),
    deallocates=st.booleans(), sharpened=st.booleans(), mask=st.sampled_from([None, "any", "padded", "intervals"]),
    controller=st.sampled_from(["lstm", "layernorm_lstm"]), projected=st.booleans(), programs=PROGRAMS,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(**sizes):
    values = cases.make(dtype=torch.float64, norm="outer", **sizes)
    suite = TestDNCSequence()
    suite.agree(suite.run(values), suite.oracle(values), values, bound=1e-11)


def test_wrong_options_are_named():
    for wrong in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"mask_floor: expected a number in \[0, 1\), got {wrong}"):
            DNCConfig(3, 6, 7, 4, mask_floor=wrong)
    for name in reference.FLAGS:
        with pytest.raises(ValueError, match=rf"{name}: expected True or False, got 1"):
            DNCConfig(3, 6, 7, 4, **{name: 1})


def test_a_read_without_a_write_sees_the_diagonal_of_a_link_that_is_given():
    """A write clears it; a state may come with one."""
    values = cases.make(steps=1, dtype=torch.float64)
    values["step_mask"] = torch.full((1, 2), 5, dtype=torch.uint8)
    values["link"] = values["link"] + torch.eye(7, dtype=torch.float64)
    suite = TestDNCSequence()
    expected = suite.oracle(values)
    assert expected[1][suite.names(values).index("link")].diagonal(dim1=-2, dim2=-1).any()
    for backend in suite.backends():
        suite.agree(suite.run(values, backend), expected, values)


@native
@pytest.mark.parametrize("masked", [False, True])
def test_a_first_state_that_is_one_for_all_samples_is_read_where_it_is(masked: bool) -> None:
    values = cases.make(batch=5, steps=11, slots=9, dtype=torch.float32)
    for name in ("memory", "link"):
        values[name] = values[name][:1]
    if masked:
        values["step_mask"] = torch.randint(8, (11, 5), dtype=torch.uint8)

    def run(dense: bool) -> list[Tensor]:
        def call(*arguments: Any) -> tuple[Tensor, ...]:
            given = dict(zip(values, arguments, strict=True))
            for name in ("memory", "link"):
                given[name] = given[name].expand(5, *given[name].shape[1:])
                given[name] = given[name].contiguous() if dense else given[name]
                assert dense or given[name].stride(0) == 0
            return TestDNCSequence.op(*given.values(), backend="cpp")

        outputs, gradients = run_with_gradients(call, list(values.values()), 10)
        return [*outputs, *gradients]

    for a, e in zip(run(False), run(True), strict=True):
        assert torch.equal(a, e)


@native
def test_the_bare_op_counts_the_state() -> None:
    values = cases.make()
    config = values.pop("config")
    inputs, step_mask = values.pop("inputs"), values.pop("step_mask")
    state = [values.pop(name) for name in DNCState._fields]
    with pytest.raises(RuntimeError, match="state: expected 9 tensors, got 3"):
        torch.ops.fastmem_cpu.dnc_sequence(
            inputs, list(values.values()), state[:3], step_mask, *config.encoded(8), False
        )
