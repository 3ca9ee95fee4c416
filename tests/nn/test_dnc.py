"""The DNC module: published results, the laws of a recurrent module, and clear errors."""

import copy
import io
import pickle
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.nn.functional import linear
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

import fastmem
from fastmem.nn import DNC, DNCCell, DNCState
from tests import golden
from tests.golden import error, load
from tests.ops.suite import native

TOLERANCE = 1e-12
GOLDEN = Path(golden.__file__).parent
BACKENDS = ["reference", pytest.param("cpp", marks=native)]
CSORDAS = [f"dnc_csordas_{variant}" for variant in (
    "plain", "plain_clip", "plain_zero", "mask", "mask_floor", "dealloc", "sharp", "all", "all_floor", "all_zero",
)]  # fmt: skip
DEEPMIND = ["dnc_deepmind_access_q1", "dnc_deepmind_access_q2", "dnc_deepmind_access_zero"]
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "masked": {"masked": True, "mask_floor": 0.1},
    "deallocates": {"deallocates": True},
    "sharpened": {"sharpened": True, "norm": "outer"},
    "all": {"masked": True, "deallocates": True, "sharpened": True, "norm": "rsqrt"},
    "softplus": {"oneplus": False, "norm": "clamp", "clip": None},
    "gru": {"controller": "gru"},
    "feedforward": {"controller": "feedforward"},
    "two_layers": {"num_layers": 2},
    "three_layers_gru": {"controller": "gru", "num_layers": 3, "masked": True},
    "two_layers_feedforward": {"controller": "feedforward", "num_layers": 2},
}


@pytest.fixture(params=BACKENDS)
def backend(request):
    with fastmem.use_backend(request.param):
        yield request.param


def small(dtype: torch.dtype = torch.float64, seed: int = 0, **options) -> DNC:
    torch.manual_seed(seed)
    sizes = {"num_read_heads": 2, "num_write_heads": 2, "output_size": 3}
    return DNC(4, 6, num_slots=7, word_size=5, dtype=dtype, **{**sizes, **options})


