"""How much of a sequence a network remembers: what each input step still contributes to the last state."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmem import _check


class Contribution(NamedTuple):
    """What the input steps contribute to the last hidden state."""

    norms: Tensor  # [T], float64 on the CPU: ||d h_T / d x_i||_F, the mean over the batch
    decay: float  # factor of a step further back, fitted to their logarithms; nan where fewer than two are positive
    residual: float  # root of the mean square by which the logarithms differ from the fit; nan as the decay


def contribution(
    net: nn.Module, input: Tensor, state: Any = None, probes: int | None = None, seed: int = 0, **arguments: Any
) -> Contribution:
    r"""Norm of the gradient of a network's last hidden state by each step of its input.

    .. math::
        c_i = \Big\| \frac{\partial h_T}{\partial x_i} \Big\|_F, \qquad
        \log c_i \approx a + (T - i) \log \lambda

    (Le et al. 2019, "Learning to Remember More with Less Memorization", who find that in common recurrent networks each
    is at most :math:`\lambda` times the next; ours is the fit, by least squares over the steps with a positive norm.)

    Args:
        net (Module): called like :class:`torch.nn.LSTM`, in the mode that it is in. h_T is the `hidden` of the state it
            returns, which in the networks of fastmem holds all layers, or the last output where the state has none, or
            an empty one. No sample may depend on another, as it would by batch normalisation.
        input (Tensor): at least one step and one sample. Shape `[T, B, X]`, `[B, T, X]` for a network with
            `batch_first`, or `[T, X]`.
        state (optional): the state before the first step. Default: None, the network's own.
        probes (int, optional): estimate from this many random directions of h_T a sample, rather than from all its
            units; the squared norms are then right on average. Default: None, exact.
        seed (int): of these directions, which are the same for equal sizes and seed. Default: 0.
        **arguments: further ones for the call of the network, as `write_schedule`; not `lengths`, as the sequences end
            together.

    Returns:
        :class:`Contribution`. Neither input nor parameters get a gradient.

    Dtype: that of the network; squares are summed in float64.

    Cost: one forward pass, and a backward pass for each unit of h_T, or for each of the probes; memory as for one of
    them.

    Raises:
        TypeError: for an input that is no tensor of floating point numbers.
        ValueError: for an input of another layout, without a step or without a sample, or a number of probes or a seed
            that does not fit.

    Example::

        found = fastmem.diagnostics.contribution(torch.nn.LSTM(4, 32), torch.randn(50, 8, 4))
        found.norms, found.decay    # [50], and the factor between two steps
        net = fastmem.nn.DNC(4, 32, num_slots=4, word_size=16)
        found = fastmem.diagnostics.contribution(net, torch.randn(50, 8, 4), write_schedule="uniform")
    """
    _check.tensors([("input", False)], [input])
    if "lengths" in arguments:
        raise ValueError(f"lengths: expected none, as the sequences end together, got {arguments['lengths']!r}")
    if not input.is_floating_point():
        raise TypeError(f"input: expected floating point numbers, got {input.dtype}")
    batch_first = input.dim() == 3 and bool(getattr(net, "batch_first", False))
    if input.dim() not in (2, 3):
        layout = "[B, T, X]" if getattr(net, "batch_first", False) else "[T, B, X]"
        raise ValueError(f"input: expected {layout} or [T, X], got shape {list(input.shape)}")
    if not input.shape[:-1].numel():
        raise ValueError(f"input: expected at least one step and one sample, got shape {list(input.shape)}")
    probes = None if probes is None else _check.integer("probes", probes)
    seed = _check.integer("seed", seed, least=0)

    x = input.detach().clone().requires_grad_()
    # By cuDNN, a recurrent network that does not train has no gradient.
    with torch.enable_grad(), torch.backends.cudnn.flags(enabled=False):
        output, last = net(x, **arguments) if state is None else net(x, state, **arguments)
        hidden = getattr(last, "hidden", None)
        if hidden is None or not hidden.shape[-1]:
            hidden = output.select(int(batch_first), -1)

    units = hidden.shape[-1]
    generator = torch.Generator().manual_seed(seed)
    squares = torch.zeros(x.shape[:-1], dtype=torch.float64, device=x.device)
    for number in range(units if probes is None else probes):
        if probes is None:
            direction = torch.zeros_like(hidden)
            direction[..., number] = 1
        else:  # of a length at which the squares of the products are right on average
            drawn = torch.randn(hidden.shape, generator=generator, dtype=torch.float64, device="cpu")
            drawn *= (units / probes) ** 0.5 / drawn.norm(dim=-1, keepdim=True)
            direction = drawn.to(hidden)
        (gradient,) = torch.autograd.grad(hidden, x, direction, retain_graph=True)
        squares += gradient.double().square().sum(-1)
    norms = squares.sqrt().cpu()
    if input.dim() == 3:
        norms = norms.mean(int(not batch_first))
    return Contribution(norms, *_fitted(norms))


def _fitted(norms: Tensor) -> tuple[float, float]:
    """The decay and the residual of a line through the logarithms of the norms `[T]`."""
    steps_back = torch.arange(len(norms) - 1, -1, -1, dtype=norms.dtype, device=norms.device)
    counted = norms != 0
    x, y = (values[counted] - values[counted].mean() for values in (steps_back, norms.log()))
    slope = (x * y).sum() / x.square().sum()
    return float(slope.exp()), float((y - slope * x).square().mean().sqrt())
