"""What input steps contribute to the last state: known answers, and agreement of the two ways to find it."""

from math import isnan
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from fastmem.diagnostics import Contribution, contribution
from fastmem.nn import DNC, LRUA, NTM, NUTM, CachedUniformWriting


class Linear(nn.Module):
    """h_t = decay h_{t-1} + x_t, called like torch.nn.RNN."""

    def __init__(self, decay: float) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor(decay, dtype=torch.float64))

    def forward(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden, outputs = torch.zeros_like(input[0]) if state is None else state, []
        for step_input in input:
            hidden = self.decay * hidden + step_input
            outputs.append(hidden)
        return torch.stack(outputs), hidden


def made(kind, **options):
    torch.manual_seed(0)
    if kind in (nn.LSTM, nn.GRU):
        return kind(4, 6, dtype=torch.float64, **options)
    return kind(4, 6, num_slots=7, word_size=5, dtype=torch.float64, **options)


def cached(*sizes: int, **options: Any) -> CachedUniformWriting:
    return CachedUniformWriting(DNC(*sizes, **options), 2)


def inputs(steps: int = 7, batch: int = 3) -> Tensor:
    return torch.randn(steps, batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def by_definition(net: nn.Module, x: Tensor, last: str) -> Tensor:
    """Norms `[T]` from the whole Jacobian of each sample."""
    norms = []
    for own in x.unbind(1):

        def hidden(own: Tensor) -> Tensor:
            output, state = net(own)
            return state.hidden if last == "hidden" else output[-1]

        jacobian = torch.autograd.functional.jacobian(hidden, own)  # [H, T, X]
        assert isinstance(jacobian, Tensor)
        norms.append(jacobian.square().sum((0, 2)).sqrt())
    return torch.stack(norms).mean(0)


@pytest.mark.parametrize("decay", [0.5, 0.97, 1.0, 1.2])
@pytest.mark.parametrize("probes", [None, 3])
def test_a_linear_network_decays_as_it_says(decay, probes):
    found = contribution(Linear(decay), inputs(20), probes=probes)
    assert found.decay == pytest.approx(decay, rel=1e-12) and found.residual < 1e-12
    assert found.norms.shape == (20,) and found.norms.dtype == torch.float64
    if probes is None:
        expected = 2 * decay ** torch.arange(19, -1, -1, dtype=torch.float64)  # the norm of the identity of 4 units: 2
        torch.testing.assert_close(found.norms, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("kind", "options", "last"),
    [
        (nn.LSTM, {}, "output"), (nn.GRU, {"num_layers": 2}, "output"), (DNC, {}, "hidden"),
        (DNC, {"num_layers": 2}, "hidden"), (DNC, {"controller": "feedforward"}, "output"), (NTM, {}, "hidden"),
        (LRUA, {"num_read_heads": 2}, "hidden"), (NUTM, {}, "hidden"), (cached, {}, "hidden"),
    ],
)  # fmt: skip
def test_norms_are_those_of_the_whole_jacobian(kind, options, last):
    net, x = made(kind, **options), inputs()
    found = contribution(net, x)
    torch.testing.assert_close(found.norms, by_definition(net, x, last), rtol=1e-11, atol=0)
    assert 0 < found.decay < 1 and found.residual > 0
    first = made(kind, batch_first=True, **options)
    torch.testing.assert_close(contribution(first, x.transpose(0, 1)).norms, found.norms, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        contribution(first, x[:, 0]).norms, contribution(net, x[:, :1]).norms, rtol=1e-12, atol=0
    )
    assert x.grad is None and all(parameter.grad is None for parameter in net.parameters())


def test_arguments_are_those_of_the_call():
    net, x, schedule = made(DNC), inputs(), torch.tensor([False, True] * 3 + [False])
    found = contribution(net, x, write_schedule=schedule)
    assert found.norms.shape == (7,) and not torch.equal(found.norms, contribution(net, x).norms)
    dense = contribution(net, x, write_schedule=torch.ones(7, dtype=torch.bool))
    torch.testing.assert_close(dense.norms, contribution(net, x).norms, rtol=1e-12, atol=0)


def test_lengths_are_refused():
    with pytest.raises(ValueError, match=r"lengths: expected none, as the sequences end together, got \[3, 7, 7\]"):
        contribution(made(DNC), inputs(), lengths=[3, 7, 7])


def test_probes_are_right_on_average():
    """Squares of the norms of one sample; of a batch, the mean of roots of estimates is a little too small."""
    net, x = made(nn.LSTM), inputs(batch=1)
    exact = contribution(net, x).norms.square()
    draws = torch.stack([contribution(net, x, probes=2, seed=seed).norms.square() for seed in range(400)])
    deviation = draws.std(0) / 400**0.5
    assert (deviation > 0).all() and ((draws.mean(0) - exact).abs() < 4 * deviation).all()
    many = contribution(net, x, probes=4000).norms.square()
    assert ((many / exact - 1).abs() < 0.1).all()
    again = contribution(net, x, probes=2, seed=7)
    assert torch.equal(again.norms, contribution(net, x, probes=2, seed=7).norms)
    before = torch.random.get_rng_state()
    contribution(net, x, probes=2)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_state_is_where_the_sequence_begins():
    net, x = made(DNC), inputs()
    with torch.no_grad():
        whole = contribution(net, x)
        _, state = net(x[:3])
    torch.testing.assert_close(contribution(net, x[3:], state).norms, whole.norms[3:], rtol=1e-12, atol=0)


def test_a_step_without_a_contribution_is_no_part_of_the_fit():
    class Late(Linear):
        def forward(self, input, state=None):
            return super().forward(input * (torch.arange(len(input)) > 2).view(-1, 1, 1))

    found = contribution(Late(0.5), inputs())
    assert not found.norms[:3].any() and found.norms[3:].all()
    assert found.decay == pytest.approx(0.5) and found.residual < 1e-12
    for steps in (1, 3):
        found = contribution(Late(0.5) if steps == 3 else Linear(0.5), inputs(steps))
        assert isnan(found.decay) and isnan(found.residual)


def test_small_gradients_do_not_vanish_in_their_squares():
    net = Linear(1e-4).float()
    found = contribution(net, inputs(9).float())
    assert found.norms[0] == pytest.approx(2e-32, rel=1e-5) and found.decay == pytest.approx(1e-4, rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ((inputs(0),), ValueError, r"input: expected at least one step and one sample, got shape \[0, 3, 4\]"),
        ((inputs(batch=0),), ValueError, r"input: expected at least one step and one sample, got shape \[7, 0, 4\]"),
        ((inputs()[0, 0],), ValueError, r"input: expected \[T, B, X\] or \[T, X\], got shape \[4\]"),
        ((inputs().long(),), TypeError, "input: expected floating point numbers, got torch.int64"),
        ((pack_sequence([inputs()[:, 0]]),), TypeError, "input: expected a Tensor, got PackedSequence"),
        ((inputs(), None, 0), ValueError, "probes: expected a positive integer, got 0"),
        ((inputs(), None, 1, -1), ValueError, "seed: expected an integer of at least 0, got -1"),
    ],
)
def test_errors(arguments, exception, message):
    with pytest.raises(exception, match=message):
        contribution(made(nn.LSTM), *arguments)


def test_the_plot_shows_each_decay(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    plots = pytest.importorskip("fastmem.plots")
    found = {
        "LSTM": contribution(made(nn.LSTM), inputs()),
        "nothing": Contribution(torch.zeros(7, dtype=torch.float64), float("nan"), float("nan")),
    }
    plots.contribution(found, tmp_path / "contribution.svg")
    picture = (tmp_path / "contribution.svg").read_text()
    for name, shown in found.items():
        assert f"<!-- {name}, decay {shown.decay:.3g} -->" in picture
    plots.contribution(found, tmp_path / "contribution.png")
    assert (tmp_path / "contribution.png").read_bytes().startswith(b"\x89PNG")
