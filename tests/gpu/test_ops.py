"""The public ops on a CUDA device: the Triton kernels, compiled, against float64, on every case of every op."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import fastmem
from tests.golden.ops import EACH_FUNCTION, check_float32
from tests.helpers import assert_no_worse, converted, is_differentiable
from tests.ops import (
    test_allocation,
    test_cached_attention,
    test_content_addressing,
    test_content_read,
    test_dnc_step,
    test_location_addressing,
    test_memory_write,
    test_program_lookup,
    test_program_mix,
    test_sharpen,
    test_temporal_linkage,
    test_usage_update,
    test_weighted_read,
)
from tests.ops.suite import OpSuite

pytestmark = pytest.mark.gpu

SUITES: list[OpSuite] = [
    test_temporal_linkage.TestTemporalLinkage(),
    test_content_addressing.TestContentAddressing(),
    test_content_read.TestContentRead(),
    test_program_lookup.TestProgramLookup(),
    test_program_mix.TestProgramMix(),
    test_usage_update.TestUsageUpdate(),
    test_allocation.TestAllocation(),
    test_memory_write.TestMemoryWrite(),
    test_weighted_read.TestWeightedRead(),
    test_sharpen.TestSharpen(),
    test_location_addressing.TestLocationAddressing(),
    test_dnc_step.TestDNCStep(),
    test_cached_attention.TestCachedAttention(),
]
ALL = [pytest.param(suite, case, id=f"{suite.op.__name__}-{case}") for suite in SUITES for case in suite.cases.CASES]
EACH = [pytest.param(suite, id=suite.op.__name__) for suite in SUITES]


@pytest.fixture(autouse=True)
def exact_products() -> Iterator[None]:
    previous = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(previous)


def on_device(suite: OpSuite, case: str) -> dict[str, Any]:
    return suite.cases.make(**suite.cases.CASES[case], dtype=torch.float32, device="cuda")


@pytest.mark.parametrize(("suite", "case"), ALL)
def test_no_worse_than_the_plain_formula(suite: OpSuite, case: str) -> None:
    values = on_device(suite, case)
    assert fastmem.explain(suite.op, *suite.public(values)).backend == "triton"
    actual, plain = suite.run(values), suite.oracle(values)
    exact = suite.oracle(dict(zip(values, converted(list(values.values()), torch.float64), strict=True)))
    for i, triple in enumerate(zip(actual[0], exact[0], plain[0], strict=True)):
        assert_no_worse(*triple, factor=2, name=f"output {i}")
    for name, a, e, p in zip(suite.names(values), actual[1], exact[1], plain[1], strict=True):
        assert_no_worse(a, e, p, factor=3, name=f"gradient of {name}")


@pytest.mark.parametrize(("file", "function"), EACH_FUNCTION)
def test_published_results(file: str, function: str) -> None:
    check_float32(file, function, "triton", "cuda")


@pytest.mark.parametrize("suite", EACH)
def test_reruns_are_bitwise_equal(suite: OpSuite) -> None:
    values = on_device(suite, "odd")
    first, second = suite.run(values), suite.run(values)
    for a, b in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("suite", EACH)
def test_compiles_without_graph_breaks(suite: OpSuite) -> None:
    values = on_device(suite, "plain")
    torch._dynamo.reset()
    compiled = torch.compile(suite.op, fullgraph=True)
    outputs, expected = compiled(*values.values()), suite.op(*values.values())
    for a, e in zip(
        *([out] if isinstance(out, torch.Tensor) else list(out) for out in (outputs, expected)), strict=True
    ):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("suite", EACH)
def test_opcheck(suite: OpSuite) -> None:
    values = [v.requires_grad_() if is_differentiable(v) else v for v in on_device(suite, "plain").values()]
    torch.library.opcheck(getattr(torch.ops.fastmem, suite.op.__name__).default, tuple(values))


@pytest.mark.parametrize("suite", EACH)
def test_cuda_graph_replays_the_call(suite: OpSuite) -> None:
    values = on_device(suite, "plain")
    suite.op(*values.values())  # compiles outside the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = suite.op(*values.values())
    graph.replay()
    torch.cuda.synchronize()
    expected = suite.op(*values.values())
    for a, e in zip(
        *([out] if isinstance(out, torch.Tensor) else list(out) for out in (captured, expected)), strict=True
    ):
        assert torch.equal(a, e)


def test_dnc_trains_on_the_device() -> None:
    torch.manual_seed(0)
    net = fastmem.nn.DNC(5, 16, num_slots=12, word_size=7, num_read_heads=2, output_size=3)
    inputs = torch.randn(6, 2, 5)
    expected, _ = net(inputs)
    output, state = net.to("cuda")(inputs.cuda())
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-5)
    output.square().sum().backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in gradients) and state.link.is_cuda
