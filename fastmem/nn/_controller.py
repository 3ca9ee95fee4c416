"""The controller of a memory network: recurrent or feed-forward layers, with parameters named as in torch.nn.LSTM."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from fastmem import _check
from fastmem.reference import _controller

CONTROLLERS = ("lstm", "layernorm_lstm", "gru", "feedforward")
FORGET_GATE = 1  # its row of a normalisation


class Controller(nn.Module):
    """Layers of one kind, a base of the modules that put a memory behind them.

    Layer k has weight_ih_l<k>, weight_hh_l<k>, bias_ih_l<k>, bias_hh_l<k> as in torch.nn.LSTM and torch.nn.GRU; a
    layer-normalised LSTM has norm_weight_l<k> and norm_bias_l<k> `[5, H]`, of i, f, g, o and the cell, for the biases;
    a feed-forward layer tanh(W x + b) has weight_ih_l<k> and bias_ih_l<k> alone.
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
        if not isinstance(controller, str) or controller not in CONTROLLERS:
            raise ValueError(f"controller: expected one of {', '.join(CONTROLLERS)}, got {controller!r}")
        _check.device(device)
        self.controller, self.hidden_size, self.num_layers = controller, hidden_size, num_layers
        self._parameters_of_layer = []
        for layer in range(num_layers):
            shapes = _layer_shapes(controller, hidden_size if layer else seen_size, hidden_size)
            for name, shape in shapes.items():
                setattr(self, f"{name}_l{layer}", nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
            self._parameters_of_layer.append([f"{name}_l{layer}" for name in shapes])

    def reset_parameters(self) -> None:
        """Draws the parameters of the layers anew, uniformly from +-1 / sqrt(hidden_size) as torch.nn.LSTM does.

        Those of a normalisation are 1 and 0, but 1 for the bias of the forget gate.
        """
        bound = self.hidden_size**-0.5
        for name in itertools.chain(*self._parameters_of_layer):
            parameter = getattr(self, name)
            if name.startswith("norm_weight"):
                nn.init.ones_(parameter)
            elif name.startswith("norm_bias"):
                nn.init.zeros_(parameter)
                nn.init.ones_(parameter[FORGET_GATE])
            else:
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
            elif self.controller == "layernorm_lstm":
                seen, c, _ = _controller.control(self.controller, parameters, seen, h, c)
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
            "cell": (size if self.controller.endswith("lstm") else 0,),
        }


def _layer_shapes(controller: str, seen: int, hidden: int) -> dict[str, tuple[int, ...]]:
    if controller == "gru":
        rows = 3 * hidden
        return {"weight_ih": (rows, seen), "weight_hh": (rows, hidden), "bias_ih": (rows,), "bias_hh": (rows,)}
    return _controller.parameter_shapes(controller, seen, hidden)
