"""What every network with a memory promises: the laws of a recurrent module, and clear errors."""

import copy
import inspect
import io
import pickle
import re
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
from tests.golden import error
from tests.nn.networks import sequence
from tests.ops.sequences import controlled


def test_batch_first_and_unbatched_equal_time_major(network):
    net, x = network.small(), sequence()
    output, state = net(x)
    first = network.small(batch_first=True)
    first_output, first_state = first(x.transpose(0, 1))
    torch.testing.assert_close(first_output.transpose(0, 1), output, rtol=0, atol=0)
    network.assert_state_close(first_state, state)
    single_output, single_state = net(x[:, 1])
    assert error(single_output, output[:, 1]) < 1e-13
    network.assert_state_close(single_state, [tensor[1] for tensor in state])
    again, _ = net(x[:, 1], single_state)
    assert error(again, net(x, state)[0][:, 1]) < 1e-13
    assert error(first(x[:, 1])[0], single_output) < 1e-13


@pytest.mark.parametrize("training", [True, False])
def test_pieces_equal_the_whole_and_the_callers_state_is_left_alone(network, options, training):
    net, x = network.small(**options), sequence(steps=9)
    with torch.set_grad_enabled(training):
        output, last = net(x)
        head, state = net(x[:4])
        kept = [tensor.clone() for tensor in state]
        tail, end = net(x[4:], state)
        assert torch.equal(net(x)[0], output), "the same input twice"
    assert error(torch.cat([head, tail]), output) < 1e-13
    network.assert_state_close(end, last)
    assert all(torch.equal(a, e) for a, e in zip(state, kept, strict=True))


def test_samples_permute(network):
    net, x = network.small(), sequence()
    order = torch.tensor([2, 0, 1])
    assert error(net(x[:, order])[0], net(x)[0][:, order]) < 1e-13


@pytest.mark.parametrize("training", [True, False])
def test_no_steps_and_no_samples(network, training):
    net = network.small()
    with torch.set_grad_enabled(training):
        output, state = net(sequence(steps=0))
        assert output.shape == (0, 3, 3)
        network.assert_state_close(state, net.initial_state(3))
        for none in (None, torch.empty(0)):
            output, state = net(sequence(batch=0), lengths=none)
            assert output.shape == (6, 0, 3)
            assert [tensor.shape for tensor in state] == [tensor.shape for tensor in net.initial_state(0)]


def test_gradient_reaches_input_parameters_and_initial_state(network):
    net, x = network.small(), sequence(steps=3).requires_grad_()

    def check(named, results):
        gradients = torch.autograd.grad(sum(tensor.square().sum() for tensor in results), [t for _, t in named])
        for (name, _), gradient in zip(named, gradients, strict=True):
            assert gradient.isfinite().all(), name
            assert (gradient != 0).any(), name

    output, state = net(x)
    check([("input", x), *net.named_parameters()], [output, *state])
    start = network.state(*(tensor.requires_grad_() for tensor in state.detach()))
    output, state = net(x, start)
    check(list(start._asdict().items()), [output, *state])


def test_gradcheck_through_five_steps(network, options, backend):
    net, x = network.small(**options), sequence(steps=5, batch=2).requires_grad_()
    _, state = net(sequence(batch=2))
    starts = [tensor.clone(memory_format=torch.contiguous_format).requires_grad_() for tensor in state.detach()]

    def run(x, *rest):
        output, last = net(x, network.state._make(rest[: len(starts)]))
        first, end = net(x[:1])  # from the state that the network begins with
        return output, *last, first, *end

    assert torch.autograd.gradcheck(run, (x, *starts, *net.parameters()), fast_mode=True)


def test_copies_and_saved_parameters_give_the_same_output(network, options, tmp_path):
    net, x = network.small(**options), sequence()
    output, state = net(x)
    assert torch.equal(copy.deepcopy(net)(x)[0], output)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x)[0], output)
    torch.save(net.state_dict(), tmp_path / "parameters.pt")
    other = network.small(seed=1, **options)
    assert not torch.equal(other(x)[0], output)
    other.load_state_dict(torch.load(tmp_path / "parameters.pt"))
    assert torch.equal(other(x)[0], output)
    state = state.detach()
    torch.save(state, tmp_path / "state.pt")
    for loaded in (pickle.loads(pickle.dumps(state)), torch.load(tmp_path / "state.pt"), copy.deepcopy(state)):
        assert type(loaded) is network.state and all(torch.equal(a, e) for a, e in zip(loaded, state, strict=True))


