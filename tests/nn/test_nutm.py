"""Stored programs in place of an interface: published results, the equations, and what keeps programs apart."""

import copy
import pickle
import re
import warnings
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gumbel_softmax, one_hot
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import fastmem
from fastmem.nn import (
    NUTM,
    NTMState,
    ProgramMemory,
    WriteSchedule,
    program_diversity_loss,
    program_diversity_weight,
    program_orthogonality_loss,
)
from fastmem.ops import ProgramConfig
from fastmem.reference._interface import interface_shapes
from tests import golden
from tests.golden import error, load
from tests.nn.networks import assert_same_run, by_hand, leaves_of, sequence

TOLERANCE = 1e-12
FILES = sorted(path.stem for path in Path(golden.__file__).parent.glob("nutm_*.npz"))
CORES: dict[str, dict[str, Any]] = {
    "ntm": {"heads": "rwr"},
    "dnc": {"num_read_heads": 2, "num_write_heads": 2},
    "lrua": {"num_read_heads": 2},
}
IN_ONE_OP = ("ntm", "dnc")
PROGRAMS: dict[str, dict[str, Any]] = {
    "by_content": {"num_programs": 3, "key_size": 2},
    "tanh_keys": {"num_programs": 2, "key_size": 4, "tanh_keys": True, "norm": "width"},
    "direct_attention": {"num_programs": 3, "direct_attention": True},
    "one_program": {"num_programs": 1},
    "more_programs_than_numbers_in_a_key": {"num_programs": 5, "key_size": 2, "norm": "outer"},
}
RUNS = [None, [(0, 4), (1, 5)], [(0, 3), (1, 2), (0, 1), (2, 2), (1, 1)]]


class Published:
    """A file as a network, its leaves, and where each gradient of the file lies in the parameters."""

    def __init__(self, file: str) -> None:
        self.arrays, meta = load(file)
        f, d, self.names = self.arrays, meta["dims"], meta["heads"]
        self.readers = [name for name in self.names if name.startswith("read")]
        self.direct = meta["flags"]["program_attention"] == "direct"
        self.net = NUTM(
            d["X"], d["H"], d["N"], d["W"], d["P"], None if self.direct else d["K"], direct_attention=self.direct,
            tanh_keys=True, program_norm="width", heads="".join(name[0] for name in self.names), output_size=d["Y"],
            reversed_shift=True, form="power", norm="clamp", clip=None, dtype=torch.float64,
        )  # fmt: skip
        self.net.load_state_dict(self.net.state_dict() | self.mapped(""))
        starts = ["x", "M0", "h0", "c0", *(f"r0_{i}" for i in range(len(self.readers)))]
        self.leaves = {name: f[name].requires_grad_() for name in starts}
        reads = torch.stack([self.leaves[name] for name in starts[4:]])
        first = (
            self.leaves["M0"], torch.zeros(len(self.names), d["N"], dtype=torch.float64), reads, self.leaves["h0"],
            self.leaves["c0"],
        )  # fmt: skip
        self.state = NTMState(*(part.expand(d["B"], *part.shape) for part in first))

    def mapped(self, prefix: str) -> dict[str, Tensor]:
        """The weights of the file, or with the prefix "d_" their gradients, as the parameters lie."""
        f = {name.removeprefix(prefix): array for name, array in self.arrays.items() if name.startswith(prefix)}

        def heads(*stems: str) -> list[Tensor]:
            return [f[f"{stem}_{name}"] for stem in stems for name in self.names]

        named = {
            "weight_ih_l0": f["W_x"],
            "weight_hh_l0": f["W_h"],
            "bias_ih_l0": f["b_ih"],
            "bias_hh_l0": f["b_hh"],
            "interface.meta.weight": torch.cat(heads("W_q", "W_b")),
            "interface.meta.bias": torch.cat(heads("b_q", "b_b")),
            "interface.weights": torch.cat(heads("V"), -1),
            "interface.biases": torch.cat(heads("Bv"), -1),
            "output.weight": f["W_y"],
            "output.bias": f["b_y"],
        }
        if not self.direct:
            named["interface.keys"] = torch.stack(heads("K"))
        return {f"core.{name}": array for name, array in named.items()}

    def check(self, output: Tensor, last: NTMState) -> None:
        """Outputs, the last state, loss and every gradient of the file."""
        f = self.arrays
        assert error(output, f["y"]) < TOLERANCE
        writers = [name for name in self.names if name.startswith("write")]
        ends = {
            "memory": f[f"t_M_after_{writers[-1]}"][-1],
            "weights": torch.stack([f[f"t_w_{name}"][-1] for name in self.names], 1),
            "reads": torch.stack([f[f"t_r_{name}"][-1] for name in self.readers], 1),
            "hidden": f["t_h"][-1],
            "cell": f["t_c"][-1],
        }
        for name, expected in ends.items():
            assert error(getattr(last, name), expected) < TOLERANCE, name
        loss = (output * f["loss_w"]).sum()
        assert error(loss, f["loss"]) < TOLERANCE
        loss.backward()
        for name, expected in self.mapped("d_").items():
            assert error(self.net.get_parameter(name).grad, expected) < TOLERANCE, name
        for name, leaf in self.leaves.items():
            assert error(leaf.grad, f[f"d_{name}"]) < TOLERANCE, name


