"""Sinusoid, against its definition and by what a fit of it finds."""

import pytest
import torch

from fastmem.tasks import Sinusoid
from tests.tasks.laws import follows_its_seed, generator


@pytest.mark.parametrize("task", [Sinusoid(), Sinusoid(3, 5, noisy=True)], ids=repr)
def test_steps_follow_the_table(task):
    follows_its_seed(task)
    batch = task.sample(30, generator())
    steps = task.steps_in + task.steps_out
    assert batch.input.shape == batch.target.shape == (steps, 30, 1) and task.read_steps == task.steps_in
    assert torch.equal(batch.mask, (torch.arange(steps) >= task.steps_in).float().unsqueeze(1).expand(-1, 30))
    assert not batch.input[task.steps_in :].any() and not batch.target[: task.steps_in].any()
    assert batch.input[: task.steps_in].all() and batch.target[task.steps_in :].all()
    assert batch.target[task.steps_in :].min() >= 0 and batch.target.max() <= 10


def test_each_sample_is_a_wave_of_its_own():
    batch = Sinusoid(2, 1000).sample(50, generator())
    wave = batch.target[2:, :, 0] - 5
    amplitude = wave.abs().amax(0)
    assert 1 <= amplitude.min() < 1.4 and 4.6 < amplitude.max() <= 5
    crossings = ((wave[1:] > 0) != (wave[:-1] > 0)).sum(0)  # of a second: two a period, and more by the jitter
    assert crossings.min() >= 20 and crossings.max() < 80
    assert amplitude.unique().numel() == 50


def test_the_continuation_follows_from_the_beginning():
    """A fit of the beginning by the frequency that fits best predicts the rest up to the jitter."""
    task = Sinusoid()
    batch = task.sample(8, generator())
    place = torch.arange(1, 201, dtype=torch.float64) / 1000
    for b in range(8):
        fits = []
        for frequency in torch.linspace(10, 30, 401, dtype=torch.float64):
            turn = 2 * torch.pi * frequency * place
            basis = torch.stack([turn.sin(), turn.cos(), torch.ones_like(turn)], -1)
            seen = batch.input[:100, b].double()
            weights = torch.linalg.lstsq(basis[:100], seen).solution
            fits.append((float((basis[:100] @ weights - seen).square().mean()), basis @ weights))
        output = min(fits, key=lambda fit: fit[0])[1].unsqueeze(1).float()
        alone = type(batch)(*(tensor[:, b : b + 1] for tensor in batch))
        assert task.loss(output, alone) < 0.35 and task.accuracy(output, alone) > 0.8


def test_noise_is_on_the_inputs_alone():
    clean, noisy = (Sinusoid(noisy=noisy).sample(100, generator(1)) for noisy in (False, True))
    assert torch.equal(clean.target, noisy.target)
    noise = (noisy.input - clean.input)[:100]
    assert noise.min() < -1.95 and noise.max() > 1.95 and noise.abs().max() <= 2 and abs(noise.mean()) < 0.05
    assert not (noisy.input - clean.input)[100:].any()


def test_loss_errors_and_accuracy_by_hand():
    task = Sinusoid(1, 2)
    batch = task.sample(1)._replace(target=torch.tensor([[[0.0]], [[4.0]], [[6.0]]]))
    output = torch.tensor([[[99.0]], [[5.0]], [[8.0]]])
    assert task.loss(output, batch) == task.errors(output, batch) == 2.5
    assert task.possible_errors(batch) == 1 and task.accuracy(output, batch) == -1.5
    assert task.accuracy(torch.full_like(output, 5.0), batch) == 0 and task.accuracy(batch.target, batch) == 1
    assert torch.equal(task.answers(output), output)
    with pytest.raises(ValueError, match=r"output: expected shape \[3, 1, 1\], got \[3, 1\]"):
        task.loss(output[..., 0], batch)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps_in": 0}, "steps_in: expected a positive integer, got 0"),
        ({"steps_out": 1.5}, r"steps_out: expected a positive integer, got 1\.5"),
        ({"noisy": 1}, "noisy: expected True or False, got 1"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        Sinusoid(**options)
