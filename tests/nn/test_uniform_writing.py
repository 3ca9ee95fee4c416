"""Networks that write at some steps only: published results, and what each way of a schedule promises."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastmem
from fastmem.nn import DNC, DNCState, WriteSchedule
from tests import golden
from tests.golden import error, load
from tests.nn.conftest import CHOICE
from tests.nn.networks import assert_same_run, by_hand, leaves_of, sequence
from tests.ops.suite import native

TOLERANCE = 1e-12
GOLDEN = Path(golden.__file__).parent
FILES = sorted(path.stem for path in GOLDEN.glob("uw_*.npz"))
HELD = {0: 7, 1: 5, 2: 1, 3: 3}  # what acts where nothing is written, by the mode of a file
RESTING = [file for file in FILES if load(file)[1]["flags"]["hold_mode"] in (0, 2)]  # as the modules do
FIELDS = {
    "M": "memory", "u": "usage", "p": "precedence", "L": "link", "w_w": "write_weights", "w_r": "read_weights",
    "r": "reads", "h": "hidden", "c": "cell",
}  # fmt: skip
HEADED = ("p", "L", "w_w")  # have a write head more here than in the files
SCHEDULE = torch.tensor([False, True, False, False, True, True, False])


class Published:
    """A file as a DNC, its leaves, and where each gradient of the file lies in the parameters."""

    def __init__(self, file: str) -> None:
        self.arrays, meta = load(file)
        f, d, flags = self.arrays, meta["dims"], meta["flags"]
        assert (flags["clip_xi"], flags["clip_output"], flags["beta"]) == (20.0, 20.0, "oneplus")
        assert meta["gate_order"] == "i,g,f,o" and flags["mode_order"] == "bcf"
        self.net = DNC(
            d["X"], d["H"], d["N"], d["W"], d["R"], output_size=d["Y"], norm="rsqrt", eps=flags["eps"],
            clip=flags["clip_xi"], detach_usage_write=flags["detach_usage_write"], allocation_eps=0.0,
            dtype=torch.float64,
        )  # fmt: skip
        self.inputs, self.reads = d["X"], (d["W"], d["R"])
        b = f["b_lstm"].clone()
        b[2 * d["H"] : 3 * d["H"]] += flags["forget_bias"]
        self.net.load_state_dict(self.mapped("") | {"bias_ih_l0": self.gates(b), **self.absent()})
        self.leaves = {"x": f["x"].requires_grad_()}
        self.leaves |= {f"{name}0": f[f"{name}0"].requires_grad_() for name in FIELDS}
        starts = {field: self.leaves[f"{name}0"] for name, field in FIELDS.items()}
        self.state = DNCState(**starts | {FIELDS[name]: starts[FIELDS[name]].unsqueeze(1) for name in HEADED})
        self.writes = ~f["hold"]
        self.mask = torch.where(f["hold"], HELD[flags["hold_mode"]], 7).to(torch.uint8)
        self.mask = self.mask.unsqueeze(1).expand(-1, d["B"])

    def gates(self, rows: Tensor) -> Tensor:
        """Rows in the order of torch's gates."""
        i, g, f, o = rows.chunk(4)
        return torch.cat([i, f, g, o])

    def by_head(self, columns: Tensor) -> Tensor:
        """Columns that lie word by word, head by head."""
        return columns.unflatten(-1, self.reads).transpose(-1, -2).flatten(-2)

    def mapped(self, prefix: str) -> dict[str, Tensor]:
        """The weights of the file, or with the prefix "d_" their gradients, as the parameters lie."""
        f = {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}
        seen, read = self.inputs, self.reads[0] * self.reads[1]
        lstm = self.gates(f["W_lstm"].mT)
        return {
            "weight_ih_l0": torch.cat([lstm[:, :seen], self.by_head(lstm[:, seen : seen + read])], 1),
            "weight_hh_l0": lstm[:, seen + read :],
            "bias_ih_l0": self.gates(f["b_lstm"]),
            "interface.weight": f["W_xi"][:, self.arrays["xi_perm_spec"]].mT,
            "output.weight": torch.cat([f["W_y"].mT, self.by_head(f["W_m"].mT)], 1),
        }

    def absent(self) -> dict[str, Tensor]:
        """The biases that the published code does not have, 0."""
        names = ("bias_hh_l0", "interface.bias", "output.bias")
        return {name: torch.zeros_like(self.net.get_parameter(name)) for name in names}

    def check_state(self, state: DNCState, step: int) -> None:
        for name, field in FIELDS.items():
            actual = getattr(state, field)
            actual = actual.squeeze(1) if name in HEADED else actual
            assert error(actual, self.arrays[f"t_{name}"][step]) < TOLERANCE, f"{field} at step {step}"

    def check(self, output: Tensor) -> None:
        """Outputs, loss and every gradient of the file."""
        f = self.arrays
        assert error(output, f["y"]) < TOLERANCE
        loss = (output * f["loss_w"]).sum()
        assert error(loss, f["loss"]) < TOLERANCE
        loss.backward()
        for name, expected in self.mapped("d_").items():
            assert error(self.net.get_parameter(name).grad, expected) < TOLERANCE, name
        assert error(self.net.bias_hh_l0.grad, self.net.bias_ih_l0.grad) < TOLERANCE
        names = {name for name in self.leaves if f"d_{name}" in f}
        weights = {"W_lstm", "b_lstm", "W_xi", "W_y", "W_m"}
        assert {name for name in f if name.startswith("d_")} == {f"d_{name}" for name in (*names, *weights)}
        for name in names:
            assert error(self.leaves[name].grad, f[f"d_{name}"]) < TOLERANCE, name


