"""The NTM module: published results, the laws of a recurrent module, and clear errors."""

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_sequence, pad_packed_sequence

import fastmem
from fastmem.nn import NTM, NTMCell, NTMState
from fastmem.reference.ntm_step import interface_size
from tests.golden import error, load
from tests.ops.suite import native

TOLERANCE = 1e-12
BACKENDS = ["reference", pytest.param("cpp", marks=native)]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "write_first": {"heads": "wr"},
    "pairs": {"heads": "rwrw"},
    "joint": {"heads": "rwwr", "joint_writes": True},
    "published": {"form": "power", "reversed_shift": True, "norm": "clamp", "clip": None, "random_memory": True},
    "far": {"max_shift": 2},
    "no_shift": {"max_shift": 0},
    "read_only": {"heads": "r"},
    "gru": {"controller": "gru", "num_layers": 2},
    "feedforward": {"controller": "feedforward"},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastmem.use_backend(request.param):
        yield request.param


def small(dtype: torch.dtype = torch.float64, seed: int = 0, **options: Any) -> NTM:
    torch.manual_seed(seed)
    return NTM(4, 6, num_slots=7, word_size=5, dtype=dtype, **{"output_size": 3, **options})


def sequence(steps: int = 6, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(steps, batch, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_state_close(actual: NTMState, expected: NTMState, tolerance: float = 1e-13) -> None:
    for name in NTMState._fields:
        assert error(getattr(actual, name), getattr(expected, name)) < tolerance, name


@pytest.mark.parametrize("file", ["ntm_nsm", "ntm_nsm_r2", "ntm_loudin", "ntm_loudin_r2"])
def test_golden(file, backend):
    f, meta = load(file)
    d, names = meta["dims"], meta["heads"]
    heads = "".join(name[0] for name in names)
    readers = [name for name in names if name.startswith("read")]
    net = NTM(
        d["X"], d["H"], d["N"], d["W"], heads, d["Y"], reversed_shift=True, form="power", norm="clamp", clip=None,
        dtype=torch.float64,
    )  # fmt: skip
    first = net.state_dict()
    net.load_state_dict(
        first
        | {
            "weight_ih_l0": f["W_x"],
            "weight_hh_l0": f["W_h"],
            "bias_ih_l0": f["b_ih"],
            "bias_hh_l0": f["b_hh"],
            "interface.weight": torch.cat([f[f"W_o_{name}"] for name in names]),
            "interface.bias": torch.cat([f[f"b_o_{name}"] for name in names]),
            "output.weight": f["W_y"],
            "output.bias": f["b_y"],
        }
    )
    batch = d["B"]
    leaves = {"x": f["x"], "M0": f["M0"], "h0": f["h0"], "c0": f["c0"]}
    leaves |= {f"r0_{i}": f[f"r0_{i}"] for i in range(len(readers))}
    leaves = {name: value.clone().requires_grad_() for name, value in leaves.items()}
    reads = torch.stack([leaves[f"r0_{i}"] for i in range(len(readers))])
    state = NTMState(
        leaves["M0"].expand(batch, -1, -1),
        torch.zeros(batch, len(heads), d["N"], dtype=torch.float64),
        reads.expand(batch, -1, -1),
        leaves["h0"].expand(batch, -1),
        leaves["c0"].expand(batch, -1),
    )
    with net.watched() as views:
        output, state = net(leaves["x"], state)
    viewed = {"w_c": "content_weights", "w_g": "gated_weights", "w_s": "shifted_weights", "w": "weights"}
    for name, field in viewed.items():
        expected_view = torch.stack([f[f"t_{name}_{head}"] for head in names], 2)
        assert error(getattr(views[0], field), expected_view) < TOLERANCE, field
    assert error(views[0].reads, torch.stack([f[f"t_r_{name}"] for name in readers], 2)) < TOLERANCE
    if "loudin" in file:
        output = output.sigmoid()
    assert error(output, f["y"]) < TOLERANCE
    assert error(state.weights, torch.stack([f[f"t_w_{name}"][-1] for name in names], 1)) < TOLERANCE
    assert error(state.reads, torch.stack([f[f"t_r_{name}"][-1] for name in readers], 1)) < TOLERANCE
    (output * f["loss_w"]).sum().backward()
    expected = {
        "weight_ih_l0": f["d_W_x"],
        "weight_hh_l0": f["d_W_h"],
        "bias_ih_l0": f["d_b_ih"],
        "bias_hh_l0": f["d_b_hh"],
        "interface.weight": torch.cat([f[f"d_W_o_{name}"] for name in names]),
        "interface.bias": torch.cat([f[f"d_b_o_{name}"] for name in names]),
        "output.weight": f["d_W_y"],
        "output.bias": f["d_b_y"],
    }
    for name, gradient in expected.items():
        actual = net.get_parameter(name).grad
        assert actual is not None and error(actual, gradient) < TOLERANCE, name
    for name, leaf in leaves.items():
        if f"d_{name}" in f:
            assert leaf.grad is not None and error(leaf.grad, f[f"d_{name}"]) < TOLERANCE, name


def test_shapes_defaults_and_the_published_count_of_parameters():
    net = NTM(10, 100, num_slots=128, word_size=20, output_size=8)
    output, state = net(torch.randn(5, 3, 10))
    assert output.shape == (5, 3, 8)
    assert [tuple(part.shape) for part in state] == [(3, 128, 20), (3, 2, 128), (3, 1, 20), (3, 100), (3, 100)]
    counted = sum(p.numel() for n, p in net.named_parameters() if n not in ("initial_weights", "initial_reads"))
    assert counted == 63260
    assert torch.equal(net.initial_memory, torch.full((128, 20), 1e-6))
    assert "heads='rw'" in repr(net)
    slots = NTM(2, 3, 4, 5, random_memory=True)
    assert slots.output_size == 3 and slots.initial_memory.abs().max() <= 9**-0.5
    assert "initial_memory" in slots.state_dict()


def test_slots_differ_from_the_first_step_on():
    """Equal slots stay equal for ever: a constant memory needs uneven first weights."""
    state = small().initial_state(2)
    assert (state.weights.std(-1) > 0.01).all()
    assert (state.weights.sum(-1) - 1).abs().max() < 1e-12


def test_batch_first_and_unbatched_equal_time_major():
    x = sequence()
    output, state = small()(x)
    first, first_state = small(batch_first=True)(x.transpose(0, 1))
    assert torch.equal(first.transpose(0, 1), output)
    assert_state_close(first_state, state)
    alone, alone_state = small()(x[:, 1])
    assert error(alone, output[:, 1]) < 1e-13
    assert_state_close(alone_state, NTMState(*(part[1] for part in state)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_pieces_equal_the_whole_and_the_callers_state_is_left_alone(variant):
    net, x = small(**VARIANTS[variant]), sequence()
    output, state = net(x)
    for context in (torch.enable_grad, torch.no_grad):
        with context():
            first, middle = net(x[:2])
            kept = copy.deepcopy(NTMState(*(part.detach() for part in middle)))
            second, last = net(x[2:], middle)
            assert error(torch.cat([first, second]), output) < 1e-13
            assert_state_close(last, state)
            for a, b in zip(middle, kept, strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_through_five_steps(variant, backend):
    net = small(**VARIANTS[variant])
    x = sequence(5, 2).requires_grad_()
    parameters = {name: p for name, p in net.named_parameters() if p.numel()}

    def run(x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        output, state = torch.func.functional_call(net, dict(zip(parameters, values, strict=True)), (x,))
        return output, *(part for part in state if part.numel())

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_gives_the_same_bits_in_buffers_of_its_own(variant, backend):
    net, x = small(torch.float32, **VARIANTS[variant]), sequence(dtype=torch.float32)
    output, state = net(x)
    with torch.no_grad():
        again, again_state = net(x)
    assert torch.equal(again, output)
    for a, b in zip(again_state, state, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(net.initial_memory, torch.full_like(net.initial_memory, 1e-6)) or net.random_memory


@pytest.mark.parametrize("training", [True, False])
def test_each_padded_sequence_runs_as_if_alone(training):
    net, x, lengths = small(), sequence(), [2, 6, 5]
    with torch.set_grad_enabled(training):
        output, state = net(x, lengths=lengths)
        for row, length in enumerate(lengths):
            alone, alone_state = net(x[:length, row])
            assert error(output[:length, row], alone) < 1e-13
            assert not output[length:, row].any()
            assert_state_close(NTMState(*(part[row] for part in state)), alone_state)
        packed, packed_state = net(pack_sequence([x[:n, i] for i, n in enumerate(lengths)], enforce_sorted=False))
        assert error(pad_packed_sequence(packed)[0], output) < 1e-13
        assert_state_close(packed_state, state)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cell_is_a_step(variant):
    net, x = small(**VARIANTS[variant]), sequence()
    options = {name: value for name, value in VARIANTS[variant].items()}
    cell = NTMCell(4, 6, 7, 5, output_size=3, dtype=torch.float64, **options)
    cell.load_state_dict(net.state_dict())
    state, outputs = None, []
    for step in x:
        output, state = cell(step, state)
        outputs.append(output)
    whole, last = net(x)
    assert torch.equal(torch.stack(outputs), whole)
    assert state is not None
    assert_state_close(state, last)
    assert error(cell(x[0, 1])[0], whole[0, 1]) < 1e-13


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_are_what_the_run_did(variant, backend):
    """Each view follows from those before it, head by head, and the writes leave the run's last memory."""
    net, x = small(**VARIANTS[variant]), sequence()
    interfaces: list[Tensor] = []
    net.interface.register_forward_hook(lambda module, arguments, result: interfaces.append(result.detach()))
    with torch.no_grad(), net.watched() as views:
        output, last = net(x)
        net(x[:2, 0])
    assert torch.equal(output, net(x)[0]), "watching changes nothing"
    run, single = views
    assert not any(view.requires_grad for view in run)
    for view, first in zip(run, single, strict=True):
        assert error(first, view[:2, 0]) < 1e-13
    assert torch.equal(run.weights[-1], last.weights) and torch.equal(run.reads[-1], last.reads)
    first_state = net.initial_state(3)
    memory, before = first_state.memory, first_state.weights
    for t in range(len(x)):
        erase, values, reads = (list(part[t].split(1, 1)) for part in (run.erase, run.values, run.reads))
        seen, writes = memory, []  # joint writes wait for the end of the step
        rest = interfaces[t]
        for h, kind in enumerate(net.heads):
            key, rest = rest[:, None, :5], rest[:, interface_size(kind, 5, 2 * net.max_shift + 1) :]
            content = fastmem.content_addressing(seen, key, run.strengths[t, :, h : h + 1], norm=net.norm)
            assert error(run.content_weights[t, :, h], content[:, 0]) < 1e-13
            gate, head = run.gates[t, :, h, None], run.weights[t, :, h]
            gated = gate * run.content_weights[t, :, h] + (1 - gate) * before[:, h]
            assert error(run.gated_weights[t, :, h], gated) < 1e-13
            turned = [gated.roll(j, -1) for j in range(-net.max_shift, net.max_shift + 1)]
            shifted = torch.einsum("bs,sbn->bn", run.shifts[t, :, h], torch.stack(turned))
            assert error(run.shifted_weights[t, :, h], shifted) < 1e-13
            sharp = fastmem.sharpen(run.shifted_weights[t, :, h : h + 1], run.sharpness[t, :, h : h + 1], net.form)
            assert error(head, sharp[:, 0]) < 1e-13
            if kind == "r":
                assert error(reads.pop(0), fastmem.weighted_read(seen, head.unsqueeze(1))) < 1e-13
            else:
                writes.append((head.unsqueeze(1), erase.pop(0), values.pop(0)))
            if writes and not net.joint_writes:
                seen = memory = fastmem.memory_write(memory, *writes.pop())
        if writes:
            memory = fastmem.memory_write(memory, *(torch.cat(parts, 1) for parts in zip(*writes, strict=True)))
        before = run.weights[t]
    assert error(memory, last.memory) < 1e-13


def test_views_of_padded_and_packed_sequences_and_of_a_cell():
    net, x, lengths = small(heads="rwrw"), sequence(), [2, 6, 5]
    with net.watched() as views:
        net(x, lengths=lengths)
        net(pack_sequence([x[:n, i] for i, n in enumerate(lengths)], enforce_sorted=False))
        net(x)
        net(x[:0])
    padded, packed, full = views
    for name in full._fields:
        assert torch.equal(getattr(padded, name), getattr(packed, name)), name
        for row, length in enumerate(lengths):
            assert error(getattr(padded, name)[:length, row], getattr(full, name)[:length, row]) < 1e-13, name
            assert not getattr(padded, name)[length:, row].any(), name
    net(x)
    assert len(views) == 3, "outside nothing is kept, and a run of no steps sees nothing"
    cell = NTMCell(4, 6, 7, 5, "rwrw", 3, dtype=torch.float64)
    cell.load_state_dict(net.state_dict())
    with cell.watched() as views:
        cell(x[0])
    for view, expected in zip(views[0], full, strict=True):
        assert error(view, expected[0]) < 1e-13


def test_state_methods_and_pickling():
    net = small()
    _, state = net(sequence())
    assert not state.detach().memory.requires_grad
    assert state.to(torch.float32).weights.dtype == torch.float32
    fresh = net.initial_state(3)
    again = state.reset([1], fresh)
    for name in NTMState._fields:
        old, new, first = getattr(state, name), getattr(again, name), getattr(fresh, name)
        assert torch.equal(new[1], first[1]) and torch.equal(new[0], old[0]) and torch.equal(new[2], old[2])
    loaded = pickle.loads(pickle.dumps(state.detach()))
    assert isinstance(loaded, NTMState) and torch.equal(loaded.memory, state.memory)


def test_copies_and_saved_parameters_give_the_same_output():
    net, x = small(random_memory=True), sequence()
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = small(seed=1, random_memory=True)
    other.load_state_dict(torch.load(file))
    for same in (copy.deepcopy(net), other):
        assert torch.equal(same(x)[0], net(x)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_cell_compiles_without_graph_breaks(variant):
    net, x = small(torch.float32, **VARIANTS[variant]), sequence(dtype=torch.float32)
    _, state = net(x[:1])
    torch._dynamo.reset()
    compiled = torch.compile(net.step, fullgraph=True, backend="aot_eager")
    output, after = compiled(x[1], state)
    expected, expected_after = net.step(x[1], state)
    assert error(output, expected) < 1e-6
    assert_state_close(after, expected_after, 1e-6)


def test_cell_exports_saves_and_loads():
    cell = NTMCell(4, 6, 7, 5)
    x, state = torch.randn(3, 4), cell.initial_state(3)
    state = NTMState(*(part.detach().clone() for part in state))
    file = io.BytesIO()
    torch.export.save(torch.export.export(cell, (x, state)), file)
    file.seek(0)
    output, after = torch.export.load(file).module()(x, state)
    expected, expected_after = cell(x, state)
    assert error(output, expected) < 1e-6
    assert_state_close(NTMState(*after), expected_after, 1e-6)


def test_autocast_lowers_the_linear_maps_only():
    net, x = small(torch.float32), sequence(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output, state = net(x)
    assert output.dtype == torch.bfloat16
    assert {part.dtype for part in state} == {torch.float32}
    assert error(output.float(), net(x)[0]) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "rx"}, "heads: expected letters r and w, such as \"rw\", got 'rx'"),
        ({"heads": ""}, "heads: expected letters r and w"),
        ({"max_shift": -1}, "max_shift: expected an integer of at least 0, got -1"),
        ({"clip": 0}, "clip: expected a positive number or None, got 0"),
        ({"norm": "max"}, "norm: expected one of"),
        ({"form": "max"}, "form: expected one of"),
        ({"controller": "rnn"}, "controller: expected one of lstm, gru, feedforward, got 'rnn'"),
        ({"num_layers": 0}, "num_layers: expected a positive integer, got 0"),
        ({"output_size": True}, "output_size: expected a positive integer, got True"),
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_errors_of_input_and_state():
    net, x = small(), sequence()
    state = net.initial_state(3)
    with pytest.raises(ValueError, match="input: expected input_size 4 in the last dimension, got 5"):
        net(torch.randn(3, 2, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="state: expected a NTMState or None, got tuple"):
        net(x, tuple(state))
    with pytest.raises(ValueError, match=r"state.weights: expected shape \[3, 2, 7\], got \[3, 2, 6\]"):
        net(x, state._replace(weights=state.weights[..., :6]))
    with pytest.raises(ValueError, match="state: expected a batch, whose rows are to be reset"):
        NTMState(*(part[0] for part in state)).reset([0], state)
