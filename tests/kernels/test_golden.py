"""float32 against the results of published implementations (tests/golden)."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

pytest.importorskip("triton")

import torch
from torch import Tensor

import fastmem
from tests.golden.ops import EACH_FUNCTION, check_float32
from tests.helpers import assert_no_worse
from tests.nn import test_dnc, test_ntm

# The logarithm of a zero weight is -inf on purpose, and the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize(("file", "function"), EACH_FUNCTION)
def test_ops(file: str, function: str) -> None:
    check_float32(file, function, "triton")


class Network(NamedTuple):
    """A network of published code, and what that code gave."""

    net: Any
    state: Any
    f: dict[str, Tensor]
    gradients: dict[str, Tensor]
    result: Callable[[Tensor], Tensor] = lambda output: output


ROUNDINGS = 5


def check_networks(networks: list[Network]) -> None:
    """The errors of all count as one, since the luck of a few numbers over a few steps is not the kernel's.

    The plain formula runs on inputs a rounding apart, and the worst counts: steps upon steps can make a rounding many.
    """

    def run(network: Network, backend: str, seed: int = 0) -> list[Tensor]:
        single, x = copy.deepcopy(network.net).float(), network.f["x"].detach()
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)).sign() if seed else 0
        with fastmem.use_backend(backend):
            rounded = (x * (1 + torch.finfo(torch.float32).eps * noise)).float()
            output = network.result(single(rounded, network.state.detach().to(torch.float32))[0])
            (output * network.f["loss_w"].float()).sum().backward()
        return [output.detach(), *(single.get_parameter(name).grad for name in network.gradients)]

    exact = [[network.f["y"], *network.gradients.values()] for network in networks]
    ours = [run(network, "triton") for network in networks]
    drawn = [[run(network, "reference", seed) for network in networks] for seed in range(ROUNDINGS)]
    for name, part, factor in (("outputs", slice(0, 1), 2), ("gradients", slice(1, None), 3)):
        actual, truth, *plain = (
            torch.cat([t.flatten() for results in side for t in results[part]]) for side in (ours, exact, *drawn)
        )
        worst = max(plain, key=lambda candidate: (candidate - truth).abs().max().item())
        assert_no_worse(actual, truth, worst, factor, name)


def test_dncs() -> None:
    made = [test_dnc.csordas(file) for file in test_dnc.CSORDAS]
    check_networks([Network(net, state, f, gradients) for net, state, f, gradients in made])


def test_ntms() -> None:
    made = [(file, *test_ntm.published(file)) for file in test_ntm.FILES]
    results = [torch.sigmoid if "loudin" in file else Network._field_defaults["result"] for file, *_ in made]
    networks = [(net, state, f, gradients) for _, net, state, _, f, gradients in made]
    check_networks([Network(*network, result) for network, result in zip(networks, results, strict=True)])
