"""Whole sequences in one op, and step by step: the same results, and which of the two a call takes."""

from types import MethodType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.modules import module as modules
from torch.nn.utils import parametrize
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import fastmem
from fastmem.nn import _network
from fastmem.nn._sequence import mapped
from tests.golden import error
from tests.nn.networks import IN_ONE_OP, NETWORKS, sequence
from tests.ops.suite import has_cpp

TOLERANCE = 1e-12
ALONE = {
    f"{kind}-{name}": (network, options)
    for kind, network in IN_ONE_OP.items()
    for name, options in network.variants.items()
    if "num_layers" not in options and options.get("controller") != "gru"
}


@pytest.fixture(params=ALONE.values(), ids=list(ALONE))
def case(request):
    return request.param


def stepped(net, x, state, lengths):
    """A sequence after the other by `step`, and each one's last state."""
    outputs, states = [], []
    for row, length in enumerate(lengths):
        own, told = type(state)._make(part[row : row + 1] for part in state), []
        for time in range(length):
            output, own = net.step(x[time, row : row + 1], own)
            told.append(output)
        rest = x.new_zeros(len(x) - length, 1, net.output_size)
        outputs.append(torch.cat([torch.stack(told), rest]))
        states.append(own)
    return torch.cat(outputs, 1), type(state)(*(torch.cat(parts) for parts in zip(*states, strict=True)))


@pytest.mark.parametrize("layout", ["time_major", "batch_first", "unbatched", "lengths", "packed", "packed_in_order"])
def test_an_op_equals_the_steps(case, layout, in_one_op, monkeypatch):
    network, options = case
    net, x = network.small(**options, batch_first=layout == "batch_first"), sequence(steps=7).requires_grad_()
    _, begin = network.small(**options)(sequence(steps=2))
    begin = network.state(*(part.detach().clone().requires_grad_() for part in begin))
    lengths = {"lengths": [2, 7, 5], "packed": [2, 6, 6], "packed_in_order": [6, 6, 2]}.get(layout, [7, 7, 7])
    run_op = mock.Mock(wraps=net._run_op)
    monkeypatch.setattr(net, "_run_op", run_op)

    def alone(part):
        return part[1]

    if layout == "time_major":
        output, last = net(x, begin)
    elif layout == "batch_first":
        output, last = net(x.transpose(0, 1), begin)
        output = output.transpose(0, 1)
    elif layout == "unbatched":
        output, last = net(x[:, 1], network.state._make(map(alone, begin)))
    elif layout == "lengths":
        output, last = net(x, begin, lengths)
    else:
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=layout == "packed_in_order")
        output, last = net(packed, begin)
        assert isinstance(output, PackedSequence)
        for a, e in zip(output[1:], packed[1:], strict=True):
            assert a is e
        output, _ = pad_packed_sequence(output)
    assert run_op.call_count == 1
    expected, expected_last = stepped(net, x[: max(lengths)], begin, lengths)
    if layout == "unbatched":
        expected, expected_last = expected[:, 1], network.state._make(map(alone, expected_last))
    assert error(output, expected) < TOLERANCE
    network.assert_state_close(last, expected_last, TOLERANCE)
    leaves = [x, *net.parameters(), *begin]
    weights = [torch.randn_like(part) for part in (expected, *expected_last)]
    gradients = [
        torch.autograd.grad(results, leaves, weights, allow_unused=True, materialize_grads=True)
        for results in ((output, *last), (expected, *expected_last))
    ]
    for i, (a, e) in enumerate(zip(*gradients, strict=True)):
        assert error(a, e) < TOLERANCE, i


def test_from_the_first_state_too(case, in_one_op):
    network, options = case
    net, x = network.small(**options), sequence()
    output, last = net(x)
    expected, expected_last = stepped(net, x, net.initial_state(3), [6] * 3)
    assert error(output, expected) < TOLERANCE
    network.assert_state_close(last, expected_last, TOLERANCE)
    results = [[output.sum(), last.memory.square().sum()], [expected.sum(), expected_last.memory.square().sum()]]
    gradients = [torch.autograd.grad(sum(parts), list(net.parameters()), materialize_grads=True) for parts in results]
    for a, e in zip(*gradients, strict=True):
        assert error(a, e) < TOLERANCE