@pytest.mark.parametrize("file", FILES)
def test_golden_in_one_op(file, in_one_op):
    given = Published(file)
    assert fastmem.explain(given.net, given.leaves["x"]).backend == f"sequence op on {in_one_op}"
    given.check(*given.net(given.leaves["x"], given.state))


@pytest.mark.parametrize("file", FILES)
def test_golden_step_by_step(file, backend, by_steps):
    given, told, meta = Published(file), [], []
    f, names, interface = given.arrays, given.names, given.net.core.interface
    interface.register_forward_hook(lambda module, arguments, result: told.append(result))
    interface.meta.register_forward_hook(lambda module, arguments, result: meta.append(result))
    with given.net.watched() as views:
        output, last = given.net(given.leaves["x"], given.state)
    assert error(torch.stack(told), torch.cat([f[f"t_o_{name}"] for name in names], -1)) < TOLERANCE
    queries, strengths = torch.stack(meta).split([sum(len(f[f"b_q_{name}"]) for name in names), len(names)], -1)
    assert error(queries, torch.cat([f[f"t_p_q_{name}"] for name in names], -1)) < TOLERANCE
    expected = torch.cat([f[f"t_p_beta_{name}"] for name in names], -1)
    assert error((1 + strengths.exp()).log(), expected) < TOLERANCE
    fields = {
        "p_w": "program_weights", "w_c": "content_weights", "w_g": "gated_weights", "w_s": "shifted_weights",
        "w": "weights",
    }  # fmt: skip
    for name, field in fields.items():
        expected = torch.stack([f[f"t_{name}_{head}"] for head in names], 2)
        assert error(getattr(views[0], field), expected) < TOLERANCE, field
    assert error(views[0].reads, torch.stack([f[f"t_r_{name}"] for name in given.readers], 2)) < TOLERANCE
    given.check(output, last)


@pytest.mark.parametrize("file", FILES)
def test_golden_regularisers(file):
    """Of keys that direct attention does not have here, too."""
    f, meta = load(file)
    names = meta["heads"]
    keys = torch.stack([f[f"K_{name}"] for name in names])
    heads, count, size = keys.shape
    memory = ProgramMemory(2, heads, count, size, [(n, 1) for n in range(heads)], dtype=torch.float64)
    memory.load_state_dict(memory.state_dict() | {"keys": keys})
    for name, loss in (
        ("l_p", program_diversity_loss(memory, mean_over_pairs=True)),
        ("l_p2", program_orthogonality_loss(memory)),
    ):
        assert error(loss, f[f"{name}_author"]) < TOLERANCE
        (gradient,) = torch.autograd.grad(loss, memory.keys)
        expected = torch.stack([f[f"d_{name}_author_K_{head}"] for head in names])
        assert error(gradient, expected) < TOLERANCE


def test_files_of_both_kinds_of_attention_are_there():
    assert {load(file)[1]["flags"]["program_attention"] for file in FILES} == {"direct", "key_value"}


