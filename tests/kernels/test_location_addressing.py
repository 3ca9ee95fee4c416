import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from fastmem.kernels import location_addressing as kernels

from fastmem.reference import location_addressing as reference
from tests.cases import location_addressing as cases
from tests.helpers import assert_close, cotangents
from tests.kernels.suite import check, check_output_mask

# The logarithm of a zero weight is -inf on purpose, and 0 times that discarded; the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize("case", cases.INTERPRETED)
def test_no_worse_than_plain_pytorch(case: str) -> None:
    check("location_addressing", kernels, reference, cases, case, 1, slice(0, 1), 5)


@pytest.mark.parametrize("in_powers", [False, True])
@pytest.mark.parametrize("reversed_shift", [False, True])
@pytest.mark.parametrize("block", [8, 512])
def test_float64_in_one_tile_and_in_several(
    in_powers: bool, reversed_shift: bool, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "BLOCK", block)
    inputs = cases.make(
        slots=21, reach=2, reversed_shift=reversed_shift, in_powers=in_powers, dtype=torch.float64
    )  # fmt: skip
    inputs["gate"][0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    inputs["previous"][0, :2] = torch.nn.functional.one_hot(torch.tensor(20), 21)  # most shifted weights are 0
    inputs["sharpness"][0, 0] = 1
    weights = kernels.location_addressing(*inputs.values())
    assert_close(weights, reference.location_addressing(*inputs.values()))
    arguments = [*cotangents([weights]), weights, *inputs.values()]
    actual = kernels.location_addressing_backward(*arguments, [True] * 5)
    for a, e in zip(actual, reference.location_addressing_backward(*arguments, [True] * 5), strict=True):
        assert_close(a, e)
    check_output_mask(kernels.location_addressing_backward, arguments, 5)


@triton.jit
def sources(p_slots, o_first, i_tap, taps, N, DIRECTION: tl.constexpr, BN: tl.constexpr):
    o_tile = tl.arange(0, BN)
    tl.store(p_slots + o_tile, kernels.behind(o_first + o_tile, i_tap, taps, N, DIRECTION))


@pytest.mark.parametrize("direction", [1, -1])
@pytest.mark.parametrize("tap", [0, 1, 40000, 65536])
def test_taps_times_slots_may_pass_an_int32(tap: int, direction: int) -> None:
    slots, taps, first = 32769, 65537, 32761
    found = torch.empty(8, dtype=torch.int32)
    sources[(1,)](found, first, tap, taps, slots, direction, 8)
    assert found.tolist() == [(first + i - direction * (tap - taps // 2)) % slots for i in range(8)]


def test_strides_are_honoured() -> None:
    *tensors, reversed_shift, in_powers, eps = cases.make(slots=5).values()
    strided = [tensor.transpose(0, -1).clone().transpose(0, -1) for tensor in tensors]
    expected = kernels.location_addressing(*tensors, reversed_shift, in_powers, eps)
    assert torch.equal(kernels.location_addressing(*strided, reversed_shift, in_powers, eps), expected)


@pytest.mark.parametrize("name", ["content", "previous", "gate", "shift", "sharpness"])
def test_nan_stays_in_its_head(name: str) -> None:
    inputs = cases.make(slots=5)
    expected = kernels.location_addressing(*inputs.values())
    expected[1, 2] = float("nan")
    inputs[name][1, 2].fill_(float("nan"))
    actual = kernels.location_addressing(*inputs.values())
    assert torch.equal(actual.nan_to_num(-1), expected.nan_to_num(-1))
