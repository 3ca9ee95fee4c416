"""The controller of a memory network: recurrent or feed-forward layers, with parameters named as in torch.nn.LSTM."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastmem import _check

BLOCKS = {"lstm": 4, "gru": 3, "feedforward": 1}  # rows of a layer's weights, in units of hidden_size


class Controller(nn.Module):
    """Layers of one kind, a base of the modules that put a memory behind them.

    Layer k has weight_ih_l<k>, weight_hh_l<k>, bias_ih_l<k>, bias_hh_l<k> as in torch.nn.LSTM and torch.nn.GRU; a
    feed-forward layer tanh(W x + b) has weight_ih_l<k> and bias_ih_l<k> alone.
    """

    weight_ih_l0: nn.Parameter

    def __init__(
        self,
        controller: str,
        seen_size: int,
        hidden_size: int,
        num_layers: int,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        if not isinstance(controller, str) or controller not in BLOCKS:
            raise ValueError(f"controller: expected one of {', '.join(BLOCKS)}, got {controller!r}")
        _check.device(device)
        self.controller, self.hidden_size, self.num_layers = controller, hidden_size, num_layers
        self._parameters_of_layer = []
        rows = BLOCKS[controller] * hidden_size
        for layer in range(num_layers):
            shapes: dict[str, tuple[int, ...]] = {
                f"weight_ih_l{layer}": (rows, hidden_size if layer else seen_size),
                f"weight_hh_l{layer}": (rows, hidden_size),
                f"bias_ih_l{layer}": (rows,),
                f"bias_hh_l{layer}": (rows,),
            }
            names = [name for name in shapes if controller != "feedforward" or "_ih_" in name]
            for name in names:
                setattr(self, name, nn.Parameter(torch.empty(shapes[name], device=device, dtype=dtype)))
            self._parameters_of_layer.append(names)

    def reset_parameters(self) -> None:
        """Draws the parameters of the layers anew, uniformly from +-1 / sqrt(hidden_size) as torch.nn.LSTM does."""
        bound = self.hidden_size**-0.5
        for layer in range(self.num_layers):
            for parameter in self._layer(layer):
                nn.init.uniform_(parameter, -bound, bound)

    def control(self, seen: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the top layer says `[B, H]`, and the new hidden and cell states; layers lie one after the other."""
        hiddens, cells = [], []
        states = zip(hidden.tensor_split(self.num_layers, -1), cell.tensor_split(self.num_layers, -1), strict=True)
        for layer, (h, c) in enumerate(states):
            parameters = self._layer(layer)
            if self.controller == "lstm":
                seen, c = torch.lstm_cell(seen, (h, c), *parameters)
                h = seen
            elif self.controller == "gru":
                seen = h = torch.gru_cell(seen, h, *parameters)
            else:
                seen = linear(seen, *parameters).tanh()
            hiddens.append(h)
            cells.append(c)
        if self.num_layers == 1:
            return seen, hiddens[0], cells[0]
        return seen, torch.cat(hiddens, -1), torch.cat(cells, -1)

    def _layer(self, layer: int) -> list[Any]:
        return [getattr(self, name) for name in self._parameters_of_layer[layer]]

    def _state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Of hidden and cell without the batch; a state that the layers lack has size 0."""
        size = self.num_layers * self.hidden_size
        return {
            "hidden": (0 if self.controller == "feedforward" else size,),
            "cell": (size if self.controller == "lstm" else 0,),
        }