def mixed_by_hand(memory: ProgramMemory, runs: Any, h: Tensor) -> tuple[Tensor, Tensor]:
    """A map of its own for every sample and head, and the weights of the programs."""
    widths: dict[int, int] = {}
    for head, width in runs or [(0, memory.out_features)]:
        widths[head] = widths.get(head, 0) + width
    config, key_size = memory.config, memory.config.key_size or 0
    meta = torch.einsum("bh,qh->bq", h, memory.meta.weight) + memory.meta.bias
    parts, shares, begin = {}, [], 0
    for head in range(len(widths)):
        query, end = meta[:, head * key_size :][:, :key_size], begin + widths[head]
        strength = (1 + meta[:, len(widths) * key_size + head].exp()).log().unsqueeze(-1)
        if config.direct_attention:
            share = (strength * query).softmax(-1)
        else:
            keys = memory.keys[head]
            query, keys = (query.tanh(), keys.tanh()) if config.tanh_keys else (query, keys)
            products, (q, k) = query @ keys.T, (query.norm(dim=-1, keepdim=True), keys.norm(dim=-1))
            eps = config.eps or 0.0
            if config.norm == "width":
                similar = products / (key_size * (q + eps) * (k + eps) + eps)
            elif config.norm == "inner":
                similar = products / ((q.square() + eps).sqrt() * (k.square() + eps).sqrt() + eps)
            else:
                assert config.norm == "outer"
                similar = products / (q * k + eps)
            share = (strength * similar).softmax(-1)
        maps = torch.einsum("bp,phs->bhs", share, memory.weights[..., begin:end])
        own = torch.einsum("bh,bhs->bs", h, maps) + share @ memory.biases[:, begin:end]
        parts[head], begin = own, end
        shares.append(share)
    outputs = []
    for head, width in runs or [(0, memory.out_features)]:
        outputs.append(parts[head][:, :width])
        parts[head] = parts[head][:, width:]
    return torch.cat(outputs, -1), torch.stack(shares, 1)


def small_memory(runs: Any = None, seed: int = 0, **options: Any) -> ProgramMemory:
    torch.manual_seed(seed)
    memory = ProgramMemory(6, 9, runs=runs, dtype=torch.float64, **options)
    nn.init.normal_(memory.biases)
    nn.init.normal_(memory.meta.bias)
    return memory