def test_float32_follows_float64(network):
    net, x = network.small(), sequence()
    single = network.small(torch.float32)
    single.load_state_dict(net.state_dict())
    assert error(single(x.float())[0].double(), net(x)[0]) < 1e-5
    assert net.float()(x.float())[0].dtype == torch.float32


def test_autocast_lowers_the_linear_maps_only(network, options):
    net, x = network.small(torch.float32, **options), sequence(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = net(x)
        net(x.bfloat16(), state)[0].float().sum().backward()
    assert output.dtype == torch.bfloat16 and {tensor.dtype for tensor in state} == {torch.float32}
    assert error(output.float(), net(x)[0]) < 0.1
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_state_detach_and_to(network):
    _, state = network.small()(sequence())
    assert state.memory.requires_grad
    assert not any(tensor.requires_grad for tensor in state.detach())
    assert {tensor.dtype for tensor in state.to(torch.float32)} == {torch.float32}
    moved = state.to(device="meta", dtype=torch.float32)
    assert type(moved) is network.state and all(tensor.is_meta for tensor in moved)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
        ({"num_slots": True}, "num_slots: expected a positive integer, got True"),
        ({"output_size": "3"}, "output_size: expected a positive integer, got '3'"),
        ({"word_size": 2.5}, "word_size: expected a positive integer, got 2.5"),
        ({"norm": "cosine"}, "norm: expected one of inner, outer, rsqrt, clamp, width, got 'cosine'"),
        ({"eps": -1.0}, "eps: expected a finite number of at least 0, got -1.0"),
        ({"eps": True}, "eps: expected a finite number of at least 0, got True"),
        ({"clip": 0.0}, "clip: expected a positive number or None, got 0.0"),
        ({"clip": "a"}, "clip: expected a positive number or None, got 'a'"),
        ({"clip": True}, "clip: expected a positive number or None, got True"),
        ({"clip": torch.ones(2)}, "clip: expected a positive number or None, got tensor"),
        ({"controller": "rnn"}, "controller: expected one of lstm, layernorm_lstm, gru, feedforward, got 'rnn'"),
        (
            {"controller": ["lstm"]},
            r"controller: expected one of lstm, layernorm_lstm, gru, feedforward, got \['lstm'\]",
        ),
        ({"num_layers": 0}, "num_layers: expected a positive integer, got 0"),
        ({"device": "gpu"}, "device: expected a device or None, got 'gpu'"),
        ({"device": 1.5}, "device: expected a device or None, got 1.5"),
    ],
)
def test_errors_of_the_constructor(network, wrong, message):
    for module in (network.sequence, network.cell):
        with pytest.raises(ValueError, match=message):
            module(**{"input_size": 4, "hidden_size": 6, "num_slots": 7, "word_size": 5, **wrong})


def test_options_on_or_off_are_bools(network):
    for module in (network.sequence, network.cell):
        arguments = inspect.signature(module).parameters
        names = [name for name, argument in arguments.items() if argument.annotation is bool]
        assert names
        for name in names:
            for wrong in ("false", "no", 1, None):
                with pytest.raises(ValueError, match=rf"{name}: expected True or False, got {wrong!r}"):
                    module(4, 6, num_slots=7, word_size=5, **{name: wrong})


def test_a_cell_takes_the_arguments_of_the_sequence_but_batch_first(network):
    """And the sequence hands each of them on."""
    ours, cells = (dict(inspect.signature(module).parameters) for module in (network.sequence, network.cell))
    assert ours.pop("batch_first").default is False
    assert list(ours.items()) == list(cells.items())
    changed: dict[str, Any] = {
        "norm": "clamp", "eps": 0.5, "clip": 7.0, "controller": "gru", "num_layers": 2, "output_size": 3,
        "max_shift": 2, "heads": "wr", "form": "power", "sharpen_eps": 0.25, "num_read_heads": 2,
        "num_write_heads": 3, "mask_floor": 0.5, "allocation_eps": 0.125, "decay": 0.5, "device": "meta",
        "dtype": torch.float64,
    }  # fmt: skip
    changed |= {name: not argument.default for name, argument in ours.items() if argument.annotation is bool}
    options = {name: changed[name] for name in ours if ours[name].default is not inspect.Parameter.empty}
    net = network.sequence(4, 6, 7, 5, **options)
    options["device"] = torch.device("meta")
    for name, value in options.items():
        assert getattr(net.weight_ih_l0 if name in ("device", "dtype") else net, name) == value, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int64, "float32"])
