import pytest
import torch

pytest.importorskip("triton")

from fastmem.kernels import cached_attention as kernels

from fastmem.reference import cached_attention as reference
from tests.cases import cached_attention as cases
from tests.helpers import assert_close, cotangents
from tests.kernels.suite import check, check_output_mask

pytestmark = pytest.mark.interp


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("cached_attention", kernels, reference, cases, case, 2, slice(1, 2), 4)


@pytest.mark.parametrize("case", ["plain", "mask", "wide_attention"])
def test_float64(case: str) -> None:
    values = list(cases.make(**cases.CASES[case], dtype=torch.float64).values())
    outputs = kernels.cached_attention(*values)
    for actual, wanted in zip(outputs, reference.cached_attention(*values), strict=True):
        assert_close(actual, wanted)
    arguments = [*cotangents(outputs), outputs[1], *values]
    expected = reference.cached_attention_backward(*[*arguments, [True] * 4])
    for actual, wanted in zip(kernels.cached_attention_backward(*[*arguments, [True] * 4]), expected, strict=True):
        assert_close(actual, wanted)
    check_output_mask(kernels.cached_attention_backward, arguments, 4)


@pytest.mark.parametrize("given", range(2))
def test_absent_upstream_gradients_count_as_zero(given: int) -> None:
    values = list(cases.make(mask=True, dtype=torch.float64).values())
    outputs = kernels.cached_attention(*values)
    upstream = [grad if i == given else None for i, grad in enumerate(cotangents(outputs))]
    arguments = [*upstream, outputs[1], *values, [True] * 4]
    expected = reference.cached_attention_backward(*arguments)
    for actual, wanted in zip(kernels.cached_attention_backward(*arguments), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tanh_of_any_size_to_its_last_digits(dtype: torch.dtype) -> None:
    """Keys x and 0 of weights 1/2, whose scores have the gradients 1 and -1: that of the score weights is tanh(x)."""
    x = torch.cat([torch.logspace(-30, 2, 200), torch.tensor([0.0, 0.624, 0.626, 20.1, float("inf")])]).to(dtype)
    x = torch.cat([x, -x])
    keys, weights = torch.stack([x, torch.zeros_like(x)])[None], torch.full((1, 2), 0.5, dtype=dtype)
    cache = torch.zeros(1, 2, 1, dtype=dtype)
    inputs = torch.zeros(1, len(x), dtype=dtype), keys, cache, torch.ones_like(x), None
    upstream = torch.tensor([[2.0, -2.0]], dtype=dtype)
    *_, found = kernels.cached_attention_backward(None, upstream, weights, *inputs, [False, False, False, True])
    exact = x.double().tanh()
    assert ((found.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * exact.abs()).all()


def test_strides_are_honoured() -> None:
    values = cases.make(batch=3, length=9, attention=5, hidden=7)
    expected = kernels.cached_attention(*values.values())
    for name in ("keys", "cache"):
        tensor = values[name]
        for other in (tensor.mT.contiguous().mT, tensor.transpose(0, 1).contiguous().transpose(0, 1)):
            for actual, wanted in zip(
                kernels.cached_attention(*(values | {name: other}).values()), expected, strict=True
            ):
                assert torch.equal(actual, wanted)


def test_what_takes_no_part_is_not_read() -> None:
    values = cases.make(batch=3, length=9, mask=True)
    hidden = ~values["mask"]
    clean = kernels.cached_attention(*values.values())
    arguments = [*cotangents(clean), clean[1]]
    expected = kernels.cached_attention_backward(*[*arguments, *values.values(), [True] * 4])
    values["keys"][hidden], values["cache"][hidden], values["query"][0] = float("nan"), float("inf"), float("nan")
    gradients = kernels.cached_attention_backward(*[*arguments, *values.values(), [True] * 4])
    for actual, wanted in zip(
        (*kernels.cached_attention(*values.values()), *gradients), (*clean, *expected), strict=True
    ):
        assert torch.equal(actual, wanted)


def test_scores_that_are_not_finite() -> None:
    values = cases.make(batch=3, length=3, attention=2, dtype=torch.float64)
    values["query"][:], values["keys"][:] = 0.0, 1.0
    values["keys"][1], values["score_weights"][0] = -1.0, -float("inf")
    values["keys"][2] = float("nan")
    attended, weights = kernels.cached_attention(*values.values())
    arguments = [*cotangents([attended, weights]), weights, *values.values(), [True] * 4]
    gradients = kernels.cached_attention_backward(*arguments)[:3]
    for zero in (attended, weights, *gradients):
        assert not zero[0].any()
    assert attended[1:].isnan().all() and weights[1:].isnan().all()


def test_nan_stays_in_its_sample() -> None:
    values = cases.make(length=5)
    clean = kernels.cached_attention(*values.values())
    for name in ("query", "keys", "cache"):
        dirty = values | {name: values[name].clone()}
        dirty[name][1].view(-1)[1] = float("nan")
        attended, weights = kernels.cached_attention(*dirty.values())
        assert torch.equal(attended[0], clean[0][0]) and torch.equal(weights[0], clean[1][0])
        assert attended[1].isnan().any()