@pytest.fixture(params=["reference", pytest.param("cpp", marks=native)])
def backend(request):
    with fastmem.use_backend(request.param):
        yield request.param


def in_one_op_of(given: Published) -> tuple[Tensor, DNCState]:
    output, last = given.net.sequence_op(given.leaves["x"], given.net.op_parameters(), given.state, given.mask)
    return output, DNCState._make(last)


@pytest.mark.parametrize("file", FILES)
def test_golden_in_one_op(file, backend):
    given = Published(file)
    output, last = in_one_op_of(given)
    given.check_state(last, -1)
    given.check(output)


@pytest.mark.parametrize("file", FILES)
def test_golden_by_an_op_for_each_step(file, backend):
    given = Published(file)
    state, outputs = given.state, []
    for step, (x, mask) in enumerate(zip(given.leaves["x"].split(1), given.mask.split(1), strict=True)):
        output, parts = given.net.sequence_op(x, given.net.op_parameters(), state, mask)
        state = DNCState._make(parts)
        given.check_state(state, step)
        outputs.append(output)
    given.check(torch.cat(outputs))


@pytest.mark.parametrize("file", RESTING)
def test_golden_through_the_module(file, backend, monkeypatch):
    monkeypatch.setattr(CHOICE, lambda stem, inputs: (backend, "for a test"))
    given = Published(file)
    output, last = given.net(given.leaves["x"], given.state, write_schedule=given.writes)
    given.check_state(last, -1)
    given.check(output)


@pytest.mark.parametrize("file", RESTING)
def test_golden_through_the_module_step_by_step(file, backend, by_steps):
    given = Published(file)
    with given.net.watched() as views:
        output, last = given.net(given.leaves["x"], given.state, write_schedule=given.writes)
    viewed = {name: field for name, field in FIELDS.items() if hasattr(views[0], field)}
    for name, field in viewed.items():
        view = getattr(views[0], field)
        view = view.squeeze(2) if name in HEADED else view
        expected = given.arrays[f"t_{name}"].masked_fill(~given.writes.view(-1, *[1] * (view.dim() - 1)), 0)
        assert error(view, expected) < TOLERANCE, field
    given.check_state(last, -1)
    given.check(output)
    state = given.state.detach()
    for step in range(len(given.writes)):
        one = slice(step, step + 1)
        with torch.no_grad():
            _, state = given.net(given.leaves["x"][one], state, write_schedule=given.writes[one])
        given.check_state(state, step)