def test_other_dtypes_are_refused(network, dtype):
    with pytest.raises(TypeError, match=rf"dtype: expected torch.float32 or torch.float64, got {dtype}"):
        network.small(dtype)


def test_a_module_made_half_is_refused_when_called(network):
    net, x = network.small().half(), sequence(dtype=torch.float16)
    with pytest.raises(TypeError, match=r"weight_ih_l0: expected dtype torch.float32 or .*, got torch.float16"):
        net(x)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"weight_ih_l0: expected .*, got torch.float16"),
    ):
        net(x)


def test_numpy_numbers_are_sizes_and_bounds(network):
    net = network.sequence(np.int64(4), 6, num_slots=np.int32(7), word_size=5, clip=np.float32(20))
    assert (type(net.input_size), type(net.num_slots), type(net.clip)) == (int, int, float)
    assert net(torch.randn(1, 2, 4))[1].memory.shape == (2, 7, 5)


def test_meta_device_gives_shapes(network):
    output, state = network.small(device="meta")(sequence().to("meta"))
    assert output.is_meta and output.shape == (6, 3, 3)
    assert [tensor.shape for tensor in state] == [tensor.shape for tensor in network.small().initial_state(3)]


def test_errors_of_the_input(network):
    net, cell = network.small(), network.small_cell()
    with pytest.raises(ValueError, match="input: expected input_size 4 in the last dimension, got 5"):
        net(pack_sequence([torch.randn(3, 5)]))
    with pytest.raises(TypeError, match=r"input: expected dtype torch.float64.*got torch.float32"):
        net(pack_sequence([torch.randn(3, 4)]))
    with pytest.raises(TypeError, match="input: expected a Tensor, got list"):
        cell([1.0])
    with pytest.raises(ValueError, match=r"input: expected \[B, X\] or \[X\], got shape \[3, 2, 4\]"):
        cell(torch.randn(3, 2, 4))
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


def test_errors_of_the_state(network):
    net, cell, x = network.small(), network.small_cell(), sequence()
    state = net.initial_state(3)
    for module, given in ((net, x), (cell, x[0])):
        with pytest.raises(TypeError, match=rf"state: expected {network.state.__name__}, got tuple"):
            module(given, (state.hidden, state.cell))
        with pytest.raises(ValueError, match=r"state.memory: expected shape \[3, 7, 5\], got \[2, 7, 5\]"):
            module(given, net.initial_state(2))
    with pytest.raises(ValueError, match=r"state.memory: expected shape \[7, 5\], got \[3, 7, 5\]"):
        net(x[:, 0], state)
    for name, tensor in state._asdict().items():
        for wrong, exception, message in (
            (tensor[..., None], ValueError, r"expected shape \[3, .*\], got \[3, .*, 1\]"),
            (tensor.float(), TypeError, r"expected dtype torch.float64.*got torch.float32"),
            (None, TypeError, "expected a Tensor, got NoneType"),
            (tensor.to_sparse(), ValueError, "expected a dense tensor, got torch.sparse_coo"),
            (tensor.to("meta"), ValueError, "expected device cpu, that of weight_ih_l0, got meta"),
        ):
            with pytest.raises(exception, match=rf"state.{name}: {message}"):
                net(x, state._replace(**{name: wrong}))
    for wrong in (-1, "a", 2.0, True):
        with pytest.raises(ValueError, match=rf"batch_size: expected an integer of at least 0, got {wrong!r}"):
            net.initial_state(wrong)
    assert net.initial_state(np.int64(2)).memory.shape == (2, 7, 5)