def random_tops(batch: int = 4) -> Tensor:
    return torch.randn(batch, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("runs", RUNS, ids=["one_head", "two_heads", "runs_of_three_heads"])
@pytest.mark.parametrize("programs", PROGRAMS)
def test_a_program_memory_is_a_map_for_every_sample(programs, runs, backend):
    memory, h = small_memory(runs, **PROGRAMS[programs]), random_tops().requires_grad_()
    (output, found), (expected, shares) = memory.mixed(h), mixed_by_hand(memory, runs, h)
    assert torch.equal(memory(h), output)
    assert error(torch.stack(found, 1), shares) < TOLERANCE
    assert memory.num_heads == shares.shape[1]
    assert_same_run((output, ()), (expected, ()), [h, *memory.parameters()], TOLERANCE)
    assert memory(h[:0]).shape == (0, 9)


@pytest.mark.parametrize("core", CORES)
def test_one_program_is_a_linear_interface(core):
    net, x = small(core, num_programs=1), sequence()
    linear = copy.deepcopy(net.core)
    linear.interface = nn.Linear(6, net.core.interface.out_features, dtype=torch.float64)
    order = net.core.interface._programs.order()
    with torch.no_grad():
        linear.interface.weight.copy_(net.core.interface.weights[0].T[order])
        linear.interface.bias.copy_(net.core.interface.biases[0][order])
    output, last = net(x)
    expected, expected_last = linear(x)
    assert error(output, expected) < TOLERANCE
    for a, e in zip(last, expected_last, strict=True):
        assert error(a, e) < TOLERANCE
    output.square().sum().backward()
    assert not net.core.interface.keys.grad.any() and not net.core.interface.meta.weight.grad.any()
    expected.square().sum().backward()
    assert error(net.core.interface.weights.grad[0].T[order], linear.interface.weight.grad) < TOLERANCE


def small(core: str, seed: int = 0, **options: Any) -> NUTM:
    torch.manual_seed(seed)
    given = {"num_slots": 7, "word_size": 5, "output_size": 3, "dtype": torch.float64, **CORES[core], **options}
    return NUTM(4, 6, core=core, **given)


@pytest.mark.parametrize(
    ("core", "options"),
    [("ntm", {"heads": "rwwr"}), ("dnc", {"masked": True, "sharpened": True}), ("lrua", {"strengths": True})],
)
def test_a_head_has_what_concerns_it(core, options):
    """With other programs of one head, its fields change and no others."""
    net = small(core, **options).core
    if core == "ntm":
        owners = [head for head, kind in enumerate("rwwr") for _ in range(5 + 6 + (10 if kind == "w" else 0))]
    elif core == "dnc":
        shapes = interface_shapes(5, 2, 2, masked=True, sharpened=True)
        reading = {"read_keys", "read_strengths", "free_gates", "read_modes", "read_masks"}
        reading |= {"forward_sharpness", "backward_sharpness"}
        owners = [int(name not in reading) for name, shape in shapes.items() for _ in range(prod(shape))]
    else:
        owners = [0] * 5 + [1] * 5 + [0, 1] + [0, 1]  # keys, gates and strengths
    before, begin, h = net.interface(random_tops()), 0, random_tops()
    for head in range(net.interface.num_heads):
        end = begin + owners.count(head)
        changed = copy.deepcopy(net.interface)
        with torch.no_grad():
            changed.biases[:, begin:end] += 1
        assert error(changed(h) - before, (torch.tensor(owners) == head).double().expand(4, -1)) < 1e-14
        begin = end
    assert begin == net.interface.out_features


def test_direct_attention_has_nothing_to_squash():
    config = ProgramConfig(2, direct_attention=True, tanh_keys=True)
    assert config == ProgramConfig(2, direct_attention=True)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("layout", ["plain", "lengths", "batch_first", "packed", "unbatched", "schedule"])
@pytest.mark.parametrize("options", [{}, {"direct_attention": True, "num_programs": 3}], ids=["keys", "direct"])
def test_all_ways_equal_a_loop_by_hand(core, layout, options, backend, request):
    """On the C++ kernels in one op where there is one, on the reference step by step."""
    net, x = small(core, batch_first=layout == "batch_first", **options), sequence(steps=7).requires_grad_()
    before = sequence(steps=2)
    start = leaves_of(net(before.transpose(0, 1) if layout == "batch_first" else before)[1])
    in_one_op = core in IN_ONE_OP and backend == "cpp"
    assert fastmem.explain(net, x).backend.startswith("sequence op on cpp" if in_one_op else "step by step")
    lengths = [2, 7, 5] if layout in ("lengths", "packed", "schedule") else None
    schedule = WriteSchedule(slots=2) if layout == "schedule" else None
    writes = schedule.mask(lengths, 7, 7) if schedule and lengths else None
    expected, expected_last = by_hand(net.core, x, start, writes, lengths)
    inputs = [x, *start, *net.parameters()]
    if layout == "packed":
        output, last = net(pack_padded_sequence(x, torch.tensor(lengths), enforce_sorted=False), start)
        output, _ = pad_packed_sequence(output)
    elif layout == "unbatched":
        output, last = net(x[:, 1], type(start)._make(part[1] for part in start))
        expected, expected_last = expected[:, 1], type(start)._make(part[1] for part in expected_last)
    else:
        given = x.transpose(0, 1) if layout == "batch_first" else x
        output, last = net(given, start, lengths, schedule)
        output = output.transpose(0, 1) if layout == "batch_first" else output
    assert_same_run((output, last), (expected, expected_last), inputs, TOLERANCE)


@pytest.mark.parametrize("core", CORES)
def test_from_the_first_state(core, backend):
    net, x = small(core), sequence()
    start = net.initial_state(3)
    assert_same_run(net(x), by_hand(net.core, x, start), list(net.parameters()), TOLERANCE)


@pytest.mark.parametrize("core", CORES)
def test_views_have_the_weights_of_the_programs(core):
    net, x = small(core, num_programs=3), sequence()
    expected, _ = net(x)
    with net.watched() as views:
        output, _ = net(x, lengths=[6, 2, 4])
        net(x, write_schedule=torch.tensor([False, True] * 3))
    assert error(output[:, 0], expected[:, 0]) < TOLERANCE
    shares = views[0].program_weights
    assert shares.shape == (6, 3, net.core.interface.num_heads, 3)
    assert error(shares[:, 0].sum(-1), torch.ones(6, net.core.interface.num_heads).double()) < 1e-14
    assert not shares[2:, 1].any() and shares[:2, 1].all()
    assert not views[1].program_weights[::2].any() and views[1].program_weights[1::2].all()


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("core", CORES)
def test_hard_programs(core, direct):
    """One program a head and step: the likeliest in evaluation, drawn in training."""
    net, x = small(core, num_programs=3, hard=True, direct_attention=direct), sequence()
    soft = small(core, num_programs=3, direct_attention=direct)
    soft.load_state_dict(net.state_dict())
    if core in IN_ONE_OP:
        assert fastmem.explain(net, x) == ("step by step", "hard programs")
    for training in (True, False):
        net.train(training)
        with net.watched() as views:
            output, _ = net(x)
            again, _ = net(x)
        shares = views[0].program_weights
        assert ((shares == 0) | (shares == 1)).all() and (shares.sum(-1) == 1).all()
        assert torch.equal(output, again) == (not training)
        output.square().sum().backward()
    top = random_tops()
    hard, likely = (torch.stack(part.core.interface.mixed(top)[1], 1) for part in (net, soft))
    assert torch.equal(hard, one_hot(likely.argmax(-1), 3).double())
    for name, parameter in net.core.interface.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_the_gradient_of_a_draw_is_that_of_its_soft_weights(direct, temperature):
    memory = small_memory(num_programs=3, hard=True, temperature=temperature, direct_attention=direct)
    h, upstream = random_tops().requires_grad_(), torch.randn(4, 9, dtype=torch.float64)
    torch.manual_seed(5)
    output, (drawn,) = memory.mixed(h)
    _, shares = mixed_by_hand(memory, None, h)
    torch.manual_seed(5)
    soft = gumbel_softmax(shares.squeeze(1).log(), temperature)
    assert torch.equal(drawn, one_hot(soft.argmax(-1), 3).double())
    programs = torch.einsum("bh,phs->bps", h, memory.weights) + memory.biases
    through = drawn.detach() + soft - soft.detach()
    expected = torch.einsum("bp,bps->bs", through, programs)
    assert error(output, expected) < TOLERANCE
    leaves = [h, *memory.parameters()]
    gradients = [torch.autograd.grad(result, leaves, upstream) for result in (output, expected)]
    for a, e in zip(*gradients, strict=True):
        assert error(a, e) < 1e-11


def test_programs_are_drawn_by_their_weights():
    memory = small_memory(num_programs=3, hard=True)
    h = random_tops(1).expand(20000, -1)
    with torch.no_grad():
        _, (drawn,) = memory.mixed(h)
        _, shares = mixed_by_hand(memory, None, h[:1])
    assert (drawn.mean(0) - shares[0, 0]).abs().max() < 0.015  # four deviations of 20000 draws


def test_a_program_without_weight_is_no_nan_in_a_draw():
    memory = small_memory(num_programs=2, hard=True, direct_attention=True)
    with torch.no_grad():
        memory.meta.bias.copy_(torch.tensor([800.0, -800.0, 50.0]))
    output = memory(random_tops())
    assert output.isfinite().all()
    assert all(part.isfinite().all() for part in torch.autograd.grad(output.sum(), list(memory.parameters())))


def test_the_published_initialisation():
    net = NUTM(10, 80, num_slots=256, word_size=20, output_size=8, author_init=True)
    memory, bounds = net.core.interface, []
    for head, (begin, end) in enumerate([(0, 26), (26, 92)]):
        bound = 1.4 * (6 / (2 + 2 + 81 * (end - begin))) ** 0.5
        for part in (memory.weights[..., begin:end], memory.biases[:, begin:end], memory.keys[head]):
            assert part.abs().max() <= bound
            assert part.abs().max() > 0.9 * bound or part.numel() < 50
        bounds.append(round(bound, 3))
    assert bounds == [0.075, 0.047]


def test_the_initialisation():
    torch.manual_seed(0)
    net = NUTM(10, 80, num_slots=256, word_size=20, num_programs=3, key_size=4, output_size=8)
    memory = net.core.interface
    assert not memory.biases.any()
    for head, (begin, end) in enumerate([(0, 26), (26, 92)]):
        bound = 1.4 * (6 / (80 + end - begin)) ** 0.5
        assert 0.99 * bound < memory.weights[..., begin:end].abs().max() <= bound
        assert error(memory.keys[head] @ memory.keys[head].T, torch.eye(3)) < 1e-6
    assert round(1.4 * (6 / 106) ** 0.5, 3) == 0.333 and round(1.4 * (6 / 146) ** 0.5, 3) == 0.284
    assert 0.9 < memory.meta.weight.abs().max() / (1.4 * (6 / (80 + 2 * 5)) ** 0.5) <= 1
    assert memory.meta.bias.abs().max() < 0.06 and memory.meta.bias.any()
    many = ProgramMemory(4, 3, num_programs=5, key_size=2)
    assert error(many.keys.norm(dim=-1), torch.ones(1, 5)) < 1e-6
    before = copy.deepcopy(net.state_dict())
    net.reset_parameters()
    changed = [name for name, value in net.state_dict().items() if not torch.equal(value, before[name])]
    assert {*before} - {*changed} == {"core.interface.biases", "core.initial_memory"}


def test_the_published_count_of_parameters():
    """Of the copy task. There the first weights are zeros, and the first reads not learned."""
    net = NUTM(10, 80, num_slots=256, word_size=20, num_programs=2, output_size=8)
    left_out = ("core.initial_weights", "core.initial_reads")
    assert sum(p.numel() for n, p in net.named_parameters() if n not in left_out) == 52206


def keyed(keys: Tensor) -> ProgramMemory:
    memory = ProgramMemory(2, 3, *keys.shape, dtype=keys.dtype)
    with torch.no_grad():
        memory.keys.copy_(keys)
    return memory


@pytest.mark.parametrize("count", [2, 3, 5])
def test_diversity_is_least_for_keys_in_balance(count):
    angles = 2 * torch.pi * torch.arange(count, dtype=torch.float64) / count
    balanced = torch.stack([angles.cos(), angles.sin()], 1) * torch.arange(1, count + 1).unsqueeze(1)
    memory = keyed(balanced)
    loss = program_diversity_loss(memory)
    assert abs(loss.item() + count / 2) < 1e-14
    (gradient,) = torch.autograd.grad(loss, memory.keys)
    assert gradient.abs().max() < 1e-14
    assert abs(program_diversity_loss(keyed(torch.ones(count, 2).double())).item() - count * (count - 1) / 2) < 1e-14


def test_diversity_and_its_gradient_as_sums_of_cosines():
    keys = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    memory = keyed(keys)
    loss = program_diversity_loss(memory)
    units = keys / keys.norm(dim=-1, keepdim=True)
    similar = units @ units.T
    assert error(loss, (similar.sum() - 4) / 2) < 1e-14
    assert error(program_diversity_loss(memory, mean_over_pairs=True), (similar.sum() - 4) / 12) < 1e-14
    (gradient,) = torch.autograd.grad(loss, memory.keys)
    others = units.sum(0) - units
    expected = (others - units * (units * others).sum(-1, keepdim=True)) / keys.norm(dim=-1, keepdim=True)
    assert error(gradient[0], expected) < 1e-14


def test_losses_are_means_over_the_heads_of_all_memories():
    first, second = keyed(torch.randn(3, 3).double()), keyed(torch.randn(2, 3).double())
    both = nn.ModuleList([first, nn.Linear(2, 2), second])
    for loss in (program_diversity_loss, program_orthogonality_loss):
        assert error(loss(both), (loss(first) + loss(second)) / 2) < 1e-14
    net = small("dnc", num_programs=3)
    net.core.interface.reset_parameters()
    assert net.core.interface.num_heads == 2
    assert error(program_diversity_loss(net), torch.zeros((), dtype=torch.float64)) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [3, 8])
