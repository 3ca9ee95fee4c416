"""What holds for every task."""

import torch

from fastmem.tasks import Task


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def follows_its_seed(task: Task) -> None:
    """A seed gives the same batch, in any dtype, and another seed another one."""
    first, again, other = task.sample(9, generator(3)), task.sample(9, generator(3)), task.sample(9, generator(4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.input.shape != other.input.shape or not torch.equal(first.input, other.input)
    for a, b in zip(first, task.sample(9, generator(3), dtype=torch.float64), strict=True):
        assert b.dtype == torch.float64
        assert torch.equal(a.double(), b)
    assert first.input.shape[1:] == (9, task.input_size) and first.target.shape[1:] == (9, task.output_size)
    assert task.sample(0).input.shape == (0, 0, task.input_size)
    assert task.sample(0).target.shape == (0, 0, task.output_size)
    assert task.sample(2, device="meta").mask.device.type == "meta"


def knows_right_from_wrong(task: Task) -> None:
    """Logits that are all right have no loss and no errors, whatever is outside the mask; all wrong, all of them."""
    batch = task.sample(8, generator())
    right, asked = (2 * batch.target - 1) * 40, batch.mask > 0
    wild = torch.where(asked.unsqueeze(-1), right, torch.randn(right.shape, generator=generator()))
    for perfect in (right, wild):
        assert task.loss(perfect, batch) < 1e-9
        assert task.errors(perfect, batch) == 0
        assert task.accuracy(perfect, batch) == 1
    assert task.errors(-right, batch) == task.errors(torch.full_like(right, torch.nan), batch)
    torch.testing.assert_close(task.errors(-right, batch), task.possible_errors(batch))
    torch.testing.assert_close(task.answers(right)[asked], batch.target[asked])