def sequence(steps: int = 6, batch: int = 3, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(steps, batch, 4, dtype=dtype, generator=torch.Generator().manual_seed(1))


def assert_state_close(actual: DNCState, expected: DNCState, tolerance: float = 1e-13) -> None:
    for name in DNCState._fields:
        assert error(getattr(actual, name), getattr(expected, name)) < tolerance, name


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
    state = net.initial_state(d["B"])._replace(memory=f["M0"], usage=f["u0"])
    return net, state, f, gradients


@pytest.mark.parametrize("file", CSORDAS)
def test_golden_csordas(file, backend):
    net, state, f, gradients = csordas(file)
    inputs = {"x": f["x"].requires_grad_(), "M0": state.memory.requires_grad_(), "u0": state.usage.requires_grad_()}
    output, _ = net(inputs["x"], state)
    assert net.clip is not None and f["y"].abs().max() < net.clip, "the published code does not clip the output"
    assert error(output, f["y"]) < TOLERANCE
    (output * f["loss_w"]).sum().backward()
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
    ways = ("fwd_sharp", "bwd_sharp") if net.sharpened else ("fwd", "bwd")
    viewed = {
        "psi": "retention", "u": "usage", "a": "allocation_weights", "c_w": "write_content_weights",
        "w_w": "write_weights", "p": "precedence", "L": "link", "c_r": "read_content_weights", "w_r": "read_weights",
        **dict(zip(ways, ("forward_weights", "backward_weights"), strict=True)),
    }  # fmt: skip
    heads = {"w_w", "L", "p", "a", "c_w", *ways}  # have a write head more here than in the file

    def same(actual: Tensor, name: str, step: int) -> None:
        actual = actual.squeeze(1) if name in heads else actual
        assert error(actual, f[f"t_{name}"][step]) < TOLERANCE, f"{name} at step {step}"

    for step, step_input in enumerate(f["x"]):
        with net.watched() as views:
            output, state = net.step(step_input, state)
        assert error(output, f["y"][step]) < TOLERANCE
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
        state = net.access(interface(control), state)
        reads.append(state.reads)
        if not file.endswith("zero"):  # there slots tie, and the published code relabels them
            for field, name in starts.items():
                assert error(getattr(state, field), f[f"t_{name[:-1]}"][t]) < TOLERANCE, f"{field} at step {t}"
    y = torch.stack(reads)
    assert error(y, f["y"]) < TOLERANCE
    (y * f["loss_w"]).sum().backward()
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


def test_batch_first_and_unbatched_equal_time_major():
    net, x = small(), sequence()
    output, state = net(x)
    first = small(batch_first=True)
    first_output, first_state = first(x.transpose(0, 1))
    torch.testing.assert_close(first_output.transpose(0, 1), output, rtol=0, atol=0)
    assert_state_close(first_state, state)
    single_output, single_state = net(x[:, 1])
    assert error(single_output, output[:, 1]) < 1e-13
    assert_state_close(single_state, DNCState(*(tensor[1] for tensor in state)))
    again, _ = net(x[:, 1], single_state)
    assert error(again, net(x, state)[0][:, 1]) < 1e-13
    assert error(first(x[:, 1])[0], single_output) < 1e-13


def test_pieces_equal_the_whole_and_the_callers_state_is_left_alone():
    net, x = small(), sequence(steps=9)
    output, last = net(x)
    head, state = net(x[:4])
    kept = DNCState(*(tensor.clone() for tensor in state))
    tail, end = net(x[4:], state)
    assert error(torch.cat([head, tail]), output) < 1e-13
    assert_state_close(end, last)
    for before, after in zip(kept, state, strict=True):
        assert torch.equal(before, after)
    assert torch.equal(net(x)[0], output), "the same input twice"


def test_samples_permute():
    net, x = small(), sequence()
    order = torch.tensor([2, 0, 1])
    assert error(net(x[:, order])[0], net(x)[0][:, order]) < 1e-13


def test_no_steps_and_no_samples():
    net = small()
    output, state = net(sequence(steps=0))
    assert output.shape == (0, 3, 3)
    assert_state_close(state, net.initial_state(3))
    output, state = net(sequence(batch=0))
    assert output.shape == (6, 0, 3)
    assert state.link.shape == (0, 2, 7, 7)


def test_gradient_reaches_input_parameters_and_initial_state():
    net, x = small(), sequence(steps=3).requires_grad_()
    _, state = net(sequence())
    state = DNCState(*(tensor.requires_grad_() for tensor in state.detach()))
    output, last = net(x, state)
    sum(tensor.square().sum() for tensor in (output, *last)).backward()
    for name, tensor in [("input", x), *net.named_parameters(), *state._asdict().items()]:
        assert tensor.grad is not None, name
        assert tensor.grad.isfinite().all(), name
        assert (tensor.grad != 0).any(), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradcheck_through_five_steps(variant, backend):
    net, x = small(**VARIANTS[variant]), sequence(steps=5, batch=2).requires_grad_()
    _, state = net(sequence(batch=2))
    starts = [tensor.requires_grad_() for tensor in state.detach()]

    def run(x, *rest):
        output, last = net(x, DNCState(*rest[: len(starts)]))
        return output, *last

    assert torch.autograd.gradcheck(run, (x, *starts, *net.parameters()), fast_mode=True)


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


def test_copies_and_saved_parameters_give_the_same_output(tmp_path):
    net, x = small(), sequence()
    output, state = net(x)
    assert torch.equal(copy.deepcopy(net)(x)[0], output)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x)[0], output)
    torch.save(net.state_dict(), tmp_path / "parameters.pt")
    other = small(seed=1)
    assert not torch.equal(other(x)[0], output)
    other.load_state_dict(torch.load(tmp_path / "parameters.pt"))
    assert torch.equal(other(x)[0], output)
    torch.save(state.detach(), tmp_path / "state.pt")
    for loaded in (pickle.loads(pickle.dumps(state)), torch.load(tmp_path / "state.pt"), copy.deepcopy(state.detach())):
        assert type(loaded) is DNCState and all(torch.equal(a, e) for a, e in zip(loaded, state, strict=True))


def test_float32_follows_float64():
    net, x = small(), sequence()
    single = small(torch.float32)
    single.load_state_dict(net.state_dict())
    assert error(single(x.float())[0].double(), net(x)[0]) < 1e-5
    assert net.float()(x.float())[0].dtype == torch.float32


