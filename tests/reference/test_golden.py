"""float64: values and gradients against published implementations (tests/golden)."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

import fastmem
from fastmem.ops import allocation, usage_update
from fastmem.reference.content_addressing import content_addressing
from fastmem.reference.location_addressing import interpolated, shifted
from fastmem.reference.program_lookup import program_mix
from fastmem.reference.temporal_linkage import temporal_linkage, temporal_linkage_
from tests.golden import error, load
from tests.ops.suite import native

TOLERANCE = 1e-12
BACKENDS = ["reference", pytest.param("cpp", marks=native)]


def check(file: str, op: str, function: Callable[..., dict[str, Tensor]]) -> None:
    """`function` gets the arrays `OP.NAME` by name; its outputs and all gradients must equal the file's."""
    arrays, _ = load(file)
    fields = {key.removeprefix(f"{op}."): array for key, array in arrays.items() if key.startswith(f"{op}.")}
    inputs = {name: array.requires_grad_() for name, array in fields.items() if "." not in name}
    outputs = function(**inputs)
    expected = {name.removeprefix("out.") for name in fields if name.startswith("out.")}
    assert set(outputs) == expected
    for name, output in outputs.items():
        assert error(output, fields[f"out.{name}"]) < TOLERANCE, name
    loss = torch.stack([(output * fields[f"loss_w.{name}"]).sum() for name, output in outputs.items()]).sum()
    for name, gradient in zip(inputs, torch.autograd.grad(loss, list(inputs.values())), strict=True):
        assert error(gradient, fields[f"d.{name}"]) < TOLERANCE, f"gradient of {name}"


@pytest.mark.parametrize("op", ["content", "content_mask", "content_mask_floor"])
def test_content_outer(op):
    def function(M, k, beta, m=None):
        _, meta = load("ops_csordas")
        floor = meta["ops"][op].get("floor", 0.0)
        mask = None if m is None else m * (1 - floor) + floor
        return {"w": content_addressing(M, k, beta, mask, None, "outer", 1e-6)}

    check("ops_csordas", op, function)


def test_content_inner():
    def function(M, k, beta):
        strengths = torch.nn.functional.softplus(beta)
        return {"w": content_addressing(M, k, strengths, None, None, "inner", 1e-6)}

    check("ops_deepmind", "cosine", function)


def test_linkage_one_write_head():
    def function(L, p, w, w_r):
        outputs = temporal_linkage(L.unsqueeze(1), p.unsqueeze(1), w.unsqueeze(1), w_r)
        return dict(zip(("L", "p", "fwd", "bwd"), (output.squeeze(1) for output in outputs), strict=True))

    check("ops_csordas", "link", function)


def test_linkage_several_write_heads():
    def function(L, p, w, w_r):
        link, precedence, forward, backward = temporal_linkage(L, p, w, w_r)
        return {"L": link, "p": precedence, "fwd": forward.transpose(1, 2), "bwd": backward.transpose(1, 2)}

    check("ops_deepmind", "linkage", function)


def test_linkage_in_place():
    arrays, _ = load("ops_deepmind")
    link, precedence = arrays["linkage.L"], arrays["linkage.p"]
    forward, backward = temporal_linkage_(link, precedence, arrays["linkage.w"], arrays["linkage.w_r"])
    outputs = {"L": link, "p": precedence, "fwd": forward.transpose(1, 2), "bwd": backward.transpose(1, 2)}
    for name, output in outputs.items():
        assert error(output, arrays[f"linkage.out.{name}"]) < TOLERANCE, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["usage_alloc", "usage_alloc_ties"])
def test_usage_and_allocation_one_write_head(op, backend):
    def function(u, w_w, w_r, f):
        usage, retention = usage_update(u, w_w.detach().unsqueeze(1), w_r, f, backend=backend)
        # The published code takes no gradient through w_w: keep w_w in the graph with a gradient of zero.
        return {"u": usage + 0 * w_w, "psi": retention, "a": allocation(usage, backend=backend).squeeze(1)}

    check("ops_csordas", op, function)


@pytest.mark.parametrize("backend", BACKENDS)
def test_usage_several_write_heads(backend):
    def function(w_w, f, w_r, u):
        return {"u": usage_update(u, w_w.detach(), w_r, f, backend=backend)[0] + 0 * w_w.sum()}

    check("ops_deepmind", "usage", function)