@pytest.mark.parametrize("lengths", [[6, 4, 1], [2, 6, 5], torch.tensor([3, 3, 3], dtype=torch.int32)])
@pytest.mark.parametrize("training", [True, False])
def test_each_padded_sequence_runs_as_if_alone(network, lengths, training):
    net, x = network.small(), sequence()
    _, start = net(sequence(steps=2))
    with torch.set_grad_enabled(training):
        output, last = net(x, start, lengths=lengths)
        fresh, _ = net(x, lengths=lengths)
    assert output.shape == (6, 3, 3)
    for row, length in enumerate(lengths):
        alone, end = net(x[:length, row], network.state._make(tensor[row] for tensor in start))
        assert error(output[:length, row], alone) < 1e-13
        assert not output[length:, row].any()
        network.assert_state_close(network.state._make(tensor[row] for tensor in last), end)
        assert error(fresh[:length, row], net(x[:length, row])[0]) < 1e-13
    first, first_last = network.small(batch_first=True)(x.transpose(0, 1), start, lengths)
    assert error(first, output.transpose(0, 1)) < 1e-13
    network.assert_state_close(first_last, last)


@pytest.mark.parametrize("lengths", [[6, 4, 1], [2, 6, 5]])
def test_packed_sequences_equal_padded_ones(network, lengths):
    net, x = network.small(), sequence().requires_grad_()
    start = net(sequence(steps=2))[1].detach()
    packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=sorted(lengths, reverse=True) == lengths)
    output, last = net(packed, start)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    padded, padded_last = net(x, start, lengths)
    unpacked, unpacked_lengths = pad_packed_sequence(output)
    assert torch.equal(unpacked, padded) and unpacked_lengths.tolist() == lengths
    network.assert_state_close(last, padded_last, 1e-300)
    # As torch.nn.LSTM has it, batch_first does not matter to packed input.
    assert torch.equal(network.small(batch_first=True)(packed, start)[0].data, output.data)
    weights = torch.randn_like(padded)
    gradients = [
        torch.autograd.grad(
            (result * weights).sum() + end.memory.square().sum(), [x, *net.parameters()], materialize_grads=True
        )
        for result, end in ((unpacked, last), (padded, padded_last))
    ]
    for packed_gradient, padded_gradient in zip(*gradients, strict=True):
        assert error(packed_gradient, padded_gradient) < 1e-13
    assert all(not gradients[1][0][length:, row].any() for row, length in enumerate(lengths))


