"""The NTM module: published results, and what is its own."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import fastmem
from fastmem.nn import NTM, NTMState
from fastmem.reference.ntm_step import interface_size
from tests import golden
from tests.golden import error, load
from tests.nn.networks import NETWORKS, sequence

TOLERANCE = 1e-12
FILES = ["ntm_nsm", "ntm_nsm_r2", "ntm_loudin", "ntm_loudin_r2"]
VARIANTS = NETWORKS["ntm"].variants
small = NETWORKS["ntm"].small


def published(file: str) -> tuple[NTM, NTMState, dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Module, initial state, its leaves, arrays; last, for each parameter, its gradient in the file."""
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
    gradients = {
        "weight_ih_l0": f["d_W_x"],
        "weight_hh_l0": f["d_W_h"],
        "bias_ih_l0": f["d_b_ih"],
        "bias_hh_l0": f["d_b_hh"],
        "interface.weight": torch.cat([f[f"d_W_o_{name}"] for name in names]),
        "interface.bias": torch.cat([f[f"d_b_o_{name}"] for name in names]),
        "output.weight": f["d_W_y"],
        "output.bias": f["d_b_y"],
    }
    return net, state, leaves, f, gradients


@pytest.mark.parametrize("file", FILES)
def test_golden(file, backend):
    net, state, leaves, f, gradients = published(file)
    d, names = load(file)[1]["dims"], load(file)[1]["heads"]
    readers = [name for name in names if name.startswith("read")]
    start, interfaces = state.memory, []
    hook = net.interface.register_forward_hook(lambda module, args, interface: interfaces.append(interface))
    with net.watched() as views:
        output, state = net(leaves["x"], state)
    hook.remove()
    assert error(torch.stack(interfaces), torch.cat([f[f"t_o_{name}"] for name in names], -1)) < TOLERANCE
    viewed = {"w_c": "content_weights", "w_g": "gated_weights", "w_s": "shifted_weights", "w": "weights"}
    for name, field in viewed.items():
        expected_view = torch.stack([f[f"t_{name}_{head}"] for head in names], 2)
        assert error(getattr(views[0], field), expected_view) < TOLERANCE, field
    assert error(views[0].reads, torch.stack([f[f"t_r_{name}"] for name in readers], 2)) < TOLERANCE
    # No view has the memory between two heads: it is what the op of one head leaves of the memory before it.
    writers = [name for name in names if name.startswith("write")]
    for step in range(d["T"]):
        for i, name in enumerate(writers):
            head = names.index(name)
            write = views[0].weights[step, :, head], views[0].erase[step, :, i], views[0].values[step, :, i]
            start = fastmem.memory_write(start, *(part.unsqueeze(1) for part in write))
            assert error(start, f[f"t_M_after_{name}"][step]) < TOLERANCE, f"{name} at step {step}"
    assert error(state.memory, start) < TOLERANCE
    check_published(file, net, leaves, output, state, f, gradients)


@pytest.mark.parametrize("file", FILES)
def test_golden_in_one_op(file, in_one_op):
    net, state, leaves, f, gradients = published(file)
    output, state = net(leaves["x"], state)
    last_writer = [name for name in load(file)[1]["heads"] if name.startswith("write")][-1]
    assert error(state.memory, f[f"t_M_after_{last_writer}"][-1]) < TOLERANCE
    check_published(file, net, leaves, output, state, f, gradients)


def check_published(file, net, leaves, output, state, f, gradients):
    """Outputs, what is left of the last state, and gradients."""
    names = load(file)[1]["heads"]
    readers = [name for name in names if name.startswith("read")]
    if "loudin" in file:
        output = output.sigmoid()
    assert error(output, f["y"]) < TOLERANCE
    assert error(state.weights, torch.stack([f[f"t_w_{name}"][-1] for name in names], 1)) < TOLERANCE
    assert error(state.reads, torch.stack([f[f"t_r_{name}"][-1] for name in readers], 1)) < TOLERANCE
    loss = (output * f["loss_w"]).sum()
    assert error(loss, f["loss"]) < TOLERANCE
    loss.backward()
    for name, gradient in gradients.items():
        actual = net.get_parameter(name).grad
        assert actual is not None and error(actual, gradient) < TOLERANCE, name
    for name, leaf in leaves.items():
        if f"d_{name}" in f:
            assert leaf.grad is not None and error(leaf.grad, f[f"d_{name}"]) < TOLERANCE, name


def test_every_golden_file_is_used():
    assert {path.stem for path in Path(golden.__file__).parent.glob("ntm_*.npz")} == {*FILES}


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


def test_a_numpy_number_is_a_shift():
    assert type(small(max_shift=np.int64(2)).max_shift) is int


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": "rx"}, "heads: expected letters r and w, such as \"rw\", got 'rx'"),
        ({"heads": ""}, "heads: expected letters r and w"),
        ({"max_shift": -1}, "max_shift: expected an integer of at least 0, got -1"),
        ({"max_shift": True}, "max_shift: expected an integer of at least 0, got True"),
        ({"form": "max"}, "form: expected one of"),
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        small(**options)


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