def test_a_first_state_of_ones_own_is_asked_for(case, in_one_op):
    network, options = case
    net, x = network.small(**options), sequence()
    drawn = mapped(lambda part: part.detach() + 0.1, net.initial_state(3))

    class Own(type(net)):
        def initial_state(self, batch_size: int) -> Any:
            return drawn

    expected, _ = net(x, drawn)
    net.__class__ = Own
    assert torch.equal(net(x)[0], expected)
    net.__class__ = Own.__base__
    net.initial_state = lambda batch_size: drawn
    assert torch.equal(net(x)[0], expected)


def test_inference_gives_the_same_bits(case, in_one_op):
    network, options = case
    net, x = network.small(**options), sequence()
    output, last = net(x)
    kept = [part.clone() for part in last]
    with torch.no_grad():
        quick, quick_last = net(x)
        net(x, last)
    assert torch.equal(quick, output)
    for a, e, k in zip(quick_last, last, kept, strict=True):
        assert torch.equal(a, e) and torch.equal(e, k)


class Contrary(fastmem.nn.DNC):
    def control(self, seen, hidden, cell):
        top, hidden, cell = super().control(seen, hidden, cell)
        return -top, hidden, cell


class Opposite:
    def control(self, seen, hidden, cell):
        top, hidden, cell = super().control(seen, hidden, cell)
        return -top, hidden, cell


class Mixed(Opposite, fastmem.nn.DNC):
    """Has a control of its own from elsewhere."""


class Doubled(_network.MemoryNetwork):
    def step(self, input, state, in_place=False):
        output, state = super().step(input, state, in_place)
        return 2 * output, state


class Behind(fastmem.nn.DNC, Doubled):
    """Another step is what the DNC's own step calls by `super()`."""


class Later(fastmem.nn.DNC):
    """Is assigned an access of its own."""


def halved(self, interface, state, in_place=False):
    return fastmem.nn.DNC.access(self, interface / 2, state, in_place)


class Named(fastmem.nn.DNC):
    """Changes no step."""


class Half(nn.Module):
    def forward(self, weight):
        return weight / 2


def changed(change):
    net = NETWORKS["dnc"].small()
    change(net)
    return net


def with_access(net):
    type(net).access = halved
    return net


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: NETWORKS["dnc"].small(num_layers=3), "3 layers"),
        (lambda: NETWORKS["ntm"].small(controller="gru"), "a gru controller"),
        (lambda: Contrary(4, 6, 7, 5, dtype=torch.float64), "a method control other than that of fastmem"),
        (lambda: Mixed(4, 6, 7, 5, dtype=torch.float64), "a method control other than that of fastmem"),
        (lambda: Behind(4, 6, 7, 5, dtype=torch.float64), "a method step other than that of fastmem"),
        (lambda: with_access(Later(4, 6, 7, 5, dtype=torch.float64)), "a method access other than that of fastmem"),
        (
            lambda: changed(lambda net: setattr(net, "access", MethodType(halved, net))),
            "a method access other than that of fastmem",
        ),
        (
            lambda: changed(
                lambda net: setattr(
                    net.interface, "forward", lambda top: nn.functional.linear(-top, net.interface.weight)
                )
            ),
            "an interface or output layer other than a plain torch.nn.Linear or ProgramMemory",
        ),
        (
            lambda: changed(lambda net: setattr(net, "output", nn.Sequential(net.output))),
            "an interface or output layer other than a plain torch.nn.Linear or ProgramMemory",
        ),
        (
            lambda: changed(lambda net: net.interface.register_forward_hook(lambda *given: None)),
            "an interface or output layer other than a plain torch.nn.Linear or ProgramMemory",
        ),
        (
            lambda: changed(lambda net: parametrize.register_parametrization(net.output, "weight", Half())),
            "an interface or output layer other than a plain torch.nn.Linear or ProgramMemory",
        ),
        (lambda: changed(lambda net: setattr(net, "output", nn.Linear(16, 3, bias=False).double())), "an interface or"),
    ],
)
def test_what_runs_by_steps(make, reason, in_one_op, capsys):
    net, x = make(), sequence()
    choice = fastmem.explain(net, x)
    assert choice.backend == "step by step" and choice.reason.startswith(reason)
    assert capsys.readouterr().out == f"{type(net).__name__}: step by step ({choice.reason})\n"
    expected, _ = stepped(net, x, net.initial_state(3), [6] * 3)
    assert error(net(x)[0], expected) < TOLERANCE


