"""The LRUA module: its equations spelled out, and what is its own."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from fastmem.nn import LRUA, LRUACell, LRUAState
from tests.golden import error
from tests.nn.networks import NETWORKS, sequence

TOLERANCE = 1e-12
VARIANTS = NETWORKS["lrua"].variants
small = NETWORKS["lrua"].small


def plain_similarity(net: LRUA, key: Tensor, memory: Tensor) -> Tensor:
    """Cosines `[N]` of a key and the slots of one sample, by the conventions of the networks tried here."""
    squares, key_square, products = memory.square().sum(-1), key.square().sum(), memory @ key
    if net.norm == "inner":
        return products / ((squares + net.eps).sqrt() * (key_square + net.eps).sqrt() + net.eps)
    if net.norm == "outer":
        return products / (squares.sqrt() * key_square.sqrt() + net.eps)
    if net.norm == "rsqrt":
        return products / (squares.clamp(min=net.eps).sqrt() * key_square.clamp(min=net.eps).sqrt())
    return products / (squares.sqrt().clamp(min=net.eps) * key_square.sqrt().clamp(min=net.eps))


def plain_access(net: LRUA, interface: Tensor, state: LRUAState) -> tuple[Tensor, ...]:
    """The equations of a step of one sample, a head after the other: memory, usage, read weights and reads."""
    heads, word, slots = net.num_read_heads, net.word_size, net.num_slots
    if net.clip is not None:
        interface = interface.clamp(-net.clip, net.clip)
    keys = interface[: heads * word].reshape(heads, word)
    gates = torch.sigmoid(interface[heads * word :][:heads])
    least = sorted(range(slots), key=lambda slot: (state.usage[slot].item(), slot))[:heads]
    kept = torch.ones(slots, 1, dtype=interface.dtype)
    kept[least[0]] = 0
    memory, usage = kept * state.memory, net.decay * state.usage
    for key, gate, before, slot in zip(keys, gates, state.read_weights, least, strict=True):
        write_weights = gate * before + (1 - gate) * one_hot(torch.tensor(slot), slots)
        memory = memory + torch.outer(write_weights, key)
        usage = usage + write_weights
    read_weights = []
    for head, key in enumerate(keys):
        scores = plain_similarity(net, key, memory)
        if net.strengths:
            scores = scores * (1 + (1 + interface[heads * word + heads + head].exp()).log())
        read_weights.append(scores.softmax(0))
        usage = usage + read_weights[-1]
    return memory, usage, torch.stack(read_weights), torch.stack(read_weights) @ memory


def plain_run(net: LRUA, x: Tensor, state: LRUAState) -> tuple[Tensor, LRUAState]:
    outputs = []
    for step_input in x:
        seen = torch.cat([step_input, state.reads.flatten(1)], -1)
        top, hidden, cell = net.control(seen, state.hidden, state.cell)
        rows = zip(net.interface(top), *state, strict=True)
        accessed = [plain_access(net, interface, LRUAState(*parts)) for interface, *parts in rows]
        state = LRUAState(*(torch.stack(parts) for parts in zip(*accessed, strict=True)), hidden, cell)
        outputs.append(net.output(torch.cat([top, state.reads.flatten(1)], -1)))
    return torch.stack(outputs), state


def leaves(state: LRUAState) -> LRUAState:
    """The same state without a graph, to differentiate by."""
    return LRUAState(*(part.detach().clone().requires_grad_() for part in state))


@pytest.mark.parametrize("steps", [1, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_equations(variant, steps, backend):
    """From the first state one step alone: after it, a rounding may decide between slots that are used alike."""
    net, x = small(**VARIANTS[variant]), sequence(steps).requires_grad_()
    start = leaves(net.initial_state(3) if steps == 1 else net(sequence(steps=5))[1])
    results = [net(x, start), plain_run(net, x, start)]
    parts = [(output, *last) for output, last in results]
    weights = [torch.randn_like(part) for part in parts[0]]
    gradients = [
        torch.autograd.grad(
            sum((part * weight).sum() for part, weight in zip(run, weights, strict=True)),
            [x, *start, *net.parameters()],
            materialize_grads=True,
        )
        for run in parts
    ]
    for a, e in zip((*parts[0], *gradients[0]), (*parts[1], *gradients[1]), strict=True):
        assert error(a, e) < TOLERANCE


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3), slots=st.integers(1, 70), word=st.integers(1, 20), heads=st.integers(1, 5),
    strengths=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_equations_at_any_size(batch, slots, word, heads, strengths, seed):
    torch.manual_seed(seed)
    net = LRUA(4, 6, slots, word, min(heads, slots), strengths=strengths, dtype=torch.float64)
    interface = torch.randn(batch, net.interface.out_features, dtype=torch.float64) * 3
    state = LRUAState(*(torch.rand_like(part) for part in net.initial_state(batch)))
    expected = zip(*(plain_access(net, *row) for row in rows(interface, state)), strict=True)
    for a, e in zip(net.access(interface, state), expected, strict=False):
        assert error(a, torch.stack(e)) < TOLERANCE


def rows(interface: Tensor, state: LRUAState) -> list[tuple[Tensor, LRUAState]]:
    return [(own, LRUAState(*parts)) for own, *parts in zip(interface, *state, strict=True)]


def test_shapes_and_defaults():
    net = LRUA(25, 20, num_slots=12, word_size=8, num_read_heads=4)
    output, state = net(torch.randn(5, 3, 25))
    assert output.shape == (5, 3, 20)
    assert [tuple(part.shape) for part in state] == [(3, 12, 8), (3, 12), (3, 4, 12), (3, 4, 8), (3, 20), (3, 20)]
    assert net.decay == 0.95 and not net.strengths and net.clip == 20
    assert net.interface.out_features == 4 * 8 + 4
    assert LRUA(25, 20, 12, 8, 4, strengths=True).interface.out_features == 4 * 8 + 4 + 4
    assert repr(net).startswith(
        "LRUA(\n  25, 20, num_slots=12, word_size=8, num_read_heads=4, output_size=20, 1 lstm\n"
    )
    first = net.initial_state(2)
    assert (first.memory == 1e-6).all() and not any(part.any() for part in first[1:])


def test_writes_go_to_the_lowest_slots_at_first_and_then_to_those_least_used():
    net = small()
    with torch.no_grad():
        net.interface.bias[10:] = -20  # gates of 0: never where a head read last
        net.interface.weight[10:] = 0
        with net.watched() as views:
            net(sequence(steps=8, batch=1))
    slots = views[0].write_weights[:, 0].argmax(-1).tolist()
    assert slots[0] == [0, 1]
    assert sorted([*slots[0], *slots[1], *slots[2], slots[3][0]]) == list(range(7)), "every slot before any twice"
    usage = views[0].usage[:, 0]
    for step in range(1, 8):
        assert usage[step - 1, slots[step]].tolist() == usage[step - 1].sort().values[:2].tolist()


def test_gates_of_one_write_where_the_head_read_last():
    net = small(num_slots=9)
    with torch.no_grad():
        net.interface.bias[10:] = 50
        net.interface.weight[10:] = 0
        with net.watched() as views:
            net(sequence())
    view = views[0]
    assert (view.write_gates == 1 / (1 + torch.tensor(-20.0, dtype=torch.float64).exp())).all(), "bounded by clip"
    assert error(view.write_weights[1:], view.read_weights[:-1]) < 1e-8


def test_the_least_used_slot_is_wiped_before_the_write():
    net = small(num_read_heads=1)
    state = net.initial_state(1)._replace(
        memory=torch.ones(1, 7, 5, dtype=torch.float64),
        usage=torch.tensor([[3.0, 2, 9, 1, 4, 1, 5]], dtype=torch.float64),
    )
    interface = torch.arange(6.0, dtype=torch.float64).unsqueeze(0)
    after = net.access(interface, state)
    expected = state.memory.clone()
    expected[0, 3] = interface[0, :5] / (1 + torch.tensor(5.0, dtype=torch.float64).exp())
    assert error(after.memory, expected) < 1e-15


def test_without_strengths_no_weight_is_more_than_e_squared_times_another():
    for strengths in (False, True):
        net = LRUA(4, 6, 7, 5, strengths=strengths, dtype=torch.float64)
        with torch.no_grad(), net.watched() as views:
            net.interface.weight *= 30
            net(sequence(steps=20))
        ratio = views[0].read_weights.amax(-1) / views[0].read_weights.amin(-1)
        assert (ratio.max() > torch.e**2) == strengths


def test_the_usage_has_a_gradient_from_the_usage_alone():
    net, x = small(), sequence()
    start = leaves(net(x)[1])
    output, last = net(x, start)
    (gradient,) = torch.autograd.grad(last.usage.sum(), start.usage, retain_graph=True)
    assert error(gradient, torch.full_like(gradient, 0.95**6)) < 1e-14
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(output.sum() + last.memory.sum(), start.usage)


def test_nan_stays_in_its_sample():
    net, x = small(), sequence()
    broken = x.clone()
    broken[2, 1] = float("nan")
    output, last = net(broken)
    expected, _ = net(x)
    assert torch.equal(output[:, [0, 2]], expected[:, [0, 2]]) and output[2:, 1].isnan().all()
    assert all(part[[0, 2]].isfinite().all() for part in last)


def test_views_of_a_run():
    net, x = small(strengths=True), sequence()
    with torch.no_grad(), net.watched() as views:
        output, last = net(x)
    (view,) = views
    assert torch.equal(output, net(x)[0]), "watching changes nothing"
    assert [tuple(part.shape) for part in view] == [
        (6, 3, 7), (6, 3, 2, 7), (6, 3, 2, 7), (6, 3, 2, 7), (6, 3, 2), (6, 3, 2), (6, 3, 2, 5), (6, 3, 2, 5),
        (6, 3, 0, 0),
    ]  # fmt: skip
    for name in ("usage", "read_weights", "reads"):
        assert torch.equal(getattr(view, name)[-1], getattr(last, name)), name
    assert (view.least_used.sum(-1) == 1).all() and (view.strengths >= 1).all()
    assert ((view.write_gates >= 0) & (view.write_gates <= 1)).all()
    assert error(view.read_weights.sum(-1), torch.ones(6, 3, 2, dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_read_heads": 8}, "num_read_heads: expected at most num_slots, 7, got 8"),
        ({"num_read_heads": 0}, "num_read_heads: expected a positive integer, got 0"),
        ({"decay": -0.1}, r"decay: expected a number in \[0, 1\], got -0.1"),
        ({"decay": 1.5}, r"decay: expected a number in \[0, 1\], got 1.5"),
        ({"decay": True}, r"decay: expected a number in \[0, 1\], got True"),
        ({"decay": float("nan")}, r"decay: expected a number in \[0, 1\], got nan"),
        ({"strengths": 1}, "strengths: expected True or False, got 1"),
    ],
)
def test_errors_of_the_constructor(options, message):
    for module in (LRUA, LRUACell):
        with pytest.raises(ValueError, match=message):
            module(4, 6, 7, 5, **options)


@pytest.mark.parametrize("rows", [[1], torch.tensor([False, True, False])])
def test_a_reset_memory_is_that_of_the_first_state(rows):
    state = small()(sequence())[1].reset(rows)
    assert (state.memory[1] == 1e-6).all() and not state.usage[1].any()
    state.memory[0].sum().backward()
