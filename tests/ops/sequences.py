"""The tests that every sequence op passes: those of all ops, on its tensors one by one, and the laws of sequences."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

import fastmem
from fastmem.ops import _sequence
from fastmem.ops._sequence import spacing
from fastmem.reference._sequence import Memory
from tests.helpers import as_tuple, assert_close, cotangents, is_differentiable, run_with_gradients
from tests.ops.suite import OpSuite, has_cpp

BACKENDS = ["reference", "cpp"]
PROGRAMS = st.none() | st.builds(
    fastmem.ops.ProgramConfig, st.integers(1, 4), st.integers(1, 5), tanh_keys=st.booleans(),
    norm=st.sampled_from(["outer", "width"]),
) | st.builds(fastmem.ops.ProgramConfig, st.integers(1, 4), direct_attention=st.just(True))  # fmt: skip
MASKED = ["padded", "any_parts", "any_parts_feedforward", "any_parts_programs"]


def flat(public_op: Callable[..., Any]) -> Callable[..., Any]:
    """The public function on a flat list, or by name: inputs, parameters, state, the step mask, the configuration."""

    def op(*values: Any, backend: str | None = None, **named: Any) -> tuple[Tensor, ...]:
        outputs, state = public_op(*taken_apart([*values, *named.values()]), backend=backend)
        return outputs, *state

    op.__name__ = public_op.__name__
    return op


def taken_apart(values: Any) -> list[Any]:
    """The arguments of the public function from the flat list."""
    inputs, *tensors, step_mask, config = values
    count = {"lstm": 4, "layernorm_lstm": 4, "feedforward": 2}[config.controller]
    count += (5 if config.programs else 2) + (2 if config.projected else 0)
    return [inputs, tensors[:count], tensors[count:], config, step_mask]


class SequenceSuite(OpSuite):
    memory: Callable[..., Memory]  # the reference's, from an encoded configuration
    step: Callable[..., Any]  # one sample: input, parameters and state by name, bits, configuration -> output, state
    alone = (0, 1)

    def public(self, values: dict[str, Any]) -> list[Any]:
        return taken_apart(values.values())

    def own(self, values: Any, save_tape: bool = True) -> tuple[Any, ...]:
        inputs, parameters, state, config, step_mask = taken_apart(values)
        accesses = -1 if step_mask is None else int((step_mask & 6).any(1).sum())
        return inputs, parameters, state, step_mask, *config.encoded(spacing(len(inputs)), accesses), save_tape

    def plain(self, *values: Any) -> Any:
        return super().plain(*self.own(values, save_tape=False))

    def by_sample(self, name: str, value: Tensor) -> Tensor:
        return value.transpose(0, 1) if name in ("inputs", "output 0") else value

    def loop(self, values: dict[str, Any]) -> tuple[Tensor, ...]:
        """Every sample by itself, step by step, with an if for each part."""
        steps, batch = values["inputs"].shape[:2]
        mask = torch.full((steps, batch), 7) if values["step_mask"] is None else values["step_mask"]
        names = self.memory(*values["config"].encoded(4)).state_shapes()
        outputs, states = [], []
        for sample in range(batch):
            state = {name: values[name][sample : sample + 1] for name in names}
            told = []
            for time in range(steps):
                x, bits = values["inputs"][time, sample : sample + 1], int(mask[time, sample])
                output, state = self.step(x, values, state, bits, values["config"])
                told.append(output)
            outputs.append(torch.stack(told))
            states.append(list(state.values()))
        return torch.cat(outputs, 1), *(torch.cat(parts) for parts in zip(*states, strict=True))

    def test_vmap_equals_a_loop(self, small_case: str) -> None:
        """There is none, and it says so."""
        values = self.inputs(small_case)
        inputs, *rest = values.values()
        with pytest.raises(NotImplementedError, match=f"{self.op.__name__}: no vmap"):
            torch.vmap(lambda x: self.op(x, *rest))(torch.stack([inputs, inputs]))

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_each_sample_alone_step_by_step(self, case: str, backend: str) -> None:
        """The equations anew, by the ops of a step."""
        values = self.inputs(case)
        if values["inputs"].numel() > 200 or not values["inputs"].numel():
            pytest.skip("slow, or nothing to do")
        names = [name for name, value in values.items() if is_differentiable(value)]

        def by_steps(*arguments: Any) -> tuple[Tensor, ...]:
            return self.loop(dict(zip(values, arguments, strict=True)))

        expected = run_with_gradients(by_steps, list(values.values()), self.differentiable_outputs)
        assert len(names) == len(expected[1])
        self.agree(self.run(values, backend), expected, values)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_pieces_equal_the_whole(self, case: str, backend: str) -> None:
        values = self.inputs(case)
        cut = len(values["inputs"]) // 3

        def pieces(*arguments: Any, backend: str | None = None) -> tuple[Tensor, ...]:
            inputs, parameters, state, config, step_mask = taken_apart(arguments)
            parts = []
            for part in (slice(cut), slice(cut, None)):
                mask = None if step_mask is None else step_mask[part]
                output, *state = self.op(inputs[part], *parameters, *state, mask, config, backend=backend)
                parts.append(output)
            return torch.cat(parts), *state

        whole = self.run(values, backend)
        inner = run_with_gradients(
            lambda *arguments: pieces(*arguments, backend=backend), list(values.values()), self.differentiable_outputs
        )
        self.agree(inner, whole, values)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_spacing_changes_no_gradient(self, backend: str) -> None:
        values = self.inputs("any_parts")
        expected = self.run(values, backend)
        inputs, parameters, state, config, step_mask = taken_apart(values.values())
        leaves = [tensor.clone().requires_grad_() for tensor in (inputs, *parameters, *state)]
        cut = 1 + len(parameters)
        op = getattr(torch.ops.fastmem, self.op.__name__)
        for between in (1, 2, 16, 1024):
            results = op(
                leaves[0], leaves[1:cut], leaves[cut:], step_mask, *config.encoded(between), True, backend=backend
            )[: 1 + len(state)]
            gradients = torch.autograd.grad(results, leaves, cotangents(results))
            self.agree((results, gradients), expected, values)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("masked", MASKED)
    def test_samples_held_throughout(self, masked: str, backend: str) -> None:
        """They keep their bits, hand their gradients on bit by bit, and nothing of them shows elsewhere."""
        values = self.inputs(masked)
        values["step_mask"][:, 1] = 0
        clean = self.run(values, backend)
        values["inputs"][:, 1] = float("nan")
        outputs, gradients = self.run(values, backend)
        upstream = cotangents(outputs)
        state = dict(zip(self.names(values)[-len(outputs) + 1 :], range(1, len(outputs)), strict=True))
        assert not outputs[0][:, 1].any()
        for name, gradient, before in zip(self.names(values), gradients, clean[1], strict=True):
            assert torch.equal(gradient, before), name
            if name in state:
                assert torch.equal(outputs[state[name]][1], values[name][1]), name
                assert torch.equal(gradient[1], upstream[state[name]][1]), name
            elif name == "inputs":
                assert not gradient[:, 1].any()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_padding_may_be_anything(self, backend: str) -> None:
        values = self.inputs("padded")
        clean = self.run(values, backend)
        values["inputs"][values["step_mask"] == 0] = float("nan")
        outputs, gradients = self.run(values, backend)
        for a, e in zip((*outputs, *gradients), (*clean[0], *clean[1]), strict=True):
            assert torch.equal(a, e)
        assert not outputs[0][values["step_mask"] == 0].any()

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_padded_sequences_run_as_if_alone(self, backend: str) -> None:
        values = self.inputs("padded")
        outputs, *state = self.run(values, backend)[0]
        inputs, parameters, first, config, step_mask = taken_apart(values.values())
        for row, length in enumerate((step_mask != 0).sum(0).tolist()):
            own = [part[row : row + 1] for part in first]
            alone, *last = self.op(inputs[:length, row : row + 1], *parameters, *own, None, config, backend=backend)
            assert_close(outputs[:length, row : row + 1], alone)
            for a, e in zip(state, last, strict=True):
                assert_close(a[row : row + 1], e)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("masked", ["intervals", "never", "any_parts", "intervals_programs"])
    def test_room_for_more_accesses_changes_nothing(self, masked: str, backend: str) -> None:
        """As a compiler leaves it, which cannot count them."""
        values = self.inputs(masked)
        expected = self.run(values, backend)
        inputs, parameters, state, config, step_mask = taken_apart(values.values())
        leaves = [tensor.clone().requires_grad_() for tensor in (inputs, *parameters, *state)]
        cut = 1 + len(parameters)
        results = getattr(torch.ops.fastmem, self.op.__name__)(
            leaves[0], leaves[1:cut], leaves[cut:], step_mask, *config.encoded(8), True, backend=backend
        )[: 1 + len(state)]
        self.agree((results, torch.autograd.grad(results, leaves, cotangents(results))), expected, values)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_samples_permute(self, backend: str) -> None:
        values = self.inputs("any_parts")
        order = torch.tensor([2, 0, 1])
        permuted = {
            name: value[order] if name in self.batched and name != "inputs" else value for name, value in values.items()
        }
        permuted |= {name: values[name][:, order] for name in ("inputs", "step_mask")}
        expected, found = self.run(values, backend)[0], self.run(permuted, backend)[0]
        for i, (a, e) in enumerate(zip(found, expected, strict=True)):
            assert_close(a, e[:, order] if i == 0 else e[order])

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_no_steps_give_the_state_in_tensors_of_its_own(self, backend: str) -> None:
        values = self.inputs("no_steps")
        outputs, *state = self.run(values, backend)[0]
        assert outputs.shape == (0, 2, 5)
        for a, e in zip(state, taken_apart(values.values())[2], strict=True):
            assert torch.equal(a, e)
            assert a.data_ptr() != e.data_ptr() or not a.numel()

    def test_tapes_agree(self, case: str) -> None:
        if not has_cpp(self.op.__name__):
            pytest.skip(f"the C++ extension has no {self.op.__name__}")
        arguments = self.own(self.inputs(case).values())
        op = getattr(torch.ops.fastmem, self.op.__name__)
        tapes = [op(*arguments, backend=backend)[self.differentiable_outputs :] for backend in BACKENDS]
        for i, (expected, actual) in enumerate(zip(*tapes, strict=True)):
            assert_close(actual, expected, name=f"tape[{i}]")

    def test_results_share_no_memory(self, small_case: str) -> None:
        arguments = self.own(self.inputs(small_case).values())
        for backend in self.backends():
            results = getattr(torch.ops.fastmem, self.op.__name__)(*arguments, backend=backend)
            tensors = [*results, arguments[0], *arguments[1], *arguments[2]]
            places = [tensor.data_ptr() for tensor in tensors if tensor.numel()]
            assert len(set(places)) == len(places)

    def test_bare_op_without_a_tape_has_no_gradient(self) -> None:
        inputs, *rest, _ = self.own(self.inputs("plain").values())
        results = getattr(torch.ops.fastmem, self.op.__name__)(inputs.requires_grad_(), *rest, False)
        with pytest.raises(RuntimeError, match=f"{self.op.__name__}: expected save_tape=True"):
            results[0].sum().backward()

    def test_wrong_lists_and_masks_are_named(self) -> None:
        inputs, parameters, state, config, _ = taken_apart(self.inputs("plain").values())
        op: Any = getattr(fastmem, self.op.__name__)
        with pytest.raises(ValueError, match=r"parameters: expected 8 tensors \(weight_ih, .*\), got 7"):
            op(inputs, parameters[1:], state, config)
        with pytest.raises(ValueError, match=r"state: expected \d+ tensors \(memory, .*\), got 2"):
            op(inputs, parameters, state[:2], config)
        with pytest.raises(TypeError, match="state: expected a sequence of Tensors, got Tensor"):
            op(inputs, parameters, state[0], config)
        with pytest.raises(TypeError, match=f"config: expected an? {type(config).__name__}, got dict"):
            op(inputs, parameters, state, {})
        with pytest.raises(ValueError, match="inputs: expected input_size 3 in the last dimension, got 2"):
            op(inputs[..., 1:], parameters, state, config)
        mask = torch.full((6, 2), 7, dtype=torch.uint8)
        for wrong, error, message in (
            (mask.int(), TypeError, r"step_mask: expected dtype torch.uint8, got torch.int32"),
            (mask.float(), TypeError, r"step_mask: expected dtype torch.uint8, got torch.float32"),
            (mask.to(torch.complex64), TypeError, r"step_mask: expected dtype torch.uint8, got torch.complex64"),
            (mask[1:], ValueError, r"step_mask: expected shape \[T=6, B=2\], got \[5, 2\]"),
            (mask + 1, ValueError, "step_mask: expected sums of 1, 2 and 4, got 8"),
            (mask.to("meta"), ValueError, "step_mask: expected device cpu, that of inputs, got meta"),
            ([7], TypeError, "step_mask: expected a Tensor or None, got list"),
        ):
            with pytest.raises(error, match=message):
                op(inputs, parameters, state, config, wrong)
        inputs, parameters, state, config, _ = taken_apart(self.inputs("feedforward").values())
        for dtype in (torch.float64, torch.complex128, torch.int64, torch.bool):
            with pytest.raises(TypeError, match=f"step_mask: expected dtype torch.uint8, got {dtype}"):
                op(inputs, parameters, state, config, mask.to(dtype))

    @pytest.mark.parametrize("bits", [2, 4, 6])
    def test_a_feedforward_controller_that_is_off_has_nothing_to_say(self, bits: int) -> None:
        values = self.inputs("feedforward")
        values["step_mask"] = torch.full((6, 2), 7, dtype=torch.uint8)
        values["step_mask"][3, 1] = bits
        with pytest.raises(ValueError, match=f"step_mask: expected 1 wherever there is 2 or 4, .*, got {bits}"):
            self.op(**values)

    def test_configurations_encode(self, case: str) -> None:
        config = self.inputs(case)["config"]
        assert type(config).decoded(*config.encoded(8)) == (config, 8, -1)
        assert type(config).decoded(*config.encoded(1, 5)) == (config, 1, 5)

    def test_wrong_codes_are_refused(self) -> None:
        inputs, parameters, state, mask, shape, options, constants, _ = self.own(self.inputs("plain").values())
        op = getattr(torch.ops.fastmem, self.op.__name__)
        for code in (
            (shape[1:], options, constants),
            (shape, options[:1], constants),
            (shape, [*options, "quick"], constants),
            (shape, options, constants[1:]),
            ([*shape, 2], options, constants),
            ([*shape, 2, 3], options, constants),
        ):
            with pytest.raises(ValueError, match="shape, options, constants: expected"):
                op(inputs, parameters, state, mask, *code, False)
        with pytest.raises(ValueError, match="spacing: expected a positive integer, got 0"):
            op(inputs, parameters, state, mask, [*shape[:-2], 0, -1], options, constants, False)
        with pytest.raises(ValueError, match="accesses: expected an integer of at least -1, got -2"):
            op(inputs, parameters, state, mask, [*shape[:-1], -2], options, constants, False)
        with pytest.raises(ValueError, match="accesses: expected -1 without a step mask, got 5"):
            op(inputs, parameters, state, None, [*shape[:-1], 5], options, constants, False)
        full = torch.full(inputs.shape[:2], 7, dtype=torch.uint8)
        with pytest.raises(ValueError, match=r"accesses: expected at least the 6 steps of step_mask .*, got 5"):
            op(inputs, parameters, state, full, [*shape[:-1], 5], options, constants, False)
        with pytest.raises(ValueError, match=r"shape: expected \[.*\], got \[.*\]"):
            op(
                inputs,
                parameters,
                state,
                mask,
                [*shape, 2, 3, 0, 4],
                [word or "inner" for word in options],
                constants,
                False,
            )
        with pytest.raises(ValueError, match="input_size: expected a positive integer, got 0"):
            op(inputs, parameters, state, mask, [0, *shape[1:]], options, constants, False)

    def test_configurations_check_themselves(self) -> None:
        config = type(self.inputs("plain")["config"])
        for wrong, message in (
            ({"input_size": 0}, "input_size: expected a positive integer, got 0"),
            ({"output_size": True}, "output_size: expected a positive integer, got True"),
            ({"controller": "gru"}, "controller: expected one of lstm, layernorm_lstm, feedforward, got 'gru'"),
            ({"controller": None}, "controller: expected one of lstm, layernorm_lstm, feedforward, got None"),
            ({"clip": 0.0}, "clip: expected a positive number or None, got 0.0"),
            ({"norm": "cosine"}, "norm: expected one of inner, outer, rsqrt, clamp, width, got 'cosine'"),
            ({"eps": -1.0}, "eps: expected a finite number of at least 0, got -1.0"),
        ):
            with pytest.raises(ValueError, match=message):
                config(**{"input_size": 3, "hidden_size": 6, "num_slots": 7, "word_size": 4, **wrong})
        assert config(3, 6, 7, 4).output_size == 6

    def test_compiles_for_any_number_of_steps_of_a_spacing(self) -> None:
        values = self.inputs("plain", torch.float32, steps=20)
        inputs, *rest = values.values()
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(self.op, fullgraph=True, backend=counter, dynamic=True)
        compiled(inputs, *rest)
        graphs = counter.frame_count  # of torch's own making two: it tries its float constants as inputs
        for steps in (17, 40, 64, 65, 256):
            assert spacing(steps) == 8
            inputs = self.inputs("plain", torch.float32, steps=steps)["inputs"]
            for a, e in zip(compiled(inputs, *rest), as_tuple(self.op(inputs, *rest)), strict=True):
                assert torch.equal(a, e)
        assert counter.frame_count == graphs

    def test_equal_configurations_are_encoded_once(self) -> None:
        values = self.inputs("plain")
        _sequence._encoded_once.cache_clear()
        for _ in range(3):
            self.op(**{**values, "config": replace(values["config"])})
        assert _sequence._encoded_once.cache_info().misses == 1


def controlled(config: Any, p: dict[str, Tensor], seen: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """A step of a controller as torch has it, and its cell."""
    if config.controller == "feedforward":
        return torch.nn.functional.linear(seen, p["weight_ih"], p["bias_ih"]).tanh(), state["cell"]
    if config.controller == "lstm":
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        hidden, cell = torch.lstm_cell(seen, (state["hidden"], state["cell"]), *(p[name] for name in names))
        return hidden, cell

    def normed(v: Tensor, k: int) -> Tensor:
        return torch.nn.functional.layer_norm(v, v.shape[-1:], p["norm_weight"][k], p["norm_bias"][k], 1e-5)

    z = (seen @ p["weight_ih"].mT + state["hidden"] @ p["weight_hh"].mT).chunk(4, -1)
    i, f, g, o = (normed(part, k) for k, part in enumerate(z))
    cell = normed(f.sigmoid() * state["cell"] + i.sigmoid() * g.tanh(), 4)
    return o.sigmoid() * cell.tanh(), cell


def told_by_hand(config: Any, p: dict[str, Tensor], top: Tensor) -> Tensor:
    """The interface vector of a linear layer, or of stored programs: a map of its own for every sample."""
    stored = config.programs
    if stored is None:
        return top @ p["interface_weight"].mT + p["interface_bias"]
    heads = 1 + max(head for head, _ in config.runs())
    queries, strengths = (top @ p["meta_weight"].mT + p["meta_bias"]).split([heads * stored.key_size, heads], -1)
    squash = torch.tanh if stored.tanh_keys else torch.clone
    begin, parts = 0, []
    for n, query in enumerate(queries.unflatten(-1, (heads, -1)).unbind(1)):
        strength = torch.logaddexp(strengths[:, n : n + 1], torch.zeros(()).to(top))
        if stored.direct_attention:
            shares = (strength * query).softmax(-1)
        else:
            keys = squash(p["program_keys"][n]).expand(len(top), -1, -1)
            shares = fastmem.content_addressing(
                keys, squash(query).unsqueeze(1), strength, norm=stored.norm, eps=stored.eps
            ).squeeze(1)
        end = begin + sum(width for head, width in config.runs() if head == n)
        maps = torch.einsum("bp,phs->bhs", shares, p["program_weights"][..., begin:end])
        part = torch.einsum("bh,bhs->bs", top, maps) + shares @ p["program_biases"][:, begin:end]
        parts.append(list(part.split([width for head, width in config.runs() if head == n], -1)))
        begin = end
    return torch.cat([parts[head].pop(0) for head, _ in config.runs()], -1)


def output_by_hand(config: Any, p: dict[str, Tensor], top: Tensor, reads: Tensor, bits: int) -> Tensor:
    """Before a clip."""
    if not bits & 1:
        return reads.new_zeros(1, config.output_size if config.projected else config.hidden_size + reads.numel())
    tops = torch.cat([top, reads.flatten(1)], -1)
    return tops @ p["output_weight"].mT + p["output_bias"] if config.projected else tops
