"""One step of a controller: what it sees and its state -> its top, the new state, and what the backward needs.

    lstm             z = W_ih s + b_ih + W_hh h + b_hh
                     i, f, o = sigmoid(z_i), sigmoid(z_f), sigmoid(z_o),  g = tanh(z_g)
                     c' = f c + i g,  h' = o tanh(c')
    layernorm_lstm   z = W_ih s + W_hh h, the gates from LN_k(z_k), and c' = LN_4(f c + i g), with
                     LN_k(v) = norm_weight[k] (v - mean v) / sqrt(var v + 1e-5) + norm_bias[k] over the H units
    feedforward      h' = tanh(W_ih s + b_ih), without a state

seen s [B,I], hidden h and cell c [B,H] (feedforward: [B,0]), rows of the weights in the order i, f, g, o -> top h'
[B,H], cell c', and gates [B,4H]: i, f, g, o of the lstm, z of the layernorm_lstm; [B,0] of the feedforward. Sources:
Hochreiter and Schmidhuber, "Long Short-Term Memory", as torch.nn.LSTM has it; Ba et al., "Layer Normalization", with
the new cell itself normalised, as in the layer-normalised cell of TensorFlow.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

CONTROLLERS = ("lstm", "layernorm_lstm", "feedforward")
NORM_EPS = 1e-5


def parameter_shapes(controller: str, seen: int, hidden: int) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter of a layer, in their order."""
    if controller == "feedforward":
        return {"weight_ih": (hidden, seen), "bias_ih": (hidden,)}
    weights: dict[str, tuple[int, ...]] = {"weight_ih": (4 * hidden, seen), "weight_hh": (4 * hidden, hidden)}
    if controller == "lstm":
        return weights | {"bias_ih": (4 * hidden,), "bias_hh": (4 * hidden,)}
    return weights | {"norm_weight": (5, hidden), "norm_bias": (5, hidden)}


def state_size(controller: str, hidden: int) -> int:
    """Of the hidden state, and of the cell."""
    return 0 if controller == "feedforward" else hidden


def _standardised(v: Tensor) -> tuple[Tensor, Tensor]:
    """(v - mean) / sqrt(var + eps), and the factor 1 / sqrt(var + eps)."""
    centred = v - v.mean(-1, keepdim=True)
    factor = (centred.square().mean(-1, keepdim=True) + NORM_EPS).rsqrt()
    return centred * factor, factor


def _normalised(v: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return weight * _standardised(v)[0] + bias


def _normalised_backward(grad: Tensor, v: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of v, weight and bias. With n the standardised v and u = weight grad

    grad v = (u - mean u - n mean(n u)) / sqrt(var + eps),   grad weight = sum_b n grad,   grad bias = sum_b grad
    """
    standardised, factor = _standardised(v)
    u = weight * grad
    inner = u - u.mean(-1, keepdim=True) - standardised * (standardised * u).mean(-1, keepdim=True)
    return inner * factor, (standardised * grad).sum(0), grad.sum(0)


def _activated(z: Tensor) -> Tensor:
    """The gates [B,4,H] from their arguments."""
    i, f, g, o = z.unbind(1)
    return torch.stack([i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()], 1)


def control(
    controller: str, parameters: Sequence[Tensor], seen: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    if controller == "feedforward":
        return linear(seen, *parameters).tanh(), cell, cell
    weight_ih, weight_hh, *rest = parameters
    if controller == "lstm":
        z = linear(seen, weight_ih, rest[0]) + linear(hidden, weight_hh, rest[1])
        gates = _activated(z.unflatten(-1, (4, -1)))
        recorded = gates.flatten(1)
    else:
        norm_weight, norm_bias = rest
        recorded = linear(seen, weight_ih) + linear(hidden, weight_hh)
        gates = _activated(_normalised(recorded.unflatten(-1, (4, -1)), norm_weight[:4], norm_bias[:4]))
    i, f, g, o = gates.unbind(1)
    cell = f * cell + i * g
    if controller == "layernorm_lstm":
        cell = _normalised(cell, norm_weight[4], norm_bias[4])
    return o * cell.tanh(), cell, recorded


def control_backward(
    grad_top: Tensor,
    grad_cell: Tensor,
    top: Tensor,
    new_cell: Tensor,
    recorded: Tensor,
    controller: str,
    parameters: Sequence[Tensor],
    seen: Tensor,
    hidden: Tensor,
    cell: Tensor,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of seen, hidden, cell, and of each parameter, summed over the samples."""
    if controller == "feedforward":
        into_z = grad_top * (1 - top.square())
        return into_z @ parameters[0], hidden, cell, [into_z.mT @ seen, into_z.sum(0)]
    weight_ih, weight_hh, *rest = parameters
    gates = recorded.unflatten(-1, (4, -1))
    if controller == "layernorm_lstm":
        z, (norm_weight, norm_bias) = gates, rest
        gates = _activated(_normalised(z, norm_weight[:4], norm_bias[:4]))
    i, f, g, o = gates.unbind(1)
    squashed = new_cell.tanh()
    into_cell = grad_cell + grad_top * o * (1 - squashed.square())
    if controller == "layernorm_lstm":
        into_cell, *into_last = _normalised_backward(into_cell, f * cell + i * g, norm_weight[4])
    into_gates = torch.stack([into_cell * g, into_cell * cell, into_cell * i, grad_top * squashed], 1)
    slopes = torch.stack([i * (1 - i), f * (1 - f), 1 - g.square(), o * (1 - o)], 1)
    into_z = into_gates * slopes
    if controller == "layernorm_lstm":
        into_z, *into_first = _normalised_backward(into_z, z, norm_weight[:4])
    into_z = into_z.flatten(1)
    if controller == "lstm":
        into_rest = [into_z.sum(0)] * 2
    else:
        into_rest = [torch.cat([first, last.unsqueeze(0)]) for first, last in zip(into_first, into_last, strict=True)]
    into_parameters = [into_z.mT @ seen, into_z.mT @ hidden, *into_rest]
    return into_z @ weight_ih, into_z @ weight_hh, into_cell * f, into_parameters