def test_errors_of_the_lengths(network):
    net, x = network.small(), sequence()
    with pytest.raises(ValueError, match=r"lengths: expected shape \[3\], got \[2\]"):
        net(x, lengths=[1, 2])
    with pytest.raises(ValueError, match=r"lengths: expected numbers from 1 to 6, got \[1, 7, 2\]"):
        net(x, lengths=[1, 7, 2])
    with pytest.raises(ValueError, match=r"lengths: expected numbers from 1 to 6, got \[1, 0, 2\]"):
        net(x, lengths=torch.tensor([1, 0, 2]))
    with pytest.raises(TypeError, match=r"lengths: expected integers, got torch.float32"):
        net(x, lengths=[1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match=r"lengths: expected integers, got torch.bool"):
        net(x, lengths=[True, True, True])
    for wrong in ("abc", ["a", "b", "c"], {1, 2, 3}):
        with pytest.raises(TypeError, match=rf"lengths: expected integers, got {re.escape(repr(wrong))}"):
            net(x, lengths=wrong)
    with pytest.raises(ValueError, match="lengths: expected None, as the input is an input without a batch"):
        net(x[:, 0], lengths=[3])
    with pytest.raises(ValueError, match="lengths: expected None, as the input is a PackedSequence"):
        net(pack_sequence([x[:, 0]]), lengths=[3])


def test_inference_gives_the_same_bits_in_buffers_of_its_own(network, options, backend, by_steps):
    net, x = network.small(**options), sequence()
    first = [tensor.clone() for tensor in (*net.parameters(), *net.buffers())]
    _, start = net(sequence(steps=2))
    start = start.detach()
    kept = [tensor.clone() for tensor in start]
    for given in (None, start):
        for lengths in (None, [2, 6, 5]):
            output, last = net(x, given, lengths)
            step_ = mock.Mock(wraps=getattr(fastmem, network.step_))
            with torch.no_grad(), mock.patch.object(fastmem.ops, network.step_, step_):
                quick, quick_last = net(x, given, lengths)
            assert torch.equal(quick, output)
            assert all(torch.equal(a, e) for a, e in zip(quick_last, last, strict=True))
            arguments = [call.args[slice(*network.written)] for call in step_.call_args_list]
            calls = [[a for a in given if isinstance(a, Tensor)] for given in arguments]
            for written in zip(*calls, strict=True):
                assert len(written) == 6 and len({tensor.data_ptr() for tensor in written}) == 1
    assert all(torch.equal(a, e) for a, e in zip(start, kept, strict=True))
    assert all(torch.equal(a, e) for a, e in zip((*net.parameters(), *net.buffers()), first, strict=True))


def test_inference_under_autocast_inference_mode_vmap_and_on_meta(network):
    net, x = network.small(torch.float32), sequence(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, _ = net(x)
        with torch.no_grad():
            assert torch.equal(net(x)[0], expected)
    with torch.inference_mode():
        output, state = net(x)
        assert torch.equal(net(x, state)[0], net(x, network.state(*(tensor.clone() for tensor in state)))[0])
    assert torch.equal(output, net(x)[0])
    with torch.no_grad():
        x = x.double()
        for controller in ("feedforward", "layernorm_lstm"):  # torch has no vmap of lstm_cell
            plain = network.small(controller=controller)
            assert error(torch.vmap(plain)(torch.stack([x, 2 * x]))[0][1], plain(2 * x)[0]) < 1e-13
        assert network.small(device="meta")(sequence().to("meta"))[0].is_meta


def test_a_cell_is_a_step(network, options):
    net, cell = network.small(**options), network.small_cell(seed=1, **options)
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
    assert error(torch.stack(outputs), expected) < 1e-13
    network.assert_state_close(state, last)
    single, single_state = cell(x[0, 1])
    assert error(single, expected[0, 1]) < 1e-13
    assert error(cell(x[1, 1], single_state)[0], expected[1, 1]) < 1e-13


@pytest.mark.parametrize(("controller", "torch_module"), [("lstm", torch.nn.LSTM), ("gru", torch.nn.GRU)])
def test_controller_is_that_of_torch(network, controller, torch_module):
    net = network.small(controller=controller, num_layers=3)
    width = 4 + net.num_read_heads * 5
    theirs = torch_module(width, 6, num_layers=3, dtype=torch.float64)
    ours = [(name, parameter.shape) for name, parameter in net.named_parameters() if "_l" in name]
    assert ours == [(name, parameter.shape) for name, parameter in theirs.named_parameters()]
    assert all(net.get_parameter(name).abs().max() <= 6**-0.5 for name, _ in ours)
    theirs.load_state_dict({name: parameter for name, parameter in net.state_dict().items() if "_l" in name})
    seen = torch.randn(4, 3, width, dtype=torch.float64)
    hidden, cell = (torch.zeros(3, 18, dtype=torch.float64)[:, : part.shape[1]] for part in net.initial_state(3)[-2:])
    expected, ends = theirs(seen)
    tops = []
    for step_seen in seen:
        top, hidden, cell = net.control(step_seen, hidden, cell)
        tops.append(top)
    assert error(torch.stack(tops), expected) < 1e-14
    ends = ends if controller == "lstm" else (ends,)
    for ours_end, end in zip((hidden, cell), ends, strict=controller == "lstm"):
        assert error(ours_end, end.transpose(0, 1).flatten(1)) < 1e-14


def test_feedforward_controller(network):
    net = network.small(controller="feedforward", num_layers=2)
    names = [name for name, _ in net.named_parameters() if "_l" in name]
    assert names == ["weight_ih_l0", "bias_ih_l0", "weight_ih_l1", "bias_ih_l1"]
    state = net.initial_state(3)
    assert state.hidden.shape == state.cell.shape == (3, 0)
    seen = torch.randn(3, 4 + net.num_read_heads * 5, dtype=torch.float64)
    top, *_ = net.control(seen, state.hidden, state.cell)
    for layer in range(2):
        seen = linear(seen, *(net.get_parameter(f"{name}_l{layer}") for name in ("weight_ih", "bias_ih"))).tanh()
    assert error(top, seen) < 1e-14


@pytest.mark.parametrize("layers", [1, 2])
def test_layer_normalised_controller(network, layers):
    net = network.small(controller="layernorm_lstm", num_layers=layers)
    names = ("weight_ih", "weight_hh", "norm_weight", "norm_bias")
    assert [n for n, _ in net.named_parameters() if "_l" in n] == [f"{n}_l{k}" for k in range(layers) for n in names]
    for layer in range(layers):
        weight, bias = (net.get_parameter(f"{name}_l{layer}") for name in names[2:])
        assert weight.shape == bias.shape == (5, 6)
        assert (weight == 1).all() and (bias[1] == 1).all() and not bias[[0, 2, 3, 4]].any()
        assert 0 < net.get_parameter(f"weight_hh_l{layer}").abs().max() <= 6**-0.5
        for parameter in (weight, bias):
            torch.nn.init.normal_(parameter)
    seen = torch.randn(3, 4 + net.num_read_heads * 5, dtype=torch.float64)
    hidden, cell = (torch.randn(3, layers * 6, dtype=torch.float64) for _ in range(2))
    top, *after = net.control(seen, hidden, cell)
    hiddens, cells = [], []
    for layer in range(layers):
        p = {name: net.get_parameter(f"{name}_l{layer}") for name in names}
        state = {"hidden": hidden[:, layer * 6 :][:, :6], "cell": cell[:, layer * 6 :][:, :6]}
        seen, new_cell = controlled(net, p, seen, state)
        hiddens.append(seen)
        cells.append(new_cell)
    for a, e in zip((top, *after), (seen, torch.cat(hiddens, -1), torch.cat(cells, -1)), strict=True):
        assert error(a, e) < 1e-13


@pytest.mark.parametrize("rows", [[2, 0], torch.tensor([0, 2]), torch.tensor([True, False, True]), [-1, -3]])
def test_state_reset(network, rows):
    net, x = network.small(num_layers=2), sequence()
    _, state = net(x)
    kept = [tensor.clone() for tensor in state]
    fresh = network.reset(state, rows, net)
    for name, before, after, old, new in zip(
        network.state._fields, state, fresh, kept, net.initial_state(3), strict=True
    ):
        assert torch.equal(before, old), name
        assert torch.equal(after[[0, 2]], new[[0, 2]]) and torch.equal(after[1], before[1]), name
    assert error(net(x, fresh)[0][:, 0], net(x)[0][:, 0]) < 1e-13
    assert error(net(x, fresh)[0][:, 1], net(x, state)[0][:, 1]) < 1e-13
    network.assert_state_close(network.reset(state, [], net), state)
    with pytest.raises(ValueError, match="state: expected a batch, whose rows are to be reset"):
        network.reset(net(x[:, 0])[1], [0], net)


@pytest.mark.parametrize(
    ("rows", "exception", "message"),
    [
        ([7], ValueError, r"expected numbers from -3 to 2, got \[7\]"),
        ([0, -4], ValueError, r"expected numbers from -3 to 2, got \[0, -4\]"),
        (1, ValueError, r"expected one dimension, got shape \[\]"),
        ([[0]], ValueError, r"expected one dimension, got shape \[1, 1\]"),
        ([True, False], ValueError, r"expected shape \[3\] of bools, got \[2\]"),
        ([0.5], TypeError, r"expected integers or bools, got torch.float32"),
        ("ab", TypeError, r"expected integers or bools, got 'ab'"),
        (None, TypeError, r"expected integers or bools, got None"),
    ],
)
def test_errors_of_the_rows_to_reset(network, rows, exception, message):
    net = network.small()
    with pytest.raises(exception, match=f"rows: {message}"):
        network.reset(net.initial_state(3), rows, net)


def test_state_reset_cures_nan_and_stops_its_gradient(network):
    net, x = network.small(), sequence()
    broken = x.clone()
    broken[:, 1] = float("nan")
    broken.requires_grad_()
    _, state = net(broken)
    output, _ = net(x, network.reset(state, [1], net))
    assert output.isfinite().all()
    output.sum().backward()
    assert broken.grad is not None and broken.grad[:, 0].isfinite().all() and broken.grad[:, 0].any()


def test_cell_compiles_without_graph_breaks(network, options):
    cell = network.small_cell(torch.float32, **options)
    x, state = torch.randn(3, 4), cell(torch.randn(3, 4))[1].detach()
    torch._dynamo.reset()
    compiled = torch.compile(cell, fullgraph=True, backend="aot_eager")
    results = []
    for function in (cell, compiled):
        output, last = function(x, state)
        gradients = torch.autograd.grad(
            output.sum() + last.memory.square().sum(), list(cell.parameters()), materialize_grads=True
        )
        results.append((output, *last, *gradients))
    for actual, expected in zip(*results[::-1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x)[0], cell(x)[0], rtol=1e-6, atol=1e-6)


def test_cell_exports_saves_and_loads_for_any_batch(network, options):
    cell = network.small_cell(torch.float32, **options)
    batch = {0: torch.export.Dim("batch", min=2)}
    example = (torch.randn(3, 4), network.state._make(part.detach().clone() for part in cell.initial_state(3)))
    program = torch.export.export(cell, example, dynamic_shapes=(batch, network.state._make([batch] * len(example[1]))))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    x = torch.randn(5, 4)
    _, state = cell(torch.randn(5, 4))
    output, last = torch.export.load(file).module()(x, state.detach())
    expected, expected_last = cell(x, state)
    assert torch.equal(output, expected) and isinstance(last, network.state)
    assert all(torch.equal(a, e) for a, e in zip(last, expected_last, strict=True))


def test_sequence_compiles_and_exports(network):
    net, x = network.small(), sequence()
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x)[0], net(x)[0])
    program = torch.export.export(net, (x,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    wider = sequence(batch=5)
    assert torch.equal(program.module()(wider)[0], net(wider)[0])


@pytest.mark.parametrize("controller", ["lstm", "layernorm_lstm", "gru", "feedforward"])
def test_distributed_data_parallel(network, controller, tmp_path):
    net, x = network.small(controller=controller), sequence()
    expected = torch.autograd.grad(net(x)[0].square().sum(), list(net.parameters()))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(net)
        for _ in range(2):  # the second call raises where the first left a parameter without a gradient
            net.zero_grad()
            output, state = parallel(x)
            output.square().sum().backward()
        assert isinstance(state, network.state)
        for parameter, gradient in zip(net.parameters(), expected, strict=True):
            assert error(parameter.grad, gradient) < 1e-13
        output, _ = parallel(pack_padded_sequence(x, torch.tensor([2, 6, 5]), enforce_sorted=False), state.detach())
        assert len(output.data) == 13
        del parallel  # freed after its group, it now and then waited for ever
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("controller", ["lstm", "layernorm_lstm", "gru", "feedforward"])
def test_distributed_data_parallel_with_a_state_passed_on(network, controller, tmp_path):
    net, x, state = network.small(controller=controller), sequence(), None
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(net)
        for _ in range(3):
            net.zero_grad()
            output, state = parallel(x, state)
            output.sum().backward()
            state = state.detach()
        del parallel
    finally:
        torch.distributed.destroy_process_group()
    learned = [parameter for name, parameter in net.named_parameters() if name.startswith("initial_")]
    assert all(not parameter.grad.any() for parameter in learned)


def test_a_state_given_hides_the_learned_one(network):
    """Though its parameters take part: not even NaN in them shows, in results or gradients of others."""
    net, x = network.small(), sequence()
    start = net(x)[1].detach()
    expected, last = net(x, start)
    learned = [parameter for name, parameter in net.named_parameters() if name.startswith("initial_")]
    others = [parameter for name, parameter in net.named_parameters() if not name.startswith("initial_")]
    gradients = torch.autograd.grad(expected.sum(), others)
    for parameter in learned:
        torch.nn.init.constant_(parameter, float("nan"))
    output, state = net(x, start)
    assert torch.equal(output, expected)
    assert all(torch.equal(a, e) for a, e in zip(state, last, strict=True))
    for a, e in zip(torch.autograd.grad(output.sum(), others), gradients, strict=True):
        assert torch.equal(a, e)


def test_sequence_with_a_state_compiles_and_exports(network):
    net, x = network.small(), sequence()
    state = net(x)[1].detach()
    expected, _ = net(x, state)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x, state)[0], expected)
    batch = torch.export.Dim("batch", min=2)
    shapes = ({1: batch}, network.state._make([{0: batch}] * len(state)))
    program = torch.export.export(net, (x, state), dynamic_shapes=shapes)
    wider = sequence(batch=5)
    assert torch.equal(program.module()(x, state)[0], expected)
    state = net(wider)[1].detach()
    assert torch.equal(program.module()(wider, state)[0], net(wider, state)[0])


