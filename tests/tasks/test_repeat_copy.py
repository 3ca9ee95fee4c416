import pytest
import torch
from torch import Tensor

from fastmem.tasks import Batch, RepeatCopy, bit_errors, masked_loss, soft_bit_errors


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def literal(pattern: Tensor, repeats: int, steps: int) -> Batch:
    """One sample by the table of the module, step by step."""
    length, bits = pattern.shape
    input, target, mask = torch.zeros(steps, bits + 2), torch.zeros(steps, bits + 1), torch.zeros(steps)
    input[0, bits] = 1
    input[1 : length + 1, :bits] = pattern
    input[length + 1, bits + 1] = repeats / 10
    end = length + 2 + length * repeats
    target[length + 2 : end, :bits] = pattern.repeat(repeats, 1)
    target[end, bits] = 1
    mask[length + 2 : end + 1] = 1
    return Batch(input, target, mask)


@pytest.mark.parametrize("task", [RepeatCopy(), RepeatCopy(3, 2, 7, 1, 5), RepeatCopy(1, 1, 1, 4, 4)])
def test_each_sample_follows_the_table(task):
    batch = task.sample(33, generator())
    steps = len(batch.mask)
    ends = []
    for b in range(33):
        length = int(batch.input[:, b, task.bits + 1].argmax()) - 1
        repeats = round(float(batch.input[length + 1, b, task.bits + 1]) * 10)
        assert task.min_length <= length <= task.max_length
        assert task.min_repeats <= repeats <= task.max_repeats
        ends.append(length * (repeats + 1) + 3)
        expected = literal(batch.input[1 : length + 1, b, : task.bits], repeats, steps)
        torch.testing.assert_close(Batch(*(tensor[:, b] for tensor in batch)), expected, rtol=0, atol=0)
    assert steps == max(ends)


def test_a_seed_gives_the_same_batch_and_all_limits_are_drawn():
    task = RepeatCopy(4, 1, 3, 1, 3)
    first, again, other = (task.sample(200, generator(seed)) for seed in (5, 5, 6))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.input.shape != other.input.shape or not torch.equal(first.input, other.input)
    outputs = first.mask.sum(0) - 1
    assert set(outputs.tolist()) == {1, 2, 3, 4, 6, 9}
    assert 0.4 < first.input[1, :, :4].mean() < 0.6


def test_dtype_sizes_and_no_samples():
    task = RepeatCopy(bits=6)
    batch = task.sample(2, generator(), dtype=torch.float64)
    assert {tensor.dtype for tensor in batch} == {torch.float64}
    assert batch.input.shape[-1] == task.input_size == 8
    assert batch.target.shape[-1] == task.output_size == 7
    assert task.sample(0).input.shape == (0, 0, 8)


def test_loss_and_bit_errors():
    batch = RepeatCopy().sample(8, generator())
    perfect = (2 * batch.target - 1) * 30
    # What is outside the mask does not count.
    noise = torch.randn(perfect.shape, generator=generator()) * 10
    perfect = torch.where(batch.mask.unsqueeze(-1) > 0, perfect, noise)
    assert masked_loss(perfect, batch) < 1e-9
    assert bit_errors(perfect, batch) == 0
    assert bit_errors(-perfect, batch) == 5 * batch.mask.sum() / 8
    torch.testing.assert_close(soft_bit_errors(torch.zeros_like(perfect), batch), 5 * batch.mask.sum() / 16)
    chance = masked_loss(torch.zeros_like(batch.target), batch)
    torch.testing.assert_close(chance, 5 * batch.mask.sum() / 8 * torch.log(torch.tensor(2.0)))


def test_loss_has_a_gradient_inside_the_mask_only():
    batch = RepeatCopy().sample(8, generator())
    output = torch.zeros_like(batch.target, requires_grad=True)
    masked_loss(output, batch).backward()
    assert output.grad is not None
    assert torch.equal((output.grad != 0).any(-1), batch.mask > 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 0}, "bits: expected a positive integer, got 0"),
        ({"min_length": 3}, "min_length, max_length: expected 1 <= min <= max, got 3 and 2"),
        ({"min_repeats": 0}, "min_repeats: expected a positive integer, got 0"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        RepeatCopy(**options)
