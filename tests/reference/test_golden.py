"""float64: values and gradients against published implementations (tests/golden)."""

from pathlib import Path

import pytest
import torch

import fastmem
from tests import golden
from tests.golden import error, load
from tests.golden.ops import EACH_FUNCTION, OPS, check_float32, run
from tests.ops.suite import native

TOLERANCE = 1e-12
GOLDEN = Path(golden.__file__).parent
NTMS = ["ntm_nsm", "ntm_nsm_r2", "ntm_loudin", "ntm_loudin_r2"]
STORED_PROGRAM_MACHINES = ["nutm_nsm_p2", "nutm_nsm_p3", "nutm_nsm_da"]
BACKENDS = ["reference", pytest.param("cpp", marks=native)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("file", "op"), OPS)
def test_ops(file, op, backend):
    actual, expected = run(file, op, backend)
    for name, tensor in actual.items():
        assert error(tensor, expected[name]) < TOLERANCE, name


@native
@pytest.mark.parametrize(("file", "function"), EACH_FUNCTION)
def test_ops_in_float32(file, function):
    check_float32(file, function, "cpp")


def test_every_stored_program_machine_is_compared():
    assert {path.stem for path in GOLDEN.glob("nutm_*.npz")} == {*STORED_PROGRAM_MACHINES}


def test_every_op_of_the_files_is_compared():
    files = [path.stem for path in GOLDEN.glob("ops_*.npz")]
    assert {(file, op) for file in files for op in load(file)[1]["ops"]} == {*OPS, ("ops_deepmind", "alloc_ties")}


@pytest.mark.parametrize("backend", BACKENDS)
def test_linkage_in_place(backend):
    arrays, _ = load("ops_deepmind")
    link, precedence, *weights = (arrays[f"linkage.{name}"] for name in ("L", "p", "w", "w_r"))
    forward, backward = fastmem.temporal_linkage_(link, precedence, *weights, backend=backend)
    outputs = {"L": link, "p": precedence, "fwd": forward.transpose(1, 2), "bwd": backward.transpose(1, 2)}
    for name, output in outputs.items():
        assert error(output, arrays[f"linkage.out.{name}"]) < TOLERANCE, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_allocation_of_ties(backend):
    """The first head alone: the published code merges nearly free usages, which orders later heads in its own way."""
    arrays, _ = load("ops_deepmind")
    weights = fastmem.allocation(arrays["alloc_ties.u"], arrays["alloc_ties.g"], backend=backend)
    assert error(weights[:, 0], arrays["alloc_ties.out.a"][:, 0]) < TOLERANCE


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


def raw_numbers(arrays, head, hidden, direct_attention, backend):
    """What a head says, and the programs that it says it by: of an NTM it is a linear map, and there are none."""
    if f"W_o_{head}" in arrays:
        return torch.nn.functional.linear(hidden, arrays[f"W_o_{head}"], arrays[f"b_o_{head}"]), {}
    query = torch.nn.functional.linear(hidden, arrays[f"W_q_{head}"], arrays[f"b_q_{head}"])
    strength = torch.nn.functional.linear(hidden, arrays[f"W_b_{head}"], arrays[f"b_b_{head}"])
    strength = torch.nn.functional.softplus(strength)
    programs = arrays[f"V_{head}"], arrays[f"Bv_{head}"]
    if direct_attention:  # the query is the score of each program
        program_weights = torch.softmax(strength * query, -1)
        raw = fastmem.program_mix(hidden, program_weights, *programs, backend=backend)
    else:
        raw, program_weights = fastmem.program_lookup(
            hidden, query.tanh(), strength.squeeze(-1), arrays[f"K_{head}"].tanh(), *programs,
            norm="width", backend=backend,
        )  # fmt: skip
    return raw, {f"t_p_w_{head}": program_weights, f"t_o_{head}": raw}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("file", [*NTMS, *STORED_PROGRAM_MACHINES])
def test_ntm(file, backend):
    """The whole model: a controller, each head's raw numbers, the step, and an output layer. A stored-program machine
    looks up the map to the raw numbers anew in every step."""
    arrays, meta = load(file)
    names, sizes = meta["heads"], meta["dims"]
    readers, last_writer = range(sizes["R"]), f"write{sizes['Q'] - 1}"
    direct = meta["flags"].get("program_attention") == "direct"
    leaves = {name: arrays[name].requires_grad_() for name in arrays if f"d_{name}" in arrays}
    lstm = tuple(leaves[name] for name in ("W_x", "W_h", "b_ih", "b_hh"))
    batch = leaves["x"].shape[1]
    hidden, cell, memory = (leaves[name].expand(batch, *leaves[name].shape) for name in ("h0", "c0", "M0"))
    reads = torch.stack([leaves[f"r0_{i}"] for i in readers]).expand(batch, -1, -1)
    weights = memory.new_zeros(batch, len(names), sizes["N"])
    outputs = []
    for time, inputs in enumerate(leaves["x"]):
        hidden, cell = torch.lstm_cell(torch.cat([inputs, reads.flatten(1)], -1), (hidden, cell), *lstm)
        raw, programs = zip(*(raw_numbers(leaves, name, hidden, direct, backend) for name in names), strict=True)
        memory, weights, reads = fastmem.ntm_step(
            torch.cat(raw, -1), memory, weights, "".join(name[0] for name in names), reversed_shift=True, form="power",
            clip=None, norm="clamp", backend=backend,
        )  # fmt: skip
        seen = torch.cat([hidden, reads.flatten(1)], -1)
        outputs.append(torch.nn.functional.linear(seen, leaves["W_y"], leaves["b_y"]))
        steps = {f"t_w_{name}": weights[:, i] for i, name in enumerate(names)}
        steps |= {f"t_r_read{i}": reads[:, i] for i in readers}
        steps |= {"t_h": hidden, "t_c": cell, f"t_M_after_{last_writer}": memory}
        for of_head in programs:
            steps |= of_head
        for name, found in steps.items():
            assert error(found, arrays[name][time]) < TOLERANCE, (name, time)
    y = torch.stack(outputs)
    y = y.sigmoid() if meta["flags"]["output"] == "sigmoid" else y
    assert error(y, arrays["y"]) < TOLERANCE
    # The keys of programs that are attended to directly are unused.
    gradients = torch.autograd.grad((y * arrays["loss_w"]).sum(), list(leaves.values()), materialize_grads=True)
    for name, gradient in zip(leaves, gradients, strict=True):
        assert error(gradient, arrays[f"d_{name}"]) < TOLERANCE, f"gradient of {name}"