@pytest.mark.parametrize(
    "register",
    [
        modules.register_module_forward_hook,
        modules.register_module_forward_pre_hook,
        modules.register_module_full_backward_hook,
        modules.register_module_full_backward_pre_hook,
    ],
)
def test_hooks_on_all_modules_see_every_step(network, register, in_one_op):
    net, x, seen = network.small(), sequence(), []
    handle = register(lambda module, *given: seen.append(module))
    try:
        assert fastmem.explain(net, x) == ("step by step", "a hook on all modules")
        net(x)[0].sum().backward()
    finally:
        handle.remove()
    assert seen.count(net.output) == len(x)
    assert fastmem.explain(net, x) == (f"sequence op on {in_one_op}", "for a test")


@pytest.mark.parametrize("seed", range(5))
def test_outputs_agree_whichever_slot_a_tie_gives(seed, in_one_op):
    """At first all slots are equally used, and a rounding decides. The slots are then in another order, no more."""
    options = {"num_slots": 33, "word_size": 5, "num_read_heads": 2, "num_write_heads": 2, "dtype": torch.float64}
    torch.manual_seed(seed)
    net, cell = fastmem.nn.DNC(4, 6, **options), fastmem.nn.DNCCell(4, 6, **options)
    cell.load_state_dict(net.state_dict())
    x, state, outputs = torch.randn(40, 3, 4, dtype=torch.float64), cell.initial_state(3), []
    output, last = net(x)
    for step_input in x:
        step_output, state = cell(step_input, state)
        outputs.append(step_output)
    assert error(output, torch.stack(outputs)) < TOLERANCE
    assert error(last.reads, state.reads) < TOLERANCE
    assert error(last.usage.sort().values, state.usage.sort().values) < TOLERANCE


def test_what_runs_in_one_op(in_one_op, capsys):
    net, x = Named(4, 6, 7, 5, dtype=torch.float64), sequence()
    fastmem.explain(net, x, net.initial_state(3), lengths=[1, 6, 2])
    assert capsys.readouterr().out == f"Named: sequence op on {in_one_op} (for a test)\n"
    parametrize.register_parametrization(net, "weight_hh_l0", Half())
    assert fastmem.explain(net, x).backend == f"sequence op on {in_one_op}"
    assert error(net(x)[0], stepped(net, x, net.initial_state(3), [6] * 3)[0]) < TOLERANCE


def test_the_way_of_a_call(network, in_one_op):
    net, x = network.small(torch.float32), sequence(dtype=torch.float32)
    assert fastmem.explain(net, x) == (f"sequence op on {in_one_op}", "for a test")
    with net.watched():
        assert fastmem.explain(net, x) == ("step by step", "somebody watches")
    with torch.autocast("cpu", torch.bfloat16):
        assert fastmem.explain(net, x) == ("step by step", "autocast")
    with torch.autograd.forward_ad.dual_level():
        assert fastmem.explain(net, x) == ("step by step", "a transform or a forward-mode derivative")
    assert fastmem.explain(network.small_cell(), sequence()[0]) == ("step by step", "a cell is one step")


def test_errors_of_explain(network):
    net, x = network.small(), sequence()
    with pytest.raises(ValueError, match="input: expected input_size 4 in the last dimension, got 5"):
        fastmem.explain(net, torch.randn(2, 3, 5))
    with pytest.raises(ValueError, match=r"state.memory: expected shape \[3, 7, 5\], got \[2, 7, 5\]"):
        fastmem.explain(net, x, net.initial_state(2))
    with pytest.raises(ValueError, match=r"lengths: expected shape \[3\], got \[2\]"):
        fastmem.explain(net, x, lengths=[1, 2])


def test_the_backends_as_they_are_here(network, monkeypatch):
    net, x = network.small(), sequence()
    if net.sequence_stem is None:
        assert fastmem.explain(net, x) == ("step by step", "no sequence op for this network")
        return
    if has_cpp(net.sequence_stem):
        assert fastmem.explain(net, x) == ("sequence op on cpp", "first choice on the CPU")
    with fastmem.use_backend("reference"):
        on_reference = ("step by step", "a whole sequence would run on the reference: asked for")
        assert fastmem.explain(net, x) == on_reference
    with fastmem.use_backend("triton"):
        choice = fastmem.explain(net, x)
        assert choice.backend == "step by step" and "there are Triton kernels for the steps" in choice.reason
    choice = fastmem.explain(network.small(device="meta"), x.to("meta"))
    assert choice.backend == "step by step" and "devices without a kernel of ours" in choice.reason