@pytest.mark.parametrize("backend", BACKENDS)
def test_allocation_several_write_heads(backend):
    check("ops_deepmind", "alloc", lambda u, g: {"a": allocation(u, g, backend=backend)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_allocation_of_ties(backend):
    """The first head alone: the published code merges nearly free usages, which orders later heads in its own way."""
    arrays, _ = load("ops_deepmind")
    weights = allocation(arrays["alloc_ties.u"], arrays["alloc_ties.g"], backend=backend)
    assert error(weights[:, 0], arrays["alloc_ties.out.a"][:, 0]) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["write", "write_dealloc"])
def test_write_one_head(op, backend):
    def function(M, w, e, v, psi=None):
        heads = (tensor.unsqueeze(1) for tensor in (w, e, v))
        return {"M": fastmem.memory_write(M, *heads, psi, backend=backend)}

    check("ops_csordas", op, function)


@pytest.mark.parametrize("backend", BACKENDS)
def test_write_several_heads(backend):
    check("ops_deepmind", "write", lambda M, w, e, v: {"M": fastmem.memory_write(M, w, e, v, backend=backend)})


@pytest.mark.parametrize("backend", BACKENDS)
def test_write_in_place(backend):
    arrays, _ = load("ops_deepmind")
    fastmem.memory_write_(*(arrays[f"write.{name}"] for name in "Mwev"), backend=backend)
    assert error(arrays["write.M"], arrays["write.out.M"]) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_read(backend):
    arrays, _ = load("dnc_csordas_plain")
    for memory, weights, reads in zip(arrays["t_M"], arrays["t_w_r"], arrays["t_r"], strict=True):
        assert error(fastmem.weighted_read(memory, weights, backend=backend), reads) < TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
def test_link_sharpness(backend):
    def function(d, s):
        return {"w": fastmem.sharpen(d, 1 + torch.nn.functional.softplus(s), backend=backend)}

    check("ops_csordas", "sharpen", function)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", ["address", "address_sharp", "address_w0"])
@pytest.mark.parametrize("file", ["ops_ntm_nsm", "ops_ntm_loud"])
def test_addressing_of_the_ntm(file, op, backend):
    """The file's intermediate weightings come from the reference, so that their gradients count too."""

    def function(M, k, beta, g, s, gamma, w_prev):
        strengths, sharpness = torch.nn.functional.softplus(beta), 1 + torch.nn.functional.softplus(gamma)
        content = fastmem.content_addressing(M, k.unsqueeze(1), strengths, norm="clamp", backend=backend)
        previous, gate, shift = w_prev.unsqueeze(1), g.sigmoid(), s.softmax(-1).unsqueeze(1)
        gated = interpolated(content, previous, gate)
        outputs = {
            "w_c": content,
            "w_g": gated,
            "w_s": shifted(gated, shift, True),
            "w": fastmem.location_addressing(content, previous, gate, shift, sharpness, True, "power", backend=backend),
        }
        return {name: output.squeeze(1) for name, output in outputs.items()}

    check(file, op, function)


@pytest.mark.parametrize("file", ["nutm_nsm_p2", "nutm_nsm_p3", "nutm_nsm_da"])
def test_program_mix(file):
    arrays, meta = load(file)
    for head in meta["heads"]:
        mix = partial(program_mix, weights=arrays[f"V_{head}"], biases=arrays[f"Bv_{head}"])
        for hidden, program_weights, expected in zip(
            arrays["t_h"], arrays[f"t_p_w_{head}"], arrays[f"t_o_{head}"], strict=True
        ):
            assert error(mix(hidden, program_weights), expected) < TOLERANCE, head


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", ["ntm_nsm", "ntm_nsm_r2", "ntm_loudin", "ntm_loudin_r2"])
def test_ntm(file, backend):
    """The whole model: a controller, a linear map to each head's raw numbers, the step, and an output layer."""
    arrays, meta = load(file)
    names, sizes = meta["heads"], meta["dims"]
    readers, last_writer = range(sizes["R"]), f"write{sizes['Q'] - 1}"
    leaves = {name: arrays[name].requires_grad_() for name in arrays if f"d_{name}" in arrays}
    lstm = tuple(leaves[name] for name in ("W_x", "W_h", "b_ih", "b_hh"))
    batch = leaves["x"].shape[1]
    hidden, cell, memory = (leaves[name].expand(batch, *leaves[name].shape) for name in ("h0", "c0", "M0"))
    reads = torch.stack([leaves[f"r0_{i}"] for i in readers]).expand(batch, -1, -1)
    weights = memory.new_zeros(batch, len(names), sizes["N"])
    outputs = []
    for time, inputs in enumerate(leaves["x"]):
        hidden, cell = torch.lstm_cell(torch.cat([inputs, reads.flatten(1)], -1), (hidden, cell), *lstm)
        raw = [torch.nn.functional.linear(hidden, leaves[f"W_o_{name}"], leaves[f"b_o_{name}"]) for name in names]
        memory, weights, reads = fastmem.ntm_step(
            torch.cat(raw, -1), memory, weights, "".join(name[0] for name in names), reversed_shift=True, form="power",
            clip=None, norm="clamp", backend=backend,
        )  # fmt: skip
        seen = torch.cat([hidden, reads.flatten(1)], -1)
        outputs.append(torch.nn.functional.linear(seen, leaves["W_y"], leaves["b_y"]))
        steps = {f"t_w_{name}": weights[:, i] for i, name in enumerate(names)}
        steps |= {f"t_r_read{i}": reads[:, i] for i in readers}
        steps |= {"t_h": hidden, "t_c": cell, f"t_M_after_{last_writer}": memory}
        for name, found in steps.items():
            assert error(found, arrays[name][time]) < TOLERANCE, (name, time)
    y = torch.stack(outputs)
    y = y.sigmoid() if meta["flags"]["output"] == "sigmoid" else y
    assert error(y, arrays["y"]) < TOLERANCE
    gradients = torch.autograd.grad((y * arrays["loss_w"]).sum(), list(leaves.values()))
    for name, gradient in zip(leaves, gradients, strict=True):
        assert error(gradient, arrays[f"d_{name}"]) < TOLERANCE, f"gradient of {name}"