@pytest.mark.parametrize("training", [True, False])
def test_no_steps_give_the_dtype_of_some_under_autocast(network, training):
    net, x = network.small(torch.float32), sequence(dtype=torch.float32)
    with torch.set_grad_enabled(training), torch.autocast("cpu", dtype=torch.bfloat16):
        for given in (x, x.bfloat16(), x[:, 0]):
            some, none = net(given)[0], net(given[:0])[0]
            assert none.dtype == some.dtype == torch.bfloat16
            assert none.shape == (0, *some.shape[1:])


def test_copies_made_while_somebody_watches_do_not(network, by_steps):
    net, x = network.small(), sequence()
    with net.watched() as views:
        net(x)
        copies = [copy.deepcopy(net), copy.copy(net), pickle.loads(pickle.dumps(net))]
        assert len(pickle.dumps(net)) == len(pickle.dumps(copies[0]))
        for other in copies:
            assert torch.equal(other(x)[0], net(x)[0])
    assert len(views) == 1 + len(copies)
    for other in copies:
        step_ = mock.Mock(wraps=getattr(fastmem, network.step_))
        with torch.no_grad(), mock.patch.object(fastmem.ops, network.step_, step_):
            other(x)
        assert step_.call_count == len(x)


def test_a_run_that_raises_leaves_no_views(network):
    net, x = network.small(), sequence()
    results = iter([True, True])

    def stop(module, arguments):
        if next(results, None) is None:
            raise RuntimeError("stop")

    with net.watched() as views:
        net(x)
        handle = net.output.register_forward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stop"):
            net(x)
        handle.remove()
        assert len(views) == 1
        net(x)
    assert len(views) == 2
    for first, second in zip(*views, strict=True):
        assert torch.equal(first, second)