def test_the_files_have_every_mode():
    assert {load(file)[1]["flags"]["hold_mode"] for file in FILES} == {*HELD}


def begun(network: Any, **options: Any) -> tuple[Any, Any, Tensor]:
    """A network, a state of its own to begin with, and an input."""
    net = network.small(**options)
    before = sequence(steps=2)
    _, start = net(before.transpose(0, 1) if net.batch_first else before)
    return net, leaves_of(start), sequence(steps=7).requires_grad_()


@pytest.mark.parametrize("each", ["alike", "each_its_own"])
def test_steps_equal_a_loop_by_hand(network, options, each, by_steps):
    check_by_hand(network, options, each)


@pytest.mark.parametrize("each", ["alike", "each_its_own"])
def test_an_op_equals_a_loop_by_hand(network, options, each, in_one_op):
    check_by_hand(network, options, each)


def schedule_of(each: str) -> Tensor:
    return SCHEDULE if each == "alike" else torch.stack([SCHEDULE, ~SCHEDULE, SCHEDULE.roll(2)], 1)


def check_by_hand(network, options, each):
    net, start, x = begun(network, **options)
    schedule = schedule_of(each)
    writes = schedule.unsqueeze(1).expand(7, 3) if each == "alike" else schedule
    result = net(x, start, write_schedule=schedule)
    assert_same_run(result, by_hand(net, x, start, writes), [x, *start, *net.parameters()], TOLERANCE)
    with torch.no_grad():
        output, last = net(x, start, write_schedule=schedule)
    assert torch.equal(output, result[0])
    assert all(torch.equal(a, e) for a, e in zip(last, result[1], strict=True))


@pytest.fixture(params=["steps", "op"])
def way(request, monkeypatch):
    """Step by step, and in one op where there is one."""
    if request.param == "steps":
        request.getfixturevalue("by_steps")
    return request.param


@pytest.mark.parametrize("layout", ["lengths", "batch_first", "packed", "packed_in_order", "unbatched"])
@pytest.mark.parametrize("each", ["alike", "each_its_own", "rule"])
def test_layouts(network, layout, each, way):
    net, start, x = begun(network, batch_first=layout == "batch_first")
    lengths = {"lengths": [2, 7, 5], "packed": [2, 7, 5], "packed_in_order": [7, 5, 2]}.get(layout)
    schedule: Any = WriteSchedule(slots=2) if each == "rule" else schedule_of(each)
    if each == "rule":
        writes = schedule.mask([7, 7, 7] if lengths is None else lengths, 7, net.num_slots)
        assert writes.any() and not writes.all()
    else:
        writes = schedule if each == "each_its_own" else schedule.unsqueeze(1).expand(7, 3)
    expected = by_hand(net, x, start, writes, lengths)
    if layout == "unbatched":
        own = network.state._make(part[1] for part in start)
        schedule = schedule[:, 1:2] if each == "each_its_own" else schedule
        output, last = net(x[:, 1], own, write_schedule=schedule)
        expected = expected[0][:, 1], network.state._make(part[1] for part in expected[1])
    elif layout.startswith("packed"):
        packed = pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=layout == "packed_in_order")
        packed_output, last = net(packed, start, write_schedule=schedule)
        output, _ = pad_packed_sequence(packed_output)
    else:
        given = x.transpose(0, 1) if layout == "batch_first" else x
        output, last = net(given, start, lengths, schedule)
        output = output.transpose(0, 1) if layout == "batch_first" else output
    assert_same_run((output, last), expected, [x, *start, *net.parameters()], TOLERANCE)


@pytest.mark.parametrize("rule", ["dense", "uniform", "uniform_author", "uniform_balanced", "random"])
def test_a_rule_is_its_schedule_and_its_steps(network, rule, way):
    net, x = network.small(num_slots=3), sequence(steps=9)
    expected, last = net(x, write_schedule=WriteSchedule(rule).steps(9, 3))
    for schedule in (rule, WriteSchedule(rule), WriteSchedule(rule, slots=3)):
        output, state = net(x, write_schedule=schedule)
        assert torch.equal(output, expected)
        assert all(torch.equal(a, e) for a, e in zip(state, last, strict=True))
    assert torch.equal(net(x)[0], expected) == (rule == "dense")