def test_orthonormal_keys_are_left_alone(size, dtype):
    torch.manual_seed(0)
    turned = nn.init.orthogonal_(torch.empty(3, size, dtype=dtype))
    for keys in (torch.eye(3, size, dtype=dtype), turned):
        memory = keyed(keys)
        loss = program_orthogonality_loss(memory)
        assert loss.item() == 0
        (gradient,) = torch.autograd.grad(loss, memory.keys)
        assert not gradient.any()
    memory = keyed(1.1 * turned)
    (gradient,) = torch.autograd.grad(program_orthogonality_loss(memory), memory.keys)
    apart = keys @ keys.T * 1.21 - torch.eye(3, dtype=dtype)
    assert error(gradient[0], 2 * apart @ (1.1 * turned) / apart.norm()) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("options", [{"num_programs": 1}, {"num_programs": 3, "direct_attention": True}])
def test_no_two_keys_no_loss(options):
    for loss in (program_diversity_loss, program_orthogonality_loss):
        nothing = loss(small_memory(**options))
        assert nothing.item() == 0 and nothing.dtype == torch.float64
        assert loss(small_memory(**options).to("meta")).is_meta
        with pytest.raises(ValueError, match="module: expected one with a ProgramMemory in it, got Linear"):
            loss(nn.Linear(2, 2))


