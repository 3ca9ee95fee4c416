"""What the tasks share: a batch, how draws are made, losses and error counts."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, replace
from numbers import Integral
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from fastmem import _check


class Batch(NamedTuple):
    """Sequences side by side. A batch is as long as its longest sample; what lies after a sample's end is 0."""

    input: Tensor  # [T,B,X]
    target: Tensor  # [T,B,Y]: bits; one-hot classes of a TokenTask, numbers of a RegressionTask
    mask: Tensor  # [T,B], 1 where the output counts


@dataclass(frozen=True)
class Task(ABC):
    """A source of batches, and how outputs for them are judged: here as logits of bits."""

    graded: ClassVar[tuple[str, ...]] = ()  # x, where the fields min_x and max_x say how hard the samples are
    loss_unit: ClassVar[str] = "nats per sequence"
    measure: ClassVar[str] = "wrong bits a sequence"  # what `errors` is
    share: ClassVar[str] = "accuracy"  # what `accuracy` is
    bound: ClassVar[str] = " of"  # how `possible_errors` is put behind `errors`

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is int or (field.type == int | None and value is not None):
                size = _check.integer(field.name, value)
                object.__setattr__(self, field.name, size)  # a NumPy integer becomes a plain one

    @property
    def levels(self) -> int:
        """How many levels of difficulty a curriculum may choose from."""
        return 1 + max((high - low for low, high in self._limits().values()), default=0)

    def lesson(self, level: int) -> Self:
        """The task at one level of difficulty, from 1, the easiest, to `levels`: all samples of the same length.

        What is graded starts from its least value and grows by one a level until it has reached its largest.
        """
        check_level(level, self.levels)
        limits = {}
        for name, (low, high) in self._limits().items():
            limits[f"min_{name}"] = limits[f"max_{name}"] = min(low + level - 1, high)
        return replace(self, **limits)

    def _limits(self) -> dict[str, tuple[int, int]]:
        return {name: (getattr(self, f"min_{name}"), getattr(self, f"max_{name}")) for name in self.graded}

    @property
    @abstractmethod
    def input_size(self) -> int:
        """Width X of the input."""

    @property
    @abstractmethod
    def output_size(self) -> int:
        """Width Y of the target."""

    @property
    def read_steps(self) -> int | None:
        """How many steps of a sample come before it is asked for anything, where all have as many; a write schedule
        covers these."""
        return None

    def held_out(self) -> Self:
        """The task over the data that training never sees; itself, where every batch is drawn anew."""
        return self

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """What training lowers, of the raw `output` [T,B,Y]."""
        return masked_loss(output, batch)

    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        """The `measure` of the raw `output` [T,B,Y], mean over samples."""
        return bit_errors(output, batch)

    def possible_errors(self, batch: Batch) -> Tensor:
        """The errors of an output that has nothing right."""
        return batch.mask.sum(0).mean() * batch.target.shape[-1]

    def accuracy(self, output: Tensor, batch: Batch) -> Tensor:
        """What is right of what is asked for, as a share."""
        return 1 - self.errors(output, batch) / self.possible_errors(batch)

    def answers(self, output: Tensor) -> Tensor:
        """The raw `output` on the scale of the target, as a picture shows both."""
        return output.sigmoid()

    def sample(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Batch:
        """Draws a batch on the CPU, so that a seed gives the same one everywhere, and moves it to `device`."""
        batch_size = _check.integer("batch_size", batch_size, least=0)
        if batch_size == 0:
            none = torch.zeros(0, 0, 1, dtype=dtype, device=device)
            return Batch(none.expand(0, 0, self.input_size), none.expand(0, 0, self.output_size), none[..., 0])
        return Batch(*(tensor.to(device, dtype) for tensor in self._draw(batch_size, generator)))

    @abstractmethod
    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        """A batch of at least one sample, in any dtype."""


class TokenTask(Task):
    """A task whose target is one of several classes in each step that counts, one-hot: a token, or a label."""

    loss_unit = "nats per token"
    measure = "wrong tokens a sequence"

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Cross entropy of the softmax of `output`, mean over the masked steps of all samples."""
        check_output(output, batch)
        nats = cross_entropy(output.movedim(-1, 1), batch.target.movedim(-1, 1), reduction="none")
        return (nats * batch.mask).sum() / batch.mask.sum()

    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        """Masked steps whose largest output is not that of the class, nan is wrong: a sequence, mean over samples."""
        return (wrong_tokens(output, batch) * batch.mask).sum(0).mean()

    def possible_errors(self, batch: Batch) -> Tensor:
        return batch.mask.sum(0).mean()

    def answers(self, output: Tensor) -> Tensor:
        return output.softmax(-1)


class RegressionTask(Task):
    """A task whose target is numbers. Its errors are the loss, and its accuracy the explained share of the variance."""

    loss_unit = measure = "mean squared error"
    share, bound = "explained variance", ", variance"

    def loss(self, output: Tensor, batch: Batch) -> Tensor:
        """Squared error, mean over the masked steps, the numbers in each, and all samples."""
        check_output(output, batch)
        return _masked_mean((output - batch.target) ** 2, batch)

    def errors(self, output: Tensor, batch: Batch) -> Tensor:
        return self.loss(output, batch)

    def possible_errors(self, batch: Batch) -> Tensor:
        """The variance of what is asked for: the errors of the best constant."""
        return _masked_mean((batch.target - _masked_mean(batch.target, batch)) ** 2, batch)

    def answers(self, output: Tensor) -> Tensor:
        return output


def integers(low: int, high: int, batch_size: int, generator: torch.Generator | None) -> Tensor:
    """One integer a sample, both limits included, [B]."""
    return torch.randint(low, high + 1, (batch_size,), generator=generator)


def fair_bits(*shape: int, generator: torch.Generator | None) -> Tensor:
    return torch.randint(0, 2, shape, generator=generator, dtype=torch.float32)


def at(rows: Tensor, row: Tensor, shown: Tensor) -> Tensor:
    """rows [R,B,bits] at `row` [T,B] where `shown` [T,B], 0 elsewhere: [T,B,bits]."""
    row = row.clamp(0, rows.shape[0] - 1)
    return rows[row, torch.arange(rows.shape[1])] * shown.unsqueeze(-1)


def flags(*channels: Tensor) -> Tensor:
    """Channels of [T,B] side by side, [T,B,channels]."""
    return torch.stack([channel.float() for channel in channels], -1)


def check_range(name: str, low: int, high: int, least: int = 1) -> None:
    if not least <= low <= high:
        raise ValueError(f"min_{name}, max_{name}: expected {least} <= min <= max, got {low} and {high}")


def check_level(level: int, levels: int) -> None:
    if not _is_integer(level) or not 1 <= level <= levels:
        raise ValueError(f"level: expected 1 to {levels}, got {level!r}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {value!r}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_output(output: Tensor, batch: Batch) -> None:
    """Another shape might broadcast, and mean nothing."""
    if output.shape != batch.target.shape:
        raise ValueError(f"output: expected shape {list(batch.target.shape)}, got {list(output.shape)}")


def _per_sample(values: Tensor, batch: Batch) -> Tensor:
    return (values * batch.mask.unsqueeze(-1)).sum((0, 2))


def _masked_mean(values: Tensor, batch: Batch) -> Tensor:
    return _per_sample(values, batch).sum() / (batch.mask.sum() * values.shape[-1])


def masked_loss(output: Tensor, batch: Batch) -> Tensor:
    """Cross entropy of the logits `output` [T,B,Y] in nats, summed over masked steps and bits, mean over samples."""
    check_output(output, batch)
    return _per_sample(binary_cross_entropy_with_logits(output, batch.target, reduction="none"), batch).mean()


def bit_errors(output: Tensor, batch: Batch) -> Tensor:
    """Wrong bits of the logits `output` [T,B,Y] in the masked steps, nan is wrong: per sequence, mean over samples."""
    check_output(output, batch)
    return _per_sample(((output > 0) != (batch.target > 0.5)) | output.isnan(), batch).mean()


def soft_bit_errors(output: Tensor, batch: Batch) -> Tensor:
    """As `bit_errors`, but a bit counts by its distance from what the sigmoid of its logit says.

    The "bit error" of the code published with Le et al., "Neural Stored-program Memory", which also counts repeats on
    another scale in its tests (`RepeatCopy` with the `count_range` of the tests).
    """
    check_output(output, batch)
    return _per_sample((output.sigmoid() - batch.target).abs(), batch).mean()


def wrong_tokens(output: Tensor, batch: Batch) -> Tensor:
    """Where the largest of the logits `output` [T,B,Y] is not that of the class, or one is nan: [T,B]."""
    check_output(output, batch)
    return (output.argmax(-1) != batch.target.argmax(-1)) | output.isnan().any(-1)