@pytest.mark.parametrize("training", [True, False])
def test_a_memory_that_rests_keeps_every_bit(network, options, training, way):
    net, start, x = begun(network, **options)
    before = [part.clone() for part in start]
    with torch.set_grad_enabled(training):
        output, last = net(x, start, write_schedule=torch.zeros(7, dtype=torch.bool))
        assert output.isfinite().all()
        partly, partly_last = net(x, start, write_schedule=torch.tensor([[True, False, True]] * 7))
    assert error(partly[:, 1], output[:, 1]) < TOLERANCE
    for name, part, of_some, kept, now in zip(last._fields, last, partly_last, before, start, strict=True):
        assert torch.equal(now, kept), f"{name} of the state given"
        if name in ("hidden", "cell"):
            assert not kept.numel() or not torch.equal(part, kept), name
        else:
            assert torch.equal(part, kept) and torch.equal(of_some[1], kept[1]), name
    assert any(not torch.equal(part[0], kept[0]) for part, kept in zip(partly_last[:-2], before, strict=False))


def test_pieces_equal_the_whole(network, options, way):
    net, start, x = begun(network, **options)
    output, last = net(x, start, write_schedule=SCHEDULE)
    outputs, state = [], start
    for piece in (slice(0, 1), slice(1, 4), slice(4, 7)):
        part, state = net(x[piece], state, write_schedule=SCHEDULE[piece])
        outputs.append(part)
    assert_same_run((torch.cat(outputs), state), (output, last), [x, *start, *net.parameters()], TOLERANCE)


def test_what_a_sequence_does_past_its_end_does_not_matter(network, way):
    net, start, x = begun(network)
    lengths, schedule = [2, 7, 5], schedule_of("each_its_own")
    broken = x.detach().clone()
    for row, length in enumerate(lengths):
        broken[length:, row] = float("nan")
    other = schedule.clone()
    for row, length in enumerate(lengths):
        other[length:, row] ^= True
    broken.requires_grad_()
    results = [net(x, start, lengths, schedule), net(broken, start, lengths, other)]
    for (x_given, (output, last)), same in zip(zip((x, broken), results, strict=True), (True, False), strict=True):
        gradients = torch.autograd.grad(output.sum() + last.memory.sum(), [x_given, *net.parameters()])
        if same:
            expected = output, *last, *gradients
        else:
            for a, e in zip((output, *last, *gradients), expected, strict=True):
                assert torch.equal(a, e)


def test_no_steps_and_no_samples(network, way):
    net = network.small()
    for schedule in ("uniform", WriteSchedule("uniform_balanced"), torch.zeros(0, dtype=torch.bool)):
        output, state = net(sequence(steps=0), write_schedule=schedule)
        assert output.shape == (0, 3, 3)
        network.assert_state_close(state, net.initial_state(3))
    for lengths in (None, torch.empty(0)):
        output, _ = net(sequence(batch=0), None, lengths, "uniform")
        assert output.shape == (6, 0, 3)


def test_views_of_a_memory_that_rests_are_zero(network, options):
    """Of steps, and of single samples in steps where others write."""
    net, start, x = begun(network, **options)
    schedule, lengths = schedule_of("each_its_own"), [4, 7, 6]
    schedule[0] = schedule[5] = False
    with net.watched() as views:
        net(x, start, lengths, schedule)
        net(x[:, 2], network.state._make(part[2] for part in start), None, schedule[:, 2])
        net(x, start, write_schedule=torch.zeros(7, dtype=torch.bool))
    run, single = views
    acts = schedule & (torch.arange(7).unsqueeze(1) < torch.tensor(lengths))
    state, steps = start, []
    for time in range(7):
        with net.watched() as alone:
            _, state = net(x[time : time + 1], state, write_schedule=schedule[time : time + 1])
        steps.append(alone)
    for i, name in enumerate(run._fields):
        for time in range(7):
            for row in range(3):
                view = run[i][time, row]
                if acts[time, row]:
                    assert error(view, steps[time][0][i][0, row]) < 1e-13, name
                else:
                    assert not view.any(), name
        assert error(single[i][:6], run[i][:6, 2]) < 1e-13, name


