"""Cached Uniform Writing: its equations step by step, and what is its own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastmem
from fastmem.nn import DNC, LRUA, NTM, NUTM, CachedUniformWriting, DNCCell
from tests.golden import error
from tests.nn.networks import NETWORKS, assert_same_run, leaves_of, sequence

TOLERANCE = 1e-12
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    "dnc": ("dnc", {}),
    "dnc_gru": ("dnc", {"controller": "gru"}),
    "dnc_programs": ("dnc", {"programs": {"num_programs": 2}}),
    "ntm": ("ntm", {"heads": "wrr"}),
    "ntm_layernorm": ("ntm", {"controller": "layernorm_lstm", "clip": None}),
    "ntm_gru": ("ntm", {"controller": "gru"}),
    "lrua": ("lrua", {}),
    "lrua_gru": ("lrua", {"controller": "gru"}),
}
IN_ONE_OP = ("dnc", "dnc_programs", "ntm", "ntm_layernorm")


def cached(kind: str, interval: int | None = 3, attention_size: int = 3, **options: Any) -> CachedUniformWriting:
    network, given = NETS[kind]
    net = CachedUniformWriting(NETWORKS[network].small(**given, **options), interval, attention_size)
    for parameter in (net.query_hidden.weight, net.query_reads.weight, net.key.weight, net.score):
        nn.init.normal_(parameter)  # so that it attends to some more than to others
    return net


def begun(net: CachedUniformWriting) -> Any:
    """A state of its own to begin with."""
    x = sequence(steps=2)
    _, state = net.net(x.transpose(0, 1) if net.net.batch_first else x)
    return leaves_of(state)


def by_hand(
    net: CachedUniformWriting, x: Tensor, state: Any, interval: int | list[int], lengths: Any = None
) -> tuple[Tensor, Any]:
    """The equations, a sequence after the other, from a list of the hidden states before each step."""
    core, outputs, states = net.net, [], []
    intervals = interval if isinstance(interval, list) else [interval] * x.shape[1]
    for row, length in enumerate([len(x)] * x.shape[1] if lengths is None else lengths):
        own, told, hiddens = type(state)._make(part[row] for part in state), [], []
        interval = intervals[row]
        for time in range(length):
            hiddens.append(own.hidden)
            writes, hidden, reads = (time + 1) % interval == 0, own.hidden, own.reads.flatten()
            if writes:
                asked = net.query_hidden.weight @ hidden + net.query_reads.weight @ reads
                entries = hiddens[-interval:]
                assert len(entries) == interval
                scores = [net.score @ (asked + net.key.weight @ entry).tanh() for entry in entries]
                shares = torch.stack(scores).softmax(0)
                hidden = sum((share * entry for share, entry in zip(shares, entries, strict=True)), 0 * hidden)
            seen = torch.cat([x[time, row], reads]).unsqueeze(0)
            top, hidden, cell = core.control(seen, hidden.unsqueeze(0), own.cell.unsqueeze(0))
            before = type(state)._make(part.unsqueeze(0) for part in own)._replace(hidden=hidden, cell=cell)
            after = core.access(core.interface(top), before) if writes else before
            own = type(state)._make(part.squeeze(0) for part in after)
            told.append(core.project(torch.cat([top.squeeze(0), own.reads.flatten()])))
        outputs.append(torch.stack([*told, *[x.new_zeros(core.output_size)] * (len(x) - length)]))
        states.append(own)
    return torch.stack(outputs, 1), type(state)(*(torch.stack(parts) for parts in zip(*states, strict=True)))


@pytest.mark.parametrize("interval", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("kind", NETS)
def test_the_equations_by_steps(kind, interval, by_steps):
    check_equations(kind, interval)


@pytest.mark.parametrize("interval", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("kind", IN_ONE_OP)
def test_the_equations_in_ops(kind, interval, in_one_op):
    net = cached(kind)
    assert fastmem.explain(net.net, sequence()).backend == f"sequence op on {in_one_op}"
    check_equations(kind, interval)


def check_equations(kind, interval):
    """Of 7 steps: writes at each, at some with a rest at the end or none, at the last, and at none."""
    net, x = cached(kind, interval), sequence(steps=7).requires_grad_()
    start = begun(net)
    result = net(x, start)
    assert_same_run(result, by_hand(net, x, start, interval), [x, *start, *net.parameters()], TOLERANCE)
    with torch.no_grad():
        output, last = net(x, start)
    assert torch.equal(output, result[0])
    assert all(torch.equal(a, e) for a, e in zip(last, result[1], strict=True))


@pytest.fixture(params=["steps", "op"])
def way(request):
    """Step by step, and in ops on whole sequences where there are any."""
    if request.param == "steps":
        request.getfixturevalue("by_steps")
    return request.param


@pytest.mark.parametrize("layout", ["lengths", "batch_first", "unbatched"])
@pytest.mark.parametrize("kind", NETS)
def test_layouts(kind, layout, way):
    net, x = cached(kind, batch_first=layout == "batch_first"), sequence(steps=8).requires_grad_()
    start, lengths = begun(net), [8, 2, 5] if layout == "lengths" else None
    expected, expected_last = by_hand(net, x, start, 3, lengths)
    if layout == "unbatched":
        output, last = net(x[:, 1], type(start)._make(part[1] for part in start))
        expected, expected_last = expected[:, 1], type(start)._make(part[1] for part in expected_last)
    else:
        output, last = net(x.transpose(0, 1) if layout == "batch_first" else x, start, lengths)
        output = output.transpose(0, 1) if layout == "batch_first" else output
    assert_same_run((output, last), (expected, expected_last), [x, *start, *net.parameters()], TOLERANCE)


@pytest.mark.parametrize("kind", NETS)
def test_the_default_interval_and_the_first_state(kind, way):
    """Three slots share 9 steps and the rest after the last write: an interval of 2."""
    net, x = cached(kind, interval=None, num_slots=3), sequence(steps=9)
    assert_same_run(net(x), by_hand(net, x, net.initial_state(3), 2), list(net.parameters()), TOLERANCE)
    short = cached(kind, interval=None)
    expected = by_hand(short, x[:6], short.initial_state(3), 1)  # of more slots than steps
    assert_same_run(short(x[:6]), expected, list(short.parameters()), TOLERANCE)


@pytest.mark.parametrize("kind", NETS)
def test_each_sequence_has_the_interval_of_its_own_length(kind, way):
    """As it would have alone: two slots leave 12 steps an interval of 4, 3 one of 1, 7 one of 2."""
    net, x = cached(kind, interval=None, num_slots=2), sequence(steps=12).requires_grad_()
    start, lengths = begun(net), [12, 3, 7]
    result = net(x, start, lengths)
    expected = by_hand(net, x, start, [4, 1, 2], lengths)
    assert_same_run(result, expected, [x, *start, *net.parameters()], TOLERANCE)
    for row, length in enumerate(lengths):
        alone, _ = net(x[:length, row : row + 1], type(start)._make(part[row : row + 1] for part in start))
        assert error(alone[:, 0], result[0][:length, row]) < TOLERANCE


@pytest.mark.parametrize("kind", NETS)
def test_every_parameter_has_a_gradient_where_nothing_is_written(kind, way):
    net = cached(kind, interval=9)
    net(sequence())[0].sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    attention = [net.score, *(layer.weight for layer in (net.query_hidden, net.query_reads, net.key))]
    assert not any(parameter.grad is None or parameter.grad.any() for parameter in attention)
    net.zero_grad()
    net.net(sequence(), write_schedule=torch.zeros(6, dtype=torch.bool))[0].sum().backward()
    assert all(parameter.grad is not None for parameter in net.net.parameters())


def test_hooks_on_the_attention_are_called():
    net, called = cached("dnc"), []
    for layer in (net.query_hidden, net.query_reads, net.key):
        layer.register_forward_hook(lambda layer, *given: called.append(layer))
    net(sequence(steps=7))
    assert called == [net.query_hidden, net.query_reads, net.key] * 2


def test_an_interval_of_one_attends_to_one_state(way):
    net, x = cached("dnc", interval=1), sequence()
    output, last = net(x)
    expected, expected_last = net.net(x)
    assert error(output, expected) < TOLERANCE
    for a, e in zip(last, expected_last, strict=True):
        assert error(a, e) < TOLERANCE


def test_without_a_write_it_is_a_schedule_without_one(way):
    net, x = cached("ntm", interval=7), sequence()
    expected, _ = net.net(x, write_schedule=torch.zeros(6, dtype=torch.bool))
    assert error(net(x)[0], expected) < TOLERANCE


def test_a_cache_alike_is_a_schedule_of_every_so_many_steps(way):
    """With nothing to tell entries apart by, the attention is their mean: not the newest state alone."""
    net, x = cached("dnc"), sequence(steps=3)
    nn.init.zeros_(net.score)
    hiddens = [net.initial_state(3).hidden]
    for time in range(2):
        hiddens.append(net.net(x[: time + 1], write_schedule=torch.zeros(time + 1, dtype=torch.bool))[1].hidden)
    _, state = net.net(x[:2], write_schedule=torch.zeros(2, dtype=torch.bool))
    mixed = state._replace(hidden=torch.stack(hiddens).mean(0))
    expected, _ = net.net(x[2:], mixed)
    assert error(net(x)[0][2:], expected) < TOLERANCE
    assert error(net.net(x[2:], state)[0], expected) > 1e-4


@pytest.mark.parametrize("interval", [2, 5])
def test_the_attention_reaches_every_entry(interval):
    """With a weight and a gradient of its own for each."""
    net = cached("dnc", interval)
    state = begun(net)
    cache = torch.randn(interval, 3, 6, dtype=torch.float64).requires_grad_()
    mixed = net.attend(cache, state)
    asked = net.query_hidden(state.hidden) + net.query_reads(state.reads.flatten(1))
    scores = torch.einsum("a,lba->lb", net.score, (asked + net.key(cache)).tanh())
    expected = torch.einsum("lb,lbh->bh", scores.softmax(0), cache)
    leaves = [cache, state.hidden, state.reads, *(p for n, p in net.named_parameters() if not n.startswith("net."))]
    upstream = torch.randn_like(mixed)
    gradients = [torch.autograd.grad(result, leaves, upstream) for result in (mixed, expected)]
    assert error(mixed, expected) < TOLERANCE
    for a, e in zip(*gradients, strict=True):
        assert error(a, e) < TOLERANCE
    assert (gradients[0][0] != 0).all() and (scores.softmax(0).std(0) > 0.01).all()


@pytest.mark.parametrize("kind", NETS)
def test_no_steps_and_no_samples(kind, way):
    net = cached(kind)
    output, last = net(sequence(steps=0))
    assert output.shape == (0, 3, 3)
    for a, e in zip(last, net.initial_state(3), strict=True):
        assert error(a, e) == 0
    for lengths in (None, torch.empty(0)):
        output, last = net(sequence(batch=0), lengths=lengths)
        assert output.shape == (6, 0, 3) and last.memory.shape[0] == 0


@pytest.mark.parametrize("kind", NETS)
def test_padding_may_be_anything(kind, way):
    net, x, lengths = cached(kind), sequence(steps=7), [7, 2, 4]
    broken = x.clone()
    for row, length in enumerate(lengths):
        broken[length:, row] = float("nan")
    results = []
    for given in (x, broken):
        output, last = net(given, lengths=lengths)
        gradients = torch.autograd.grad(output.sum(), list(net.parameters()), materialize_grads=True)
        results.append([output, *last, *gradients])
    for a, e in zip(*results, strict=True):
        assert torch.equal(a, e)


@pytest.mark.parametrize("kind", NETS)
def test_the_callers_state_is_left_alone(kind, way):
    net, x = cached(kind), sequence(steps=7)
    start = begun(net).detach()
    kept = [part.clone() for part in start]
    for training in (True, False):
        with torch.set_grad_enabled(training):
            net(x, start)
        assert all(torch.equal(a, e) for a, e in zip(start, kept, strict=True))


@pytest.mark.parametrize("kind", NETS)
def test_autocast(kind, way):
    network, options = NETS[kind]
    net = CachedUniformWriting(NETWORKS[network].small(torch.float32, **options), 2)
    x = sequence(dtype=torch.float32)
    for parameter in (net.query_hidden.weight, net.query_reads.weight, net.key.weight, net.score):
        nn.init.normal_(parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, last = net(x)
        output.float().sum().backward()
        low = net.net(x)[0]
    assert output.dtype == torch.bfloat16 and {part.dtype for part in last} == {torch.float32}
    expected = net(x)[0]
    bound = 2 * error(low.float(), net.net(x)[0])  # what the lower precision costs without a cache
    assert error(output.float(), expected) < bound < error(net.net(x, write_schedule=net.schedule)[0], expected) / 2
    assert net.score.grad is not None and net.score.grad.isfinite().all()


def test_views():
    net, x = cached("dnc"), sequence(steps=7)
    expected, last = net(x, lengths=[7, 2, 7])
    with net.watched() as views:
        output, _ = net(x, lengths=[7, 2, 7])
    assert error(output, expected) < TOLERANCE
    assert len(views) == 2, "a write at the third step and one at the sixth"
    assert error(views[1].usage[0], last.usage[0]) < TOLERANCE
    for view in views:
        assert view.write_weights[0].any() and not any(part[1].any() for part in view)


@pytest.mark.parametrize("kind", ["dnc", "ntm", "lrua"])
def test_copies_dtypes_and_devices(kind):
    net, x = cached(kind), sequence()
    expected, _ = net(x)
    other = cached(kind, seed=1)
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(net.state_dict())
    for same in (other, copy.deepcopy(net)):
        assert torch.equal(same(x)[0], expected)
    assert error(net.float()(x.float())[0].double(), expected) < 1e-5
    network, options = NETS[kind]
    on_meta = CachedUniformWriting(NETWORKS[network].small(device="meta", **options), 3)
    assert on_meta(x.to("meta"))[0].is_meta


@pytest.mark.parametrize("kind", ["dnc", "ntm", "lrua"])
def test_compiles(kind):
    net, x = cached(kind, interval=2), sequence(steps=4)
    expected, last = net(x)
    torch._dynamo.reset()
    output, state = torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    for a, e in zip((output, *state), (expected, *last), strict=True):
        assert error(a, e) < TOLERANCE


def test_the_published_count_of_parameters():
    """Of the copy task. The published code has no bias of interface and output, and counts two unused embeddings."""
    net = CachedUniformWriting(
        DNC(10, 95, num_slots=4, word_size=64, output_size=10, controller="layernorm_lstm"), interval=5
    )
    ours = sum(parameter.numel() for parameter in net.parameters())
    biases = net.net.interface.bias.numel() + net.net.output.bias.numel()
    assert ours - biases + 2 * 10 * 10 == 96120
    attention = ours - sum(parameter.numel() for parameter in net.net.parameters())
    assert attention == 16 * (95 + 95 + 64 + 1)


def test_the_attention_begins_as_published():
    torch.manual_seed(0)
    net = CachedUniformWriting(DNC(10, 95, num_slots=4, word_size=64), attention_size=40)
    parts = [net.query_hidden.weight, net.query_reads.weight, net.key.weight, net.score]
    for part in parts:
        assert abs(part.std().item() / 0.1 - 1) < 0.3 and abs(part.mean().item()) < 0.05
    before, core = [part.detach().clone() for part in parts], copy.deepcopy(net.net.state_dict())
    net.reset_attention()
    assert not any(torch.equal(a, e) for a, e in zip(parts, before, strict=True))
    assert all(torch.equal(value, core[name]) for name, value in net.net.state_dict().items())


def test_it_takes_the_core_of_a_nutm():
    given = NUTM(4, 6, 7, 5, core="dnc", output_size=3, dtype=torch.float64)
    net, x = CachedUniformWriting(given, 3), sequence(steps=7)
    assert net.net is given.core
    assert_same_run(net(x), by_hand(net, x, net.initial_state(3), 3), list(net.parameters()), TOLERANCE)


@pytest.mark.parametrize(
    ("net", "exception", "message"),
    [
        (nn.LSTM(4, 6), TypeError, "net: expected a DNC, NTM, LRUA or NUTM, got LSTM"),
        (DNCCell(4, 6, 7, 5), TypeError, "net: expected a DNC, NTM, LRUA or NUTM, got DNCCell"),
        (NTM(4, 6, 7, 5, controller="feedforward"), ValueError, "net: expected one layer of a recurrent controller"),
        (
            LRUA(4, 6, 7, 5, num_layers=2),
            ValueError,
            "net: expected one layer of a recurrent controller, got 2 of l",
        ),
    ],
)
def test_errors_of_the_net(net, exception, message):
    with pytest.raises(exception, match=message):
        CachedUniformWriting(net)


def test_a_step_of_ones_own_is_refused():
    class Doubled(NTM):
        def step(self, input: Tensor, state: Any, in_place: bool = False) -> Any:
            output, state = super().step(input, state, in_place)
            return 2 * output, state

    with pytest.raises(NotImplementedError, match="net: expected the step of fastmem"):
        CachedUniformWriting(Doubled(4, 6, 7, 5))


def test_errors():
    core = DNC(4, 6, 7, 5)
    for wrong in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=f"interval: expected a positive integer, got {wrong!r}"):
            CachedUniformWriting(core, wrong)
        with pytest.raises(ValueError, match=f"attention_size: expected a positive integer, got {wrong!r}"):
            CachedUniformWriting(core, attention_size=wrong)
    net = CachedUniformWriting(core)
    with pytest.raises(TypeError, match="input: expected a Tensor, got PackedSequence"):
        net(nn.utils.rnn.pack_sequence([torch.randn(3, 4)]))
    with pytest.raises(ValueError, match="input: expected input_size 4 in the last dimension, got 5"):
        net(torch.randn(3, 2, 5))
    with pytest.raises(ValueError, match=r"state.memory: expected shape \[3, 7, 5\], got \[2, 7, 5\]"):
        net(torch.randn(3, 3, 4), core.initial_state(2))
    with pytest.raises(ValueError, match=r"lengths: expected numbers from 1 to 3, got \[4, 1\]"):
        net(torch.randn(3, 2, 4), lengths=[4, 1])
