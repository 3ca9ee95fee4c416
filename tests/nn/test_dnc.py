"""The DNC module: published results, and what is its own."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

import fastmem
from fastmem.nn import DNC, DNCState
from tests import golden
from tests.golden import error, load
from tests.nn.networks import NETWORKS, sequence

TOLERANCE = 1e-12
GOLDEN = Path(golden.__file__).parent
CSORDAS = [f"dnc_csordas_{variant}" for variant in (
    "plain", "plain_clip", "plain_zero", "mask", "mask_floor", "dealloc", "sharp", "all", "all_floor", "all_zero",
)]  # fmt: skip
DEEPMIND = ["dnc_deepmind_access_q1", "dnc_deepmind_access_q2", "dnc_deepmind_access_zero"]
small, VARIANTS = NETWORKS["dnc"].small, NETWORKS["dnc"].variants


def csordas(file: str) -> tuple[DNC, DNCState, dict[str, Tensor], dict[str, Tensor]]:
    """Module, initial state and arrays; last, for each parameter and input, its gradient in the file."""
    f, meta = load(file)
    d, flags = meta["dims"], meta["flags"]
    net = DNC(
        d["X"], d["H"], d["N"], d["W"], d["R"], d["Q"], output_size=d["Y"], norm=flags["cosine"], eps=flags["eps"],
        clip=flags["clip_xi"], detach_usage_write=flags["detach_usage_write"], masked=flags["mask"],
        mask_floor=flags["mask_floor"], deallocates=flags["dealloc"], sharpened=flags["sharp"], dtype=torch.float64,
    )  # fmt: skip
    gates, rows = f["gate_perm_ifgo"].long(), f["xi_perm_spec"].long()
    net.load_state_dict(
        {
            "weight_ih_l0": f["W_x"][gates],
            "weight_hh_l0": f["W_h"][gates],
            "bias_ih_l0": f["b"][gates],
            "bias_hh_l0": torch.zeros_like(f["b"]),
            "interface.weight": f["W_xi"][rows],
            "interface.bias": f["b_xi"][rows],
            "output.weight": torch.cat([f["W_y"], f["W_r"]], 1),
            "output.bias": f["b_y"] + f["b_r"],
        }
    )
    gradients = {
        "weight_ih_l0": f["d_W_x"][gates],
        "weight_hh_l0": f["d_W_h"][gates],
        "bias_ih_l0": f["d_b"][gates],
        "bias_hh_l0": f["d_b"][gates],
        "interface.weight": f["d_W_xi"][rows],
        "interface.bias": f["d_b_xi"][rows],
        "output.weight": torch.cat([f["d_W_y"], f["d_W_r"]], 1),
        "output.bias": f["d_b_y"],
    }
    assert torch.equal(f["d_b_r"], f["d_b_y"]), "the one bias here is the sum of two there"
    state = net.initial_state(d["B"])._replace(memory=f["M0"], usage=f["u0"])
    return net, state, f, gradients


@pytest.mark.parametrize("file", CSORDAS)
def test_golden_csordas(file, backend):
    check_csordas(file)


@pytest.mark.parametrize("file", CSORDAS)
def test_golden_csordas_in_one_op(file, in_one_op):
    check_csordas(file)


def check_csordas(file):
    net, state, f, gradients = csordas(file)
    inputs = {"x": f["x"].requires_grad_(), "M0": state.memory.requires_grad_(), "u0": state.usage.requires_grad_()}
    output, _ = net(inputs["x"], state)
    assert net.clip is not None and f["y"].abs().max() < net.clip, "the published code does not clip the output"
    assert error(output, f["y"]) < TOLERANCE
    loss = (output * f["loss_w"]).sum()
    assert error(loss, f["loss"]) < TOLERANCE
    loss.backward()
    for name, parameter in net.named_parameters():
        assert error(parameter.grad, gradients[name]) < TOLERANCE, name
    for name, tensor in inputs.items():
        if f"d_{name}" in f:
            assert error(tensor.grad, f[f"d_{name}"]) < TOLERANCE, name


@pytest.mark.parametrize("file", CSORDAS)
def test_golden_csordas_step_by_step(file, backend):
    net, state, f, _ = csordas(file)
    fields = {
        "h": "hidden", "c": "cell", "u": "usage", "M": "memory", "w_w": "write_weights", "L": "link",
        "p": "precedence", "w_r": "read_weights", "r": "reads",
    }  # fmt: skip
    directions = ("fwd", "bwd")
    ways = ("fwd_sharp", "bwd_sharp") if net.sharpened else directions
    rows = f["xi_perm_spec"].long()
    viewed = {
        "psi": "retention", "u": "usage", "a": "allocation_weights", "c_w": "write_content_weights",
        "w_w": "write_weights", "p": "precedence", "L": "link", "c_r": "read_content_weights", "w_r": "read_weights",
        **dict(zip(ways, ("forward_weights", "backward_weights"), strict=True)),
    }  # fmt: skip
    heads = {"w_w", "L", "p", "a", "c_w", *directions, *ways}  # have a write head more here than in the file

    def same(actual: Tensor, name: str, step: int) -> None:
        actual = actual.squeeze(1) if name in heads else actual
        assert error(actual, f[f"t_{name}"][step]) < TOLERANCE, f"{name} at step {step}"

    interfaces: list[Tensor] = []
    net.interface.register_forward_hook(lambda module, args, interface: interfaces.append(interface))
    for step, step_input in enumerate(f["x"]):
        before = state
        with net.watched() as views:
            output, state = net.step(step_input, state)
        assert error(output, f["y"][step]) < TOLERANCE
        assert error(interfaces[step], f["t_xi"][step][:, rows]) < TOLERANCE
        # The views have these as they are read by: before any sharpening they are what the op gives.
        *_, forward, backward = fastmem.temporal_linkage(
            before.link, before.precedence, state.write_weights, before.read_weights
        )
        same(forward, "fwd", step)
        same(backward, "bwd", step)
        for name, field in fields.items():
            same(getattr(state, field), name, step)
        for name, field in viewed.items():
            same(getattr(views[0], field), name, step)


@pytest.mark.parametrize("file", DEEPMIND)
def test_golden_deepmind_access(file, backend):
    """The memory access alone, driven by given controls, with one linear map for each field of the interface."""
    f, meta = load(file)
    d = meta["dims"]
    heads, write_heads = d["R"], d["Q"]
    net = DNC(
        1, 1, d["N"], d["W"], heads, write_heads, detach_usage_write=True, oneplus=False, clip=None,
        dtype=torch.float64,
    )  # fmt: skip
    weights = {name: f[name].requires_grad_() for name in f if name.startswith(("W_", "b_"))}
    h = f["h"].requires_grad_()
    starts = {
        "memory": "M0", "usage": "u0", "precedence": "p0", "link": "L0",
        "write_weights": "w_w0", "read_weights": "w_r0",
    }  # fmt: skip
    given = {field: f[name].requires_grad_() for field, name in starts.items() if name in f}
    state = net.initial_state(d["B"])._replace(**given)
    # The file's modes are backward 1..Q, forward 1..Q, content.
    order = [*range(write_heads), 2 * write_heads, *range(write_heads, 2 * write_heads)]

    def interface(control: Tensor) -> Tensor:
        names = ("k_r", "beta_r", "k_w", "beta_w", "e", "v", "f", "g_a", "g_w", "pi")
        fields = {name: linear(control, weights[f"W_{name}"], weights[f"b_{name}"]) for name in names}
        fields["pi"] = fields["pi"].unflatten(-1, (heads, -1))[..., order].flatten(-2)
        return torch.cat(list(fields.values()), -1)

    reads = []
    for t, control in enumerate(h):
        with net.watched() as views:
            state = net.access(interface(control), state)
        reads.append(state.reads)
        if not file.endswith("zero"):  # there slots tie, and the published code relabels them
            seen = {f"t_{name[:-1]}": getattr(state, field) for field, name in starts.items()} | {
                "t_a": views[0].allocation_weights,
                "t_c_w": views[0].write_content_weights,
                "t_c_r": views[0].read_content_weights,
                "t_fwd": views[0].forward_weights.transpose(1, 2),
                "t_bwd": views[0].backward_weights.transpose(1, 2),
            }
            for name, tensor in seen.items():
                assert error(tensor, f[name][t]) < TOLERANCE, f"{name} at step {t}"
    y = torch.stack(reads)
    assert error(y, f["y"]) < TOLERANCE
    loss = (y * f["loss_w"]).sum()
    assert error(loss, f["loss"]) < TOLERANCE
    loss.backward()
    leaves = {**weights, "h": h, **{starts[field]: tensor for field, tensor in given.items()}}
    for name, tensor in leaves.items():
        if f"d_{name}" in f:
            # The last write weights reach the result through the usage alone, and there their gradient is stopped.
            gradient = torch.zeros_like(tensor) if name == "w_w0" and tensor.grad is None else tensor.grad
            assert error(gradient, f[f"d_{name}"]) < TOLERANCE, name


def test_every_golden_file_is_used():
    assert {path.stem for path in GOLDEN.glob("dnc_*.npz")} == {*CSORDAS, *DEEPMIND}


def test_shapes_and_defaults():
    net = DNC(4, 6, num_slots=7, word_size=5)
    output, state = net(torch.randn(3, 2, 4))
    assert output.shape == (3, 2, 6)
    assert [tuple(tensor.shape) for tensor in state] == [
        (2, 7, 5), (2, 7), (2, 1, 7), (2, 1, 7, 7), (2, 1, 7), (2, 1, 7), (2, 1, 5), (2, 6), (2, 6),
    ]  # fmt: skip
    # One head of each kind: RW + 3W + 5R + 3.
    assert net.interface.out_features == 5 + 15 + 5 + 3
    lstm = torch.nn.LSTM(4 + 5, 6)
    names = ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0")
    assert {name: getattr(net, name).shape for name in names} == {name: getattr(lstm, name).shape for name in names}
    assert all(getattr(net, name).abs().max() <= 6**-0.5 for name in names)


def test_detach_usage_write_changes_gradients_only():
    net, detached, x = small(), small(detach_usage_write=True), sequence()
    output, detached_output = net(x)[0], detached(x)[0]
    assert torch.equal(output, detached_output)
    output.sum().backward()
    detached_output.sum().backward()
    gradient, detached_gradient = net.interface.weight.grad, detached.interface.weight.grad
    assert gradient is not None and detached_gradient is not None
    assert not torch.allclose(gradient, detached_gradient)


def test_clip_bounds_interface_and_output():
    net, x = small(clip=0.1), sequence()
    assert net(x)[0].abs().max() <= 0.1
    net = small(clip=None)
    net.output.bias.data.fill_(50)
    assert net(x)[0].min() > 20


def test_slots_can_outlive_their_use():
    net, x = small(), sequence(steps=60)
    output, state = net(x)
    assert output.isfinite().all()
    assert state.link.min() >= 0
    for weights in (state.write_weights, state.read_weights, state.precedence):
        assert weights.sum(-1).max() <= 1 + 1e-12


@pytest.mark.parametrize("mask_floor", [1.0, None])
def test_errors_of_the_constructor(mask_floor):
    with pytest.raises(ValueError, match=rf"mask_floor: expected a number in \[0, 1\), got {mask_floor}"):
        small(mask_floor=mask_floor)


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_are_what_the_run_did(variant, backend):
    net, x = small(**VARIANTS[variant]), sequence()
    with torch.no_grad(), net.watched() as views:
        output, last = net(x)
        net(x[:2, 0])
    assert error(output, net(x)[0]) < 1e-13, "watching changes nothing"
    run, single = views
    assert not run.usage.requires_grad
    for name in ("usage", "precedence", "link", "write_weights", "read_weights"):
        assert torch.equal(getattr(run, name)[-1], getattr(last, name)), name
        assert error(getattr(run, name)[0], getattr(net(x[:1])[1], name)) < 1e-13, name
    for view, first in zip(run, single, strict=True):
        assert error(first, view[:2, 0]) < 1e-13
    gates, by_allocation = run.write_gates.unsqueeze(-1), run.allocation_gates.unsqueeze(-1)
    written = gates * (by_allocation * run.allocation_weights + (1 - by_allocation) * run.write_content_weights)
    assert error(written, run.write_weights) < 1e-13
    ways = torch.cat([run.backward_weights, run.read_content_weights.unsqueeze(2), run.forward_weights], 2)
    assert error(torch.einsum("tbrm,tbmrn->tbrn", run.read_modes, ways), run.read_weights) < 1e-13
    before = torch.cat([torch.zeros_like(run.usage[:1]), run.usage[:-1]])
    old_writes = torch.cat([torch.zeros_like(run.write_weights[:1]), run.write_weights[:-1]])
    unwritten = (1 - old_writes).prod(2)
    assert error((before + (1 - before) * (1 - unwritten)) * run.retention, run.usage) < 1e-13
    old_reads = torch.cat([torch.zeros_like(run.read_weights[:1]), run.read_weights[:-1]])
    assert error((1 - run.free_gates.unsqueeze(-1) * old_reads).prod(2), run.retention) < 1e-13