def test_explain_takes_a_schedule(network):
    net, x = network.small(), sequence()
    assert fastmem.explain(net, x, write_schedule="uniform") == fastmem.explain(net, x)


def test_watching_changes_nothing(network, in_one_op):
    net, start, x = begun(network)
    expected = net(x, start, [7, 3, 5], WriteSchedule(slots=2))
    with net.watched():
        watched = net(x, start, [7, 3, 5], WriteSchedule(slots=2))
    assert_same_run(watched, expected, [x, *start, *net.parameters()], TOLERANCE)


def test_autocast(network, way):
    net, x = network.small(torch.float32), sequence(dtype=torch.float32)
    schedule = torch.tensor([[False] * 3, [True] * 3, [True, False, True]] * 2)
    expected, dense = net(x, write_schedule=schedule)[0], net(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = net(x, write_schedule=schedule)
        low = net(x)[0]
    assert output.dtype == torch.bfloat16 and {part.dtype for part in state} == {torch.float32}
    bound = 2 * error(low.float(), dense)  # what the lower precision costs without a schedule
    assert error(output.float(), expected) < bound < error(dense, expected) / 4


@pytest.mark.parametrize("schedule", ["uniform", torch.tensor([True, False, False, True])])
def test_compiles_and_exports(network, schedule):
    net, x = network.small(num_slots=2), sequence(steps=4)
    expected, last = net(x, write_schedule=schedule)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    output, state = compiled(x, write_schedule=schedule)
    assert torch.equal(output, expected)
    assert all(torch.equal(a, e) for a, e in zip(state, last, strict=True))
    given = [
        torch.autograd.grad(result.square().sum(), list(net.parameters()), materialize_grads=True)
        for result in (output, expected)
    ]
    for a, e in zip(*given, strict=True):
        assert error(a, e) < TOLERANCE

    class Scheduled(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor) -> Any:
            return self.net(x, write_schedule=schedule)

    program = torch.export.export(Scheduled(), (x,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    wider = sequence(steps=4, batch=5)
    assert torch.equal(program.module()(wider)[0], net(wider, write_schedule=schedule)[0])


@pytest.mark.parametrize(
    ("schedule", "exception", "message"),
    [
        ("often", ValueError, "rule: expected one of dense, uniform, .*, got 'often'"),
        (3, TypeError, "write_schedule: expected a rule, a WriteSchedule, a Tensor or None, got int"),
        ([True] * 6, TypeError, "write_schedule: expected a rule, a WriteSchedule, a Tensor or None, got list"),
        (torch.ones(6), TypeError, "write_schedule: expected dtype torch.bool, got torch.float32"),
        (
            torch.ones(5, dtype=torch.bool),
            ValueError,
            r"write_schedule: expected shape \[6\] or \[6, 3\], got \[5\]",
        ),
        (
            torch.ones(3, 6, dtype=torch.bool),
            ValueError,
            r"write_schedule: expected shape \[6\] or \[6, 3\], got \[3, 6\]",
        ),
    ],
)
def test_errors_of_the_schedule(network, schedule, exception, message, way):
    net, x = network.small(), sequence()
    for call in (net, partial(fastmem.explain, net)):
        with pytest.raises(exception, match=message):
            call(x, write_schedule=schedule)


class Doubled(fastmem.nn.LRUA):
    def step(self, input, state, in_place=False):
        output, state = super().step(input, state, in_place)
        return 2 * output, state


def test_a_step_of_ones_own_has_no_schedule():
    net = Doubled(4, 6, 7, 5, dtype=torch.float64)
    net(sequence(), write_schedule="dense")
    with pytest.raises(NotImplementedError, match="write_schedule: expected None for a step other than that of fastm"):
        net(sequence(), write_schedule="uniform")
