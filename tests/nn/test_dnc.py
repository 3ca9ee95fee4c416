"""The DNC module: published results, the laws of a recurrent module, and clear errors."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus
from torch.nn.utils.rnn import pack_sequence

from fastmem.nn import DNC, DNCState
from fastmem.nn.dnc import Interface
from tests.golden import error, load

TOLERANCE = 1e-12


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
    d = meta["dims"]
    net = DNC(
        d["X"], d["H"], d["N"], d["W"], d["R"], d["Q"], output_size=d["Y"], norm="outer", eps=1e-6,
        detach_usage_write=True, dtype=torch.float64,
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


@pytest.mark.parametrize("file", ["dnc_csordas_plain", "dnc_csordas_plain_clip", "dnc_csordas_plain_zero"])
def test_golden_csordas(file):
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


@pytest.mark.parametrize("file", ["dnc_csordas_plain", "dnc_csordas_plain_clip", "dnc_csordas_plain_zero"])
def test_golden_csordas_step_by_step(file):
    net, state, f, _ = csordas(file)
    fields = {
        "h": "hidden", "c": "cell", "u": "usage", "M": "memory", "w_w": "write_weights", "L": "link",
        "p": "precedence", "w_r": "read_weights", "r": "reads",
    }  # fmt: skip
    for t, step_input in enumerate(f["x"]):
        output, state = net.step(step_input, state)
        assert error(output, f["y"][t]) < TOLERANCE
        for name, field in fields.items():
            actual = getattr(state, field)
            actual = actual.squeeze(1) if name in ("w_w", "L", "p") else actual
            assert error(actual, f[f"t_{name}"][t]) < TOLERANCE, f"{field} at step {t}"


@pytest.mark.parametrize("file", ["dnc_deepmind_access_q1", "dnc_deepmind_access_q2", "dnc_deepmind_access_zero"])
def test_golden_deepmind_access(file):
    """The memory access alone, driven by given controls; strengths are softplus there, so the test makes the fields."""
    f, meta = load(file)
    d = meta["dims"]
    batch, heads, write_heads, word = d["B"], d["R"], d["Q"], d["W"]
    net = DNC(1, 1, d["N"], word, heads, write_heads, detach_usage_write=True, dtype=torch.float64)
    weights = {name: f[name].requires_grad_() for name in f if name.startswith(("W_", "b_"))}
    h = f["h"].requires_grad_()
    starts = {
        "memory": "M0", "usage": "u0", "precedence": "p0", "link": "L0",
        "write_weights": "w_w0", "read_weights": "w_r0",
    }  # fmt: skip
    given = {field: f[name].requires_grad_() for field, name in starts.items() if name in f}
    state = net.initial_state(batch)._replace(**given)
    # The file's modes are backward 1..Q, forward 1..Q, content.
    order = [*range(write_heads), 2 * write_heads, *range(write_heads, 2 * write_heads)]

    def fields(control: Tensor) -> Interface:
        def field(name: str, *shape: int) -> Tensor:
            return torch.nn.functional.linear(control, weights[f"W_{name}"], weights[f"b_{name}"]).unflatten(-1, shape)

        return Interface(
            read_keys=field("k_r", heads, word),
            read_strengths=softplus(field("beta_r", heads)),
            write_keys=field("k_w", write_heads, word),
            write_strengths=softplus(field("beta_w", write_heads)),
            erase=field("e", write_heads, word).sigmoid(),
            values=field("v", write_heads, word),
            free_gates=field("f", heads).sigmoid(),
            allocation_gates=field("g_a", write_heads).sigmoid(),
            write_gates=field("g_w", write_heads).sigmoid(),
            read_modes=field("pi", heads, 2 * write_heads + 1).softmax(-1)[..., order],
        )

    reads = []
    for t, control in enumerate(h):
        state = net.access(fields(control), state)
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


def test_gradcheck():
    net, x = small(num_write_heads=1), sequence(steps=2, batch=1).requires_grad_()
    _, state = net(sequence(batch=1))
    starts = [tensor.requires_grad_() for tensor in state.detach()]
    parameters = list(net.parameters())

    def run(x, *rest):
        output, last = net(x, DNCState(*rest[: len(starts)]))
        return output, *last

    assert torch.autograd.gradcheck(run, (x, *starts, *parameters), fast_mode=True)


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
    assert_state_close(pickle.loads(pickle.dumps(state)), state)


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
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        DNC(**{"input_size": 4, "hidden_size": 6, "num_slots": 7, "word_size": 5, **options})


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
    with pytest.raises(TypeError, match="PackedSequence"):
        net(pack_sequence([torch.randn(3, 4)]))
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