def test_the_weight_of_the_diversity_loss():
    assert program_diversity_weight(0) == 0.1 and program_diversity_weight(100) == 0.1 * 0.9
    assert program_diversity_weight(50, first=2.0, decay=0.25) == 1.0
    author = [program_diversity_weight(iteration + 1, every=1) for iteration in range(100)]
    assert abs(author[0] - 0.09) < 1e-16
    for iteration, weight in ((10, 3.5e-2), (50, 5e-4), (100, 2.7e-6)):
        assert abs(author[iteration - 1] / weight - 1) < 0.04


@pytest.mark.parametrize("core", CORES)
def test_copies_dtypes_and_devices(core):
    net, x = small(core, dtype=torch.float32), sequence(dtype=torch.float32)
    expected, last = net(x)
    other = small(core, seed=1, dtype=torch.float32)
    assert not torch.equal(other(x)[0], expected)
    other.load_state_dict(net.state_dict())
    for same in (other, copy.deepcopy(net)):
        assert torch.equal(same(x)[0], expected)
    assert "core.interface.keys" in net.state_dict() and "core.interface._order" not in net.state_dict()
    double = copy.deepcopy(net).double()
    output, state = double(x.double())
    assert output.dtype == torch.float64 and error(output.float(), expected) < 1e-5
    assert [part.shape for part in state] == [part.shape for part in last]
    on_meta, _ = small(core, dtype=torch.float32, device="meta")(x.to("meta"))
    assert on_meta.is_meta and on_meta.shape == expected.shape