def test_autocast_lowers_the_linear_maps_only():
    net, x = small(torch.float32), sequence(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = net(x)
        assert output.dtype == torch.bfloat16
        assert {tensor.dtype for tensor in state} == {torch.float32}
        net(x.bfloat16(), state)[0].float().sum().backward()
    assert error(output.float(), net(x)[0]) < 0.05
    gradients = [parameter.grad for parameter in net.parameters()]
    assert {None if grad is None else grad.dtype for grad in gradients} == {torch.float32}


def test_state_detach():
    _, state = small()(sequence())
    assert state.link.requires_grad
    assert not any(tensor.requires_grad for tensor in state.detach())


def test_slots_can_outlive_their_use():
    net, x = small(), sequence(steps=60)
    output, state = net(x)
    assert output.isfinite().all()
    assert state.link.min() >= 0
    for weights in (state.write_weights, state.read_weights, state.precedence):
        assert weights.sum(-1).max() <= 1 + 1e-12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
        ({"num_slots": True}, "num_slots: expected a positive integer, got True"),
        ({"output_size": "3"}, "output_size: expected a positive integer, got '3'"),
        ({"word_size": 2.5}, "word_size: expected a positive integer, got 2.5"),
        ({"norm": "cosine"}, "norm: expected one of inner, outer, rsqrt, clamp, got 'cosine'"),
        ({"eps": -1.0}, "eps: expected a finite number of at least 0, got -1.0"),
        ({"eps": True}, "eps: expected a finite number of at least 0, got True"),
        ({"clip": 0.0}, "clip: expected a positive number or None, got 0.0"),
        ({"clip": "a"}, "clip: expected a positive number or None, got 'a'"),
        ({"clip": True}, "clip: expected a positive number or None, got True"),
        ({"clip": torch.ones(2)}, "clip: expected a positive number or None, got tensor"),
        ({"mask_floor": 1.0}, r"mask_floor: expected a number in \[0, 1\), got 1.0"),
        ({"mask_floor": None}, r"mask_floor: expected a number in \[0, 1\), got None"),
        ({"controller": "rnn"}, "controller: expected one of lstm, gru, feedforward, got 'rnn'"),
        ({"num_layers": 0}, "num_layers: expected a positive integer, got 0"),
    ],
)
@pytest.mark.parametrize("module", [DNC, DNCCell])
def test_errors_of_the_constructor(module, options, message):
    with pytest.raises(ValueError, match=message):
        module(**{"input_size": 4, "hidden_size": 6, "num_slots": 7, "word_size": 5, **options})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, "float32"])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(TypeError, match=rf"dtype: expected torch.float32 or torch.float64, got {dtype}"):
        small(dtype)


def test_a_module_made_half_is_refused_when_called():
    net, x = small().half(), sequence(dtype=torch.float16)
    with pytest.raises(TypeError, match=r"weight_ih_l0: expected dtype torch.float32 or .*, got torch.float16"):
        net(x)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"weight_ih_l0: expected .*, got torch.float16"),
    ):
        net(x)


def test_numpy_numbers_are_sizes_and_bounds():
    net = DNC(np.int64(4), 6, num_slots=np.int32(7), word_size=5, clip=np.float32(20))
    assert (type(net.input_size), type(net.num_slots), type(net.clip)) == (int, int, float)
    assert torch.equal(net.initial_state(2).memory, torch.zeros(2, 7, 5))


def test_meta_device_gives_shapes():
    output, state = small(device="meta")(sequence().to("meta"))
    assert output.is_meta and output.shape == (6, 3, 3)
    assert [tensor.shape for tensor in state] == [tensor.shape for tensor in small().initial_state(3)]