def test_views_show_what_is_written_and_read(network, options):
    cell, x = network.small_cell(**options), sequence()
    _, start = cell(x[0])
    with cell.watched() as views:
        _, state = cell(x[1], start)
    (view,) = views
    assert torch.equal(view.reads, state.reads)
    retention = None
    if network.sequence is fastmem.nn.LRUA:
        weights, retention = view.write_weights, 1 - view.least_used[:, 0]
        erase, values = torch.zeros_like(view.keys), view.keys
    else:
        erase, values = view.erase, view.values
        if network.sequence is fastmem.nn.DNC:
            weights, retention = view.write_weights, view.retention if cell.deallocates else None
        else:
            weights = view.weights[:, [kind == "w" for kind in cell.heads]]
    assert erase.shape == values.shape == (3, weights.shape[1], 5)
    memory, joint = start.memory, getattr(cell, "joint_writes", True)
    for heads in [slice(None)] if joint else [slice(i, i + 1) for i in range(weights.shape[1])]:
        parts = (part[:, heads] for part in (weights, erase, values))
        memory = fastmem.memory_write(memory, *parts, retention)
    assert error(memory, state.memory) < 1e-13


def test_views_of_padded_and_packed_sequences_and_of_a_cell(network):
    net, x, lengths = network.small(batch_first=True), sequence().transpose(0, 1), [2, 6, 5]
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
    cell = network.small_cell()
    cell.load_state_dict(net.state_dict())
    with cell.watched() as views:
        cell(x[:, 0])
    for view, expected in zip(views[0], full, strict=True):
        assert error(view, expected[0]) < 1e-13


def test_errors_of_the_initial_state_to_reset_to():
    net = fastmem.nn.NTM(4, 6, num_slots=7, word_size=5)
    state = net.initial_state(3)
    for wrong in (None, tuple(state)):
        with pytest.raises(TypeError, match=f"initial: expected NTMState, got {type(wrong).__name__}"):
            state.reset([0], wrong)
    with pytest.raises(ValueError, match=r"initial.memory: expected shape \[3, 7, 5\], got \[2, 7, 5\]"):
        state.reset([0], net.initial_state(2))
    with pytest.raises(TypeError, match=r"initial.memory: expected dtype .*, that of state.memory, got torch.float64"):
        state.reset([0], state.to(torch.float64))