def test_copies_after_a_transform(by_steps):
    net, x = small("ntm"), sequence()
    torch.func.grad(lambda p: torch.func.functional_call(net, p, (x,))[0].sum())(dict(net.named_parameters()))
    for other in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(other(x)[0], net(x)[0])


def test_explain(in_one_op, capsys):
    for core in IN_ONE_OP:
        net, x = small(core), sequence()
        capsys.readouterr()
        assert fastmem.explain(net, x, net.initial_state(3), [6, 1, 2]) == (f"sequence op on {in_one_op}", "for a test")
        assert capsys.readouterr().out == f"NUTM: sequence op on {in_one_op} (for a test)\n"
        with net.watched():
            assert fastmem.explain(net, x) == ("step by step", "somebody watches")
        net.core.interface.meta.register_forward_hook(lambda *given: None)
        assert fastmem.explain(net, x).backend == "step by step"
    assert fastmem.explain(small("lrua"), x) == ("step by step", "no sequence op for this network")
    assert fastmem.explain(small("dnc", controller="gru"), x) == ("step by step", "a gru controller")


@pytest.mark.parametrize("core", CORES)
def test_compiles_and_exports(core):
    net, x = small(core), sequence(steps=3)
    expected, _ = net(x)
    torch._dynamo.reset()
    assert torch.equal(torch.compile(net, fullgraph=True, backend="aot_eager")(x)[0], expected)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "The tensor attribute")  # what an exported program cannot keep
        program = torch.export.export(net, (x,), dynamic_shapes=({1: torch.export.Dim("batch", min=2)},))
    wider = sequence(steps=3, batch=5)
    assert torch.equal(program.module()(wider)[0], net(wider)[0])


