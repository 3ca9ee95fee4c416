import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastmem
from fastmem.nn import NTMState
from fastmem.ops import NTMConfig
from fastmem.reference import ntm_sequence as reference
from fastmem.reference.ntm_step import told
from tests.cases import ntm_sequence as cases
from tests.ops.sequences import PROGRAMS, SequenceSuite, controlled, flat, output_by_hand, told_by_hand


class TestNTMSequence(SequenceSuite):
    op = staticmethod(flat(fastmem.ntm_sequence))
    memory = reference.NTMMemory
    reference = reference
    cases = cases
    differentiable_outputs = 6
    batched = ("inputs", *NTMState._fields)
    strided = "memory"

    @staticmethod
    def step(
        x: Tensor, p: dict[str, Tensor], state: dict[str, Tensor], bits: int, c: NTMConfig
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Of one sample, what the bits say of it."""
        s, top = dict(state), state["hidden"]
        if bits & 1:
            top, s["cell"] = controlled(c, p, torch.cat([x, s["reads"].flatten(1)], -1), s)
            s["hidden"] = s["hidden"] if c.controller == "feedforward" else top
        if bits & 6:
            bound = float("inf") if c.clip is None else c.clip
            _, fields = told(told_by_hand(c, p, top), c.heads, c.word_size, bound)
        weights, reads, start = list(s["weights"].split(1, 1)), list(s["reads"].split(1, 1)), s["memory"]
        later = []
        for head, kind in enumerate(c.heads):
            if not bits & {"w": 2, "r": 4}[kind]:
                continue
            f, memory = fields[head], start if c.joint_writes else s["memory"]
            content = fastmem.content_addressing(memory, f.key, f.strength, norm=c.norm, eps=c.eps)
            weights[head] = fastmem.location_addressing(
                content, weights[head], f.gate, f.shift, f.sharpness, reversed_shift=c.reversed_shift, form=c.form,
                eps=c.sharpen_eps,
            )  # fmt: skip
            if kind == "r":
                reads[c.heads[:head].count("r")] = weights[head] @ memory
            elif c.joint_writes:
                later.append((weights[head], f.erase, f.values))
            else:
                s["memory"] = fastmem.memory_write(memory, weights[head], f.erase, f.values)
        if later:
            s["memory"] = fastmem.memory_write(start, *(torch.cat(parts, 1) for parts in zip(*later, strict=True)))
        s["weights"] = torch.cat(weights, 1)
        s["reads"] = torch.cat(reads, 1)
        return output_by_hand(c, p, top, s["reads"], bits), s


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    steps=st.integers(0, 20), batch=st.integers(0, 3), hidden_size=st.integers(1, 20), slots=st.integers(1, 20),
    word=st.integers(1, 9), heads=st.text("rw", min_size=1, max_size=4), max_shift=st.integers(0, 2),
    joint_writes=st.booleans(), mask=st.sampled_from([None, "any", "padded", "intervals"]),
    controller=st.sampled_from(["lstm", "layernorm_lstm"]), projected=st.booleans(), programs=PROGRAMS,
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(**sizes):
    values = cases.make(dtype=torch.float64, **sizes)
    suite = TestNTMSequence()
    suite.agree(suite.run(values), suite.oracle(values), values, bound=1e-11)


def test_wrong_options_are_named():
    for wrong, message in (
        ({"heads": "rx"}, "heads: expected letters r and w, such as \"rw\", got 'rx'"),
        ({"max_shift": -1}, "max_shift: expected an integer of at least 0, got -1"),
        ({"form": "hard"}, "form: expected one of softmax, power, got 'hard'"),
        ({"joint_writes": 1}, "joint_writes: expected True or False, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            NTMConfig(3, 6, 7, 4, **wrong)
