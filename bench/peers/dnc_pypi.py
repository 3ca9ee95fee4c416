"""PyPI `dnc` 1.1.0 behind the call of fastmem.nn.DNC: time-major input, output of its own size.

Slightly other maths: tanh keys and values, strengths without the added one, the controller's output clipped instead of
the interface vector. It gets no state and no packed input, which break on current PyTorch, and an output layer of the
wanted size in place of its own. It starts each call from a random hidden state.
"""

from torch import Tensor, nn


class PypiDNC(nn.Module):
    def __init__(
        self, input_size: int, hidden_size: int, num_slots: int, word_size: int, num_read_heads: int, output_size: int
    ) -> None:
        super().__init__()
        import dnc

        self.core = dnc.DNC(
            input_size,
            hidden_size,
            num_layers=1,
            num_hidden_layers=1,
            nr_cells=num_slots,
            cell_size=word_size,
            read_heads=num_read_heads,
            batch_first=False,
        )
        # Its own output layer would give input_size numbers; the one here gives output_size, at the same cost.
        self.core.output = nn.Linear(hidden_size + num_read_heads * word_size, output_size)

    def forward(self, inputs: Tensor) -> tuple[Tensor, None]:
        return self.core(inputs)[0], None