def test_errors_of_the_input():
    net = small()
    with pytest.raises(ValueError, match="input: expected input_size 4 in the last dimension, got 5"):
        net(pack_sequence([torch.randn(3, 5)]))
    with pytest.raises(TypeError, match=r"input: expected dtype torch.float64.*got torch.float32"):
        net(pack_sequence([torch.randn(3, 4)]))
    with pytest.raises(TypeError, match="input: expected a Tensor, got list"):
        DNCCell(4, 6, 7, 5)([1.0])
    with pytest.raises(ValueError, match=r"input: expected \[B, X\] or \[X\], got shape \[3, 2, 4\]"):
        DNCCell(4, 6, 7, 5)(torch.randn(3, 2, 4))
    with pytest.raises(TypeError, match="input: expected a Tensor, got list"):
        net([1.0])
    with pytest.raises(ValueError, match=r"input: expected \[T, B, X\] or \[T, X\], got shape \[4\]"):
        net(torch.randn(4))
    with pytest.raises(ValueError, match="input: expected input_size 4 in the last dimension, got 5"):
        net(torch.randn(3, 2, 5))
    with pytest.raises(TypeError, match=r"input: expected dtype torch.float64.*got torch.float32"):
        net(torch.randn(3, 2, 4))
    with pytest.raises(TypeError, match=r"input: expected dtype torch.float64.*got torch.float16"):
        net(torch.randn(3, 2, 4).half())
    with torch.autocast("cpu"), pytest.raises(TypeError, match=r"input: expected dtype .*, got torch.int64"):
        net(torch.ones(3, 2, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match="input: expected device cpu, that of weight_ih_l0, got meta"):
        net(sequence().to("meta"))
    with pytest.raises(ValueError, match=r"input: expected a dense tensor, got torch.sparse_coo"):
        net(sequence().to_sparse())


def test_errors_of_the_state():
    net, x = small(), sequence()
    state = net.initial_state(3)
    with pytest.raises(TypeError, match="state: expected a DNCState or None, got tuple"):
        net(x, (state.hidden, state.cell))
    with pytest.raises(ValueError, match=r"state.memory: expected shape \[3, 7, 5\], got \[2, 7, 5\]"):
        net(x, net.initial_state(2))
    with pytest.raises(ValueError, match=r"state.link: expected shape \[3, 2, 7, 7\], got \[3, 7, 7\]"):
        net(x, state._replace(link=state.link[:, 0]))
    with pytest.raises(ValueError, match=r"state.memory: expected shape \[7, 5\], got \[3, 7, 5\]"):
        net(x[:, 0], state)
    with pytest.raises(TypeError, match=r"state.usage: expected dtype torch.float64.*got torch.float32"):
        net(x, state._replace(usage=state.usage.float()))
    with pytest.raises(TypeError, match=r"state.reads: expected a Tensor, got NoneType"):
        net(x, state._replace(reads=None))
    with pytest.raises(ValueError, match=r"state.link: expected a dense tensor, got torch.sparse_coo"):
        net(x, state._replace(link=state.link.to_sparse()))
    with pytest.raises(ValueError, match=r"state.cell: expected device cpu, that of weight_ih_l0, got meta"):
        net(x, state._replace(cell=state.cell.to("meta")))


@pytest.mark.parametrize("lengths", [[6, 4, 1], [2, 6, 5], torch.tensor([3, 3, 3], dtype=torch.int32)])
@pytest.mark.parametrize("training", [True, False])
def test_each_padded_sequence_runs_as_if_alone(lengths, training):
    net, x = small(), sequence()
    _, start = net(sequence(steps=2))
    with torch.set_grad_enabled(training):
        output, last = net(x, start, lengths=lengths)
    assert output.shape == (6, 3, 3)
    for row, length in enumerate(lengths):
        alone, end = net(x[:length, row], DNCState(*(tensor[row] for tensor in start)))
        assert error(output[:length, row], alone) < 1e-13
        assert not output[length:, row].any()
        assert_state_close(DNCState(*(tensor[row] for tensor in last)), end)
    first, first_last = small(batch_first=True)(x.transpose(0, 1), start, lengths)
    assert error(first, output.transpose(0, 1)) < 1e-13
    assert_state_close(first_last, last)


@pytest.mark.parametrize("lengths", [[6, 4, 1], [2, 6, 5]])
def test_packed_sequences_equal_padded_ones(lengths):
    net, x = small(), sequence().requires_grad_()
    start = net(sequence(steps=2))[1].detach()
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=sorted(lengths, reverse=True) == lengths)
    output, last = net(packed, start)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    padded, padded_last = net(x, start, lengths)
    unpacked, unpacked_lengths = pad_packed_sequence(output)
    assert torch.equal(unpacked, padded) and unpacked_lengths.tolist() == lengths
    assert_state_close(last, padded_last, 1e-300)
    # As torch.nn.LSTM has it, batch_first does not matter to packed input.
    assert torch.equal(small(batch_first=True)(packed, start)[0].data, output.data)
    parameters = [x, *net.parameters()]
    weights = torch.randn_like(padded)
    gradients = [
        torch.autograd.grad((result * weights).sum() + end.memory.square().sum(), parameters)
        for result, end in ((unpacked, last), (padded, padded_last))
    ]
    for packed_gradient, padded_gradient in zip(*gradients, strict=True):
        assert error(packed_gradient, padded_gradient) < 1e-13
    assert all(not gradients[1][0][length:, row].any() for row, length in enumerate(lengths))


