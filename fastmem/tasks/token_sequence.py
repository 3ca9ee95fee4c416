"""Sequences of tokens: read all, then write what a rule makes of them (Le et al., "Learning to Remember More with Less
Memorization", and the code published with it).

Tokens are classes, one-hot: 0 ends a sequence, the others are data, all as likely. For x_1 .. x_T, T the `length`:

    step                   input       target         mask
    0 .. T - 1             x_1 .. x_T  0              0
    T                      token 0     0              0
    next T_out             0           y_1 .. y_T_out 1
    the one after          0           token 0        1

    rule       y                                           T_out
    copy       x_1 .. x_T                                  T
    reverse    x_T .. x_1                                  T
    double     x_1 .. x_T, x_1 .. x_T                      2 T
    add        y_t = floor((x_t + x_(T + 1 - t)) / 2)      floor(T / 2)
    max        y_t = max(x_(2 t - 1), x_(2 t))             floor(T / 2)

The pairs of add are those of the code; the paper prints x_t + x_(T - t). Of an odd length add leaves out the token in
the middle, and max the last one. All samples have the same length, for a write schedule depends on it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot, pad

from fastmem import _check
from fastmem.tasks._task import Batch, TokenTask, check_choice

RULES = ("copy", "reverse", "double", "add", "max")


@dataclass(frozen=True)
class TokenSequence(TokenTask):
    """A source of batches. `classes` counts the end token; None is that of the paper: 50 for max, 10 for the others."""

    rule: str = "copy"
    length: int = 50
    classes: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("rule", self.rule, RULES)
        if self.classes is not None:
            _check.integer("classes", self.classes, least=2)
        if self.rule in ("add", "max") and self.length < 2:
            raise ValueError(f"length: expected at least 2 for {self.rule}, got {self.length}")

    @property
    def input_size(self) -> int:
        return self.classes or (50 if self.rule == "max" else 10)

    @property
    def output_size(self) -> int:
        return self.input_size

    @property
    def read_steps(self) -> int:
        return self.length + 1

    def _draw(self, batch_size: int, generator: torch.Generator | None) -> Batch:
        data = torch.randint(1, self.input_size, (self.length, batch_size), generator=generator)
        seen, asked = (one_hot(pad(tokens, (0, 0, 0, 1)), self.input_size) for tokens in (data, self._made_of(data)))
        return Batch(
            input=torch.cat([seen, torch.zeros_like(asked)]),
            target=torch.cat([torch.zeros_like(seen), asked]),
            mask=torch.cat([torch.zeros_like(seen[..., 0]), torch.ones_like(asked[..., 0])]),
        )

    def _made_of(self, data: Tensor) -> Tensor:
        """The tokens [T_out,B] that the rule makes of [T,B]."""
        half = self.length // 2
        match self.rule:
            case "copy":
                return data
            case "reverse":
                return data.flip(0)
            case "double":
                return torch.cat([data, data])
            case "add":
                return (data[:half] + data.flip(0)[:half]) // 2
            case _:
                return torch.maximum(data[0 : 2 * half : 2], data[1 : 2 * half : 2])