def test_repr():
    shown = repr(small("ntm", num_programs=3, key_size=2))
    assert "heads='rwr'" in shown and "num_programs=3, key_size=2, 3 heads" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"core": "lstm"}, "core: expected one of ntm, dnc, lrua, got 'lstm'"),
        ({"core": None}, "core: expected one of ntm, dnc, lrua, got None"),
        ({"num_programs": 0}, "num_programs: expected a positive integer, got 0"),
        ({"key_size": 0}, "key_size: expected a positive integer, got 0"),
        (
            {"direct_attention": True, "key_size": 3},
            "key_size: expected 2, the number of programs, with direct attention, got 3",
        ),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": True}, "temperature: expected a positive number, got True"),
        ({"hard": 1}, "hard: expected True or False, got 1"),
        ({"tanh_keys": None}, "tanh_keys: expected True or False, got None"),
        ({"author_init": "no"}, "author_init: expected True or False, got 'no'"),
        ({"program_norm": "cosine"}, "program_norm: expected one of inner, outer, rsqrt, clamp, width, got 'cosine'"),
        ({"program_eps": -1.0}, "program_eps: expected a finite number of at least 0, got -1.0"),
        ({"num_slots": 0}, "num_slots: expected a positive integer, got 0"),
    ],
)
def test_errors_of_the_constructor(options, message):
    with pytest.raises(ValueError, match=message):
        NUTM(**{"input_size": 4, "hidden_size": 6, "num_slots": 7, "word_size": 5, **options})


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([(0, 4)], "runs: expected heads 0, 1, ... and widths that add up to output_size, 9, got"),
        ([(0, 4), (2, 5)], "runs: expected heads 0, 1, ... and widths that add up"),
        ([], "runs: expected heads 0, 1, ... and widths that add up"),
        ([(0, 9, 1)], "runs: expected pairs of a head and a width, got"),
        (9, "runs: expected pairs of a head and a width, got 9"),
        ([(0, 9.0)], "runs: expected pairs of a head and a width, got"),
        ([(-1, 9)], "runs: expected pairs of a head and a width, got"),
    ],
)
def test_errors_of_the_runs(runs, message):
    with pytest.raises(ValueError, match=message):
        ProgramMemory(6, 9, 2, runs=runs)


def test_errors_of_the_sizes():
    with pytest.raises(ValueError, match="input_size: expected a positive integer, got 0"):
        ProgramMemory(0, 9, 2)
    with pytest.raises(ValueError, match="output_size: expected a positive integer, got 0"):
        ProgramMemory(6, 0, 2)
    with pytest.raises(TypeError, match=r"dtype: expected torch.float32 or torch.float64, got torch.float16"):
        NUTM(4, 6, 7, 5, dtype=torch.float16)


@pytest.mark.parametrize("core", IN_ONE_OP)
def test_programs_for_other_heads_run_by_steps(core):
    net, x = small(core, num_programs=3), sequence()
    size = net.core.interface.out_features
    net.core.interface = ProgramMemory(6, size, 3, dtype=torch.float64)
    assert fastmem.explain(net, x) == ("step by step", "programs for other heads")
    assert net(x)[0].isfinite().all()
    cut = [(head, 1) for head, width in net.core.interface_runs() for _ in range(width)]
    net.core.interface = ProgramMemory(6, size, 3, runs=cut, dtype=torch.float64)
    assert fastmem.explain(net, x)[0].startswith("sequence op")


@pytest.mark.parametrize("filled", ["assigned", "emptied"])
@pytest.mark.parametrize("options", [{}, {"hard": True}, {"direct_attention": True}], ids=["soft", "hard", "direct"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("way", ["steps", "op"])
def test_built_on_meta_and_filled_later(way, core, options, filled, request):
    """Nothing but the parameters may decide what it gives."""
    if way == "steps":
        request.getfixturevalue("by_steps")
    net, x = small(core, **options).eval(), sequence()
    other = small(core, **options, device="meta").eval()
    if filled == "emptied":
        other.to_empty(device="cpu")
    other.load_state_dict(net.state_dict(), assign=filled == "assigned")
    assert torch.equal(other(x)[0], net(x)[0])


def test_watching_programs_shows_every_call(in_one_op):
    net, x = small("ntm"), sequence()
    expected, _ = net(x)
    with net.core.interface.watched() as shares:
        assert fastmem.explain(net, x) == ("step by step", "somebody watches its programs")
        assert error(net(x)[0], expected) < TOLERANCE
        with net.watched() as views:
            net(x)
    assert len(shares) == 12 and fastmem.explain(net, x).backend == f"sequence op on {in_one_op}"
    assert torch.equal(torch.stack(shares[6:]), views[0].program_weights)


@pytest.mark.parametrize("shape", [(6,), (4, 5), (2, 4, 6)])
def test_errors_of_the_input_of_a_program_memory(shape):
    with pytest.raises(ValueError, match=re.escape(f"input: expected shape [B, 6], got {list(shape)}")):
        small_memory(num_programs=2)(torch.randn(shape, dtype=torch.float64))


def test_copies_after_a_transform_hold_nothing_of_it():
    net, x = small("ntm"), sequence()
    torch.func.grad(lambda x: net(x)[0].sum())(x)
    copy.deepcopy(net)
    with net.watched():
        torch.func.grad(lambda x: net(x)[0].sum())(x)
    assert torch.equal(copy.deepcopy(net)(x)[0], net(x)[0])