def test_lengths_of_no_samples():
    output, state = small()(sequence(batch=0), lengths=[])
    assert output.shape == (6, 0, 3) and state.usage.shape == (0, 7)


def test_errors_of_the_lengths():
    net, x = small(), sequence()
    with pytest.raises(ValueError, match=r"lengths: expected shape \[3\], got \[2\]"):
        net(x, lengths=[1, 2])
    with pytest.raises(ValueError, match=r"lengths: expected numbers from 1 to 6, got \[1, 7, 2\]"):
        net(x, lengths=[1, 7, 2])
    with pytest.raises(ValueError, match=r"lengths: expected numbers from 1 to 6, got \[1, 0, 2\]"):
        net(x, lengths=torch.tensor([1, 0, 2]))
    with pytest.raises(TypeError, match=r"lengths: expected integers, got torch.float32"):
        net(x, lengths=[1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="lengths: expected None, as the input is an input without a batch"):
        net(x[:, 0], lengths=[3])
    with pytest.raises(ValueError, match="lengths: expected None, as the input is a PackedSequence"):
        net(pack_sequence([x[:, 0]]), lengths=[3])


@pytest.mark.parametrize("variant", VARIANTS)
def test_inference_gives_the_same_bits_in_buffers_of_its_own(variant, backend):
    net, x = small(**VARIANTS[variant]), sequence()
    _, start = net(sequence(steps=2))
    start = start.detach()
    kept = DNCState(*(tensor.clone() for tensor in start))
    for given in (None, start):
        for lengths in (None, [2, 6, 5]):
            output, last = net(x, given, lengths)
            step_ = mock.Mock(wraps=fastmem.dnc_step_)
            with torch.no_grad(), mock.patch.object(fastmem.ops, "dnc_step_", step_):
                quick, quick_last = net(x, given, lengths)
            assert torch.equal(quick, output)
            assert all(torch.equal(a, e) for a, e in zip(quick_last, last, strict=True))
            for argument in range(1, 8):
                buffers = {call.args[argument].data_ptr() for call in step_.call_args_list}
                assert len(step_.call_args_list) == 6 and len(buffers) == 1
    assert all(torch.equal(a, e) for a, e in zip(start, kept, strict=True))


def test_inference_under_autocast_inference_mode_vmap_and_on_meta():
    net, x = small(torch.float32), sequence(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = net(x)
        with torch.no_grad():
            assert torch.equal(net(x)[0], expected)
    with torch.inference_mode():
        output, state = net(x)
        assert torch.equal(net(x, state)[0], net(x, DNCState(*(tensor.clone() for tensor in state)))[0])
    assert torch.equal(output, net(x)[0])
    with torch.no_grad():
        plain = small(controller="feedforward")  # torch has no vmap of lstm_cell
        x = x.double()
        assert error(torch.vmap(plain)(torch.stack([x, 2 * x]))[0][1], plain(2 * x)[0]) < 1e-13
        assert small(device="meta")(sequence().to("meta"))[0].is_meta


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_cell_is_a_step(variant):
    options = {"num_read_heads": 2, "num_write_heads": 2, "output_size": 3, **VARIANTS[variant]}
    net, cell = small(**options), DNCCell(4, 6, 7, 5, dtype=torch.float64, **options)
    assert list(cell.state_dict()) == list(net.state_dict())
    cell.load_state_dict(net.state_dict())
    x = sequence()
    output, state = cell(x[0])
    outputs = [output]
    for step_input in x[1:]:
        before, kept = state, [tensor.clone() for tensor in state]
        with torch.set_grad_enabled(len(outputs) < 3):
            output, state = cell(step_input, state)
        assert all(torch.equal(a, e) for a, e in zip(before, kept, strict=True))
        outputs.append(output)
    expected, last = net(x)
    assert torch.equal(torch.stack(outputs), expected)
    assert_state_close(state, last)
    single, single_state = cell(x[0, 1])
    assert error(single, expected[0, 1]) < 1e-13
    assert error(cell(x[1, 1], single_state)[0], expected[1, 1]) < 1e-13


def test_errors_of_the_state_of_a_cell():
    cell = DNCCell(4, 6, 7, 5)
    with pytest.raises(ValueError, match=r"state.memory: expected shape \[3, 7, 5\], got \[2, 7, 5\]"):
        cell(torch.randn(3, 4), cell.initial_state(2))
    with pytest.raises(TypeError, match="state: expected a DNCState or None, got tuple"):
        cell(torch.randn(3, 4), (torch.zeros(3, 6), torch.zeros(3, 6)))


@pytest.mark.parametrize(("controller", "torch_module"), [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
def test_controller_is_that_of_torch(controller, torch_module):
    net = small(controller=controller, num_layers=3)
    theirs = torch_module(4 + 2 * 5, 6, num_layers=3, dtype=torch.float64)
    ours = [(name, parameter.shape) for name, parameter in net.named_parameters() if "_l" in name]
    assert ours == [(name, parameter.shape) for name, parameter in theirs.named_parameters()]
    theirs.load_state_dict({name: parameter for name, parameter in net.state_dict().items() if "_l" in name})
    seen, state = torch.randn(4, 3, 14, dtype=torch.float64), net.initial_state(3)
    expected, ends = theirs(seen)
    hidden, cell, tops = state.hidden, state.cell, []
    for step_seen in seen:
        top, hidden, cell = net.control(step_seen, hidden, cell)
        tops.append(top)
    assert error(torch.stack(tops), expected) < 1e-14
    ends = ends if controller == "lstm" else (ends,)
    for ours_end, end in zip((hidden, cell), ends, strict=controller == "lstm"):
        assert error(ours_end, end.transpose(0, 1).flatten(1)) < 1e-14


def test_feedforward_controller():
    net = small(controller="feedforward", num_layers=2)
    assert [name for name, _ in net.named_parameters()][:4] == [
        "weight_ih_l0", "bias_ih_l0", "weight_ih_l1", "bias_ih_l1",
    ]  # fmt: skip
    state = net.initial_state(3)
    assert state.hidden.shape == state.cell.shape == (3, 0)
    seen = torch.randn(3, 14, dtype=torch.float64)
    top, *_ = net.control(seen, state.hidden, state.cell)
    for layer in range(2):
        seen = linear(seen, *(net.get_parameter(f"{name}_l{layer}") for name in ("weight_ih", "bias_ih"))).tanh()
    assert error(top, seen) < 1e-14


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_of_every_variant(variant):
    net, x = small(torch.float32, **VARIANTS[variant]), sequence(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = net(x)
    assert output.dtype == torch.bfloat16 and {tensor.dtype for tensor in state} == {torch.float32}
    output.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in net.parameters())


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([0, 2]), torch.tensor([True, False, True]), [-1, -3]])
def test_state_reset(rows):
    net, x = small(num_layers=2), sequence()
    _, state = net(x)
    kept = [tensor.clone() for tensor in state]
    fresh = state.reset(rows)
    for name, before, after, old in zip(DNCState._fields, state, fresh, kept, strict=True):
        assert torch.equal(before, old), name
        assert not after[[0, 2]].any() and torch.equal(after[1], before[1]), name
    assert error(net(x, fresh)[0][:, 0], net(x)[0][:, 0]) < 1e-13
    assert error(net(x, fresh)[0][:, 1], net(x, state)[0][:, 1]) < 1e-13
    assert_state_close(state.reset([]), state)
    with pytest.raises(ValueError, match="state: expected a batch, whose rows are to be reset"):
        net(x[:, 0])[1].reset([0])


def test_state_reset_cures_nan_and_stops_its_gradient():
    net, x = small(), sequence()
    broken = x.clone()
    broken[:, 1] = float("nan")
    broken.requires_grad_()
    _, state = net(broken)
    output, _ = net(x, state.reset([1]))
    assert output.isfinite().all()
    output.sum().backward()
    assert broken.grad is not None and broken.grad[:, 0].isfinite().all() and broken.grad[:, 0].any()


def test_state_to():
    _, state = small()(sequence())
    assert {tensor.dtype for tensor in state.to(torch.float32)} == {torch.float32}
    moved = state.to(device="meta", dtype=torch.float32)
    assert type(moved) is DNCState and all(tensor.is_meta for tensor in moved)


@pytest.mark.parametrize("variant", VARIANTS)
def test_views_are_what_the_run_did(variant, backend):
    net, x = small(**VARIANTS[variant]), sequence()
    with torch.no_grad(), net.watched() as views:
        output, last = net(x)
        net(x[:2, 0])
    assert torch.equal(output, net(x)[0]), "watching changes nothing"
    run, single = views
    assert not run.usage.requires_grad
    for name in ("usage", "precedence", "link", "write_weights", "read_weights"):
        assert torch.equal(getattr(run, name)[-1], getattr(last, name)), name
        assert torch.equal(getattr(run, name)[0], getattr(net(x[:1])[1], name)), name
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


def test_views_of_padded_and_packed_sequences_and_of_a_cell():
    net, x, lengths = small(batch_first=True), sequence().transpose(0, 1), [2, 6, 5]
    with net.watched() as views:
        net(x, lengths=lengths)
        net(pack_padded_sequence(x, torch.tensor(lengths), batch_first=True, enforce_sorted=False))
        net(x)
        net(x[:, :0])
    padded, packed, full = views
    for name in full._fields:
        assert torch.equal(getattr(padded, name), getattr(packed, name)), name
        for row, length in enumerate(lengths):
            assert error(getattr(padded, name)[:length, row], getattr(full, name)[:length, row]) < 1e-13, name
            assert not getattr(padded, name)[length:, row].any(), name
    net(x)
    assert len(views) == 3, "outside nothing is kept, and a run of no steps sees nothing"
    cell = DNCCell(4, 6, 7, 5, 2, 2, 3, dtype=torch.float64)
    cell.load_state_dict(net.state_dict())
    with cell.watched() as views:
        cell(x[:, 0])
    for view, expected in zip(views[0], full, strict=True):
        assert error(view, expected[0]) < 1e-13


@pytest.mark.parametrize("variant", VARIANTS)
def test_cell_compiles_without_graph_breaks(variant):
    cell = DNCCell(4, 6, 7, 5, 2, **VARIANTS[variant])
    _, state = cell(torch.randn(3, 4))
    state, x = state.detach(), torch.randn(3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    results = []
    for function in (cell, compiled):
        output, last = function(x, state)
        gradients = torch.autograd.grad(output.sum() + last.memory.square().sum(), list(cell.parameters()))
        results.append((output, *last, *gradients))
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], cell(x)[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_cell_exports_saves_and_loads_for_any_batch(variant):
    cell = DNCCell(4, 6, 7, 5, 2, **VARIANTS[variant])
    batch = {0: torch.export.Dim("batch", min=2)}
    example = (torch.randn(3, 4), cell.initial_state(3))
    program = torch.export.export(cell, example, dynamic_shapes=(batch, DNCState._make([batch] * len(example[1]))))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, 4)
    _, state = cell(torch.randn(5, 4))
    output, last = torch.export.load(file).module()(x, state.detach())
    expected, expected_last = cell(x, state)
    assert torch.equal(output, expected) and isinstance(last, DNCState)
    assert all(torch.equal(a, e) for a, e in zip(last, expected_last, strict=True))


def test_sequence_compiles_and_exports():
    net, x = small(), sequence()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x)[0], net(x)[0])
    program = torch.export.export(net, (x,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    wider = sequence(batch=5)
    assert torch.equal(program.module()(wider)[0], net(wider)[0])


def test_distributed_data_parallel(tmp_path):
    net, x = small(), sequence()
    expected = torch.autograd.grad(net(x)[0].square().sum(), list(net.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(net)
        output, state = parallel(x)
        assert isinstance(state, DNCState)
        output.square().sum().backward()
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert error(parameter.grad, gradient) < 1e-13
        output, _ = parallel(pack_padded_sequence(x, torch.tensor([2, 6, 5]), enforce_sorted=False), state.detach())
        assert len(output.data) == 13
    finally:
        torch.distributed.destroy_process_group()
