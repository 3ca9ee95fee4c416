import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import temporal_linkage as reference
from tests.cases import temporal_linkage as cases
from tests.helpers import assert_close
from tests.ops.suite import OpSuite


class TestTemporalLinkage(OpSuite):
    op = staticmethod(fastmem.temporal_linkage)
    reference = reference
    cases = cases
    differentiable_outputs = 4
    batched = ("link", "precedence", "write_weights", "read_weights")
    strided = "link"


def sequence(
    steps: int, batch: int = 2, slots: int = 9, read_heads: int = 3
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    made = [cases.make(batch, slots, read_heads, dtype=torch.float64, seed=step) for step in range(steps)]
    return [(values["write_weights"], values["read_weights"]) for values in made]


def test_rows_and_columns_sum_to_at_most_one_and_the_diagonal_is_zero():
    link, precedence = torch.zeros(2, 1, 9, 9, dtype=torch.float64), torch.zeros(2, 1, 9, dtype=torch.float64)
    for write_weights, read_weights in sequence(40):
        link, precedence, *_ = fastmem.temporal_linkage(link, precedence, write_weights, read_weights)
        assert (link >= 0).all() and (precedence.sum(-1) <= 1 + 1e-12).all()
        assert (link.sum(-1) <= 1 + 1e-12).all() and (link.sum(-2) <= 1 + 1e-12).all()
        assert not link.diagonal(dim1=-2, dim2=-1).any()


def test_sharp_writes_give_the_order_of_writing():
    slots, order = 6, [3, 0, 5, 1]
    link, precedence = torch.zeros(1, 1, slots, slots), torch.zeros(1, 1, slots)
    for slot in order:
        write_weights = torch.nn.functional.one_hot(torch.tensor([[slot]]), slots).float()
        link, precedence, *_ = fastmem.temporal_linkage(link, precedence, write_weights, write_weights)
    expected = torch.zeros(slots, slots)
    for earlier, later in itertools.pairwise(order):
        expected[later, earlier] = 1
    assert torch.equal(link[0, 0], expected)
    at_first = torch.nn.functional.one_hot(torch.tensor([[order[1]]]), slots).float()
    *_, forward, backward = fastmem.temporal_linkage(link, precedence, torch.zeros(1, 1, slots), at_first)
    assert forward.argmax() == order[2] and backward.argmax() == order[0]


def test_slot_permutation_permutes_the_results():
    values = cases.make(2, 17, 3, 2, dtype=torch.float64)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    permuted = {name: value[..., order] for name, value in values.items()}
    permuted["link"] = permuted["link"][..., order, :]
    link, *others = fastmem.temporal_linkage(**values)
    permuted_link, *permuted_others = fastmem.temporal_linkage(**permuted)
    assert_close(permuted_link, link[..., order, :][..., order])
    for a, e in zip(permuted_others, others, strict=True):
        assert_close(a, e[..., order])


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place_form_equals_the_functional_one(backend, dtype):
    for case in cases.CASES.values():
        values = cases.make(**case, dtype=dtype)
        expected = fastmem.temporal_linkage(**values, backend=backend)
        forward, backward = fastmem.temporal_linkage_(**values, backend=backend)
        bound = 1e-12 if dtype == torch.float64 else 1e-6
        for a, e in zip((values["link"], values["precedence"], forward, backward), expected, strict=True):
            assert_close(a, e, bound)


def test_in_place_form_checks_what_it_writes():
    values = cases.make()
    with pytest.raises(ValueError, match="link: expected dense rows and elements that do not overlap"):
        fastmem.temporal_linkage_(**{**values, "link": values["link"][:1].expand(2, -1, -1, -1)})
    with pytest.raises(ValueError, match="precedence: expected dense rows"):
        fastmem.temporal_linkage_(**{**values, "precedence": values["precedence"].repeat(1, 1, 2)[..., ::2]})
    overlapping = values["link"].as_strided(values["link"].shape, (1, 1, 1, 1))
    with pytest.raises(ValueError, match="link: expected dense rows and elements that do not overlap"):
        fastmem.temporal_linkage_(**{**values, "link": overlapping})
    with pytest.raises(
        ValueError, match="precedence: expected memory of its own, got memory shared with write_weights"
    ):
        fastmem.temporal_linkage_(**{**values, "precedence": values["write_weights"]})
    for op in (fastmem.temporal_linkage_, torch.ops.fastmem.temporal_linkage_):
        with pytest.raises(RuntimeError, match="got arguments that require a gradient"):
            op(*{**values, "link": values["link"].clone().requires_grad_()}.values())
    with torch.no_grad():
        fastmem.temporal_linkage_(**values)
    torch.library.opcheck(torch.ops.fastmem.temporal_linkage_.default, tuple(cases.make().values()))


@pytest.mark.skipif(fastmem.native.module is None or fastmem.native.module.sanitized, reason="there is no pool")
def test_large_results_reuse_memory_that_nothing_holds():
    values = cases.make(1, 300, 1)
    first = fastmem.temporal_linkage(**values)[0]
    second = fastmem.temporal_linkage(**values)[0]
    address, expected = first.data_ptr(), second.clone()
    assert second.data_ptr() != address
    view = first[0, 0, 1:]
    del first
    assert fastmem.temporal_linkage(**values)[0].data_ptr() != address  # the view still holds the block
    del view
    third = fastmem.temporal_linkage(**values)[0]
    assert third.data_ptr() == address
    assert torch.equal(second, expected) and torch.equal(third, expected)
    del second, third
    assert fastmem.native.empty_cache() >= 2 * 300 * 300 * 4
    assert fastmem.native.empty_cache() == 0


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_autograd_notices_what_the_in_place_form_overwrites(backend):
    values = cases.make()
    *_, forward, _ = fastmem.temporal_linkage(**{**values, "write_weights": values["write_weights"].requires_grad_()})
    with torch.no_grad():
        fastmem.temporal_linkage_(**values, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        forward.sum().backward()


def test_a_size_past_all_memory_raises():
    slots = 1_518_500_250  # 8 N^2 bytes do not fit 64 bits
    row = torch.empty(1, 1, 1, dtype=torch.float64).expand(1, 1, slots)
    link = torch.zeros(1, 1, 1, 1, dtype=torch.float64).expand(1, 1, slots, slots)
    with pytest.raises(RuntimeError):
        fastmem.temporal_linkage(link, row, row, row[:, :0], backend="cpp")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 70), read_heads=st.integers(0, 9), write_heads=st.integers(0, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, read_heads, write_heads, seed):
    suite = TestTemporalLinkage()
    values = cases.make(batch, slots, read_heads, write_heads, dtype=torch.float64, seed=seed)
    suite.agree(suite.run(values), suite.oracle(values), values)
