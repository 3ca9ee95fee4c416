from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import fastmem
from fastmem.reference import cached_attention as reference
from tests.cases import cached_attention as cases
from tests.helpers import assert_close, instruction_set, isas, threads
from tests.ops.suite import OpSuite, native

INFINITY, NAN = float("inf"), float("nan")


class TestCachedAttention(OpSuite):
    op = staticmethod(fastmem.cached_attention)
    reference = reference
    cases = cases
    differentiable_outputs = 2
    batched = ("query", "keys", "cache", "mask")
    strided = "cache"

    def test_spans_of_more_than_two_billion_elements(self) -> None:
        super().test_spans_of_more_than_two_billion_elements()
        self.strided = "keys"
        super().test_spans_of_more_than_two_billion_elements()


BACKENDS = pytest.mark.parametrize("backend", TestCachedAttention().backends())


def double(**shape: Any) -> dict[str, Any]:
    return cases.make(**shape, dtype=torch.float64)


def test_equals_the_formula_spelled_out():
    values = double(length=5, attention=3, hidden=2)
    query, keys, cache, score_weights, _ = values.values()
    attended, weights = fastmem.cached_attention(**values)
    for b in range(2):
        energies = [sum(score_weights[a] * torch.tanh(query[b, a] + keys[b, j, a]) for a in range(3)) for j in range(5)]
        total = sum(torch.exp(energy) for energy in energies)
        for j in range(5):
            assert_close(weights[b, j], torch.exp(energies[j]) / total)
        assert_close(attended[b], sum(torch.exp(energies[j]) / total * cache[b, j] for j in range(5)))


def test_the_paper_s_projections_and_their_gradients():
    """e_j = v tanh(W h + U d_j + V r) over the cached states d, with every gradient through the projections."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"h": (3, 9), "r": (3, 8), "d": (3, 6, 9), "W": (9, 16), "U": (9, 16), "V": (8, 16), "v": (16,)}
    leaves = {n: torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for n, s in shapes.items()}
    h, r, d, W, U, V, v = leaves.values()
    energies = torch.tanh((h @ W + r @ V).unsqueeze(1) + d @ U) @ v
    expected = torch.einsum("bj,bjh->bh", torch.softmax(energies, -1), d)
    attended, _ = fastmem.cached_attention(h @ W + r @ V, d @ U, d, v)
    assert_close(attended, expected)
    actual = torch.autograd.grad(attended.square().sum(), list(leaves.values()))
    for a, e in zip(actual, torch.autograd.grad(expected.square().sum(), list(leaves.values())), strict=True):
        assert_close(a, e)


@BACKENDS
def test_weights_sum_to_one_where_an_entry_takes_part(backend):
    weights = fastmem.cached_attention(**double(batch=4, length=63, mask=True), backend=backend)[1]
    assert_close(weights.sum(-1), torch.tensor([0.0, 1, 1, 1], dtype=torch.float64), 1e-15)


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_entry_gives_itself(backend, dtype):
    values = cases.make(batch=3, length=1, hidden=95, dtype=dtype)
    attended, weights = fastmem.cached_attention(**values, backend=backend)
    assert torch.equal(weights, torch.ones(3, 1, dtype=dtype))
    assert torch.equal(attended, values["cache"][:, 0])


@BACKENDS
def test_entries_permute(backend):
    values = double(batch=3, length=63, hidden=20, mask=True)
    order = torch.randperm(63, generator=torch.Generator().manual_seed(0))
    permuted = {**values, **{name: values[name][:, order] for name in ("keys", "cache", "mask")}}
    expected, expected_weights = fastmem.cached_attention(**values, backend=backend)
    attended, weights = fastmem.cached_attention(**permuted, backend=backend)
    assert_close(attended, expected)
    assert_close(weights, expected_weights[:, order])


def run_with_upstream(values: dict[str, Any], backend: str, upstream: Tensor) -> tuple[Any, tuple[Tensor, ...]]:
    """Results, and gradients of the four arguments where the weights have an upstream gradient of their own."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in values.items() if name != "mask"}
    attended, weights = fastmem.cached_attention(**leaves, mask=values["mask"], backend=backend)
    loss = attended.square().sum() + (weights * upstream).sum()
    return (attended.detach(), weights.detach()), torch.autograd.grad(loss, list(leaves.values()))


@BACKENDS
@pytest.mark.parametrize("shown", ["first", "last", "scattered", "blocks"])
def test_a_mask_equals_a_shorter_cache(backend, shown):
    """Entries left out hold NaN and infinities; the cache is longer than what one sum takes together."""
    values, entry = double(batch=2, length=150, attention=20, hidden=33), torch.arange(150)
    kept = {"first": entry < 70, "last": entry >= 80, "scattered": entry % 3 > 0, "blocks": entry // 10 % 2 > 0}[shown]
    upstream = torch.linspace(-1, 1, 150, dtype=torch.float64)
    shorter = {**values, **{name: values[name][:, kept] for name in ("keys", "cache")}}
    expected, expected_gradients = run_with_upstream(shorter, backend, upstream[kept])
    values["keys"][:, ~kept], values["cache"][:, ~kept], values["mask"] = NAN, INFINITY, kept.expand(2, -1)
    (attended, weights), (grad_query, grad_keys, grad_cache, grad_score_weights) = run_with_upstream(
        values, backend, upstream
    )
    for by_entry in (weights, grad_keys, grad_cache):
        assert not by_entry[:, ~kept].any()
    actual = attended, weights[:, kept], grad_query, grad_keys[:, kept], grad_cache[:, kept], grad_score_weights
    for a, e in zip(actual, (*expected, *expected_gradients), strict=True):
        assert_close(a, e)


@BACKENDS
def test_a_sample_without_entries_is_zero_whatever_it_holds(backend):
    values = double(batch=3, length=9, mask=True)  # none of the entries of sample 0 takes part
    clean = TestCachedAttention().run(values, backend)
    for name in ("query", "keys", "cache"):
        values[name][0] = NAN
    outputs, gradients = TestCachedAttention().run(values, backend)
    for a, e in zip((*outputs, *gradients), (*clean[0], *clean[1]), strict=True):
        assert_close(a, e)
    for by_sample in (*outputs, *gradients[:3]):
        assert not by_sample[0].any()


@BACKENDS
@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_minus_infinity_give_zero(backend, masked):
    """Score weights that are infinite: samples whose tanh is positive, negative, and of both signs."""
    values = double(batch=3, length=3, attention=2, mask=masked)
    if masked:
        values["mask"][:] = torch.tensor([True, False, True])
        values["keys"][:, 1] = NAN
    values["query"], values["keys"][:] = torch.zeros(3, 2, dtype=torch.float64), 1.0
    values["keys"][1] = -1.0
    values["keys"][2, 2] = -1.0
    values["score_weights"][0] = -INFINITY
    (attended, weights), gradients = TestCachedAttention().run(values, backend)
    assert not attended[0].any() and not weights[0].any()
    assert attended[1:].isnan().all() and weights[1:].isnan().all()
    for gradient in gradients[:3]:
        assert not gradient[0].any()


@BACKENDS
def test_infinite_keys_and_queries_saturate(backend):
    values = double(batch=3, length=5)
    values["keys"][0, 1, 2], values["keys"][1, :, 3], values["query"][2, 4] = INFINITY, -INFINITY, INFINITY
    suite = TestCachedAttention()
    actual, expected = suite.run(values, backend), suite.oracle(values)
    suite.agree(actual, expected, values)
    assert all(result.isfinite().all() for result in (*actual[0], *actual[1]))


@BACKENDS
def test_a_score_that_overflows_to_minus_infinity_leaves_the_others(backend):
    largest = torch.finfo(torch.float64).max
    values = double(batch=1, length=2, attention=2)
    values["query"], values["keys"][:] = torch.zeros(1, 2, dtype=torch.float64), torch.tensor([[[50.0], [0.0]]])
    values["score_weights"][:] = -largest
    (attended, weights), gradients = TestCachedAttention().run(values, backend)
    assert torch.equal(weights, torch.tensor([[0.0, 1.0]], dtype=torch.float64))
    assert torch.equal(attended, values["cache"][:, 1])
    assert all(gradient.isfinite().all() for gradient in gradients)


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_history_is_read_in_place(dtype):
    """The last entries of time-major histories, sample and time swapped: no copy, and the same bits."""
    keys, cache = (cases.make(batch=9, length=3, **{name: 20}, dtype=dtype)[key]
                   for name, key in (("attention", "keys"), ("hidden", "cache")))  # fmt: skip
    values = {**cases.make(batch=3, length=4, attention=20, hidden=20, dtype=dtype)}
    swapped = {**values, "keys": keys[5:].transpose(0, 1), "cache": cache[5:].transpose(0, 1)}
    dense = {**swapped, "keys": swapped["keys"].contiguous(), "cache": swapped["cache"].contiguous()}
    suite = TestCachedAttention()
    with profile(activities=[ProfilerActivity.CPU]) as watched:
        outputs = fastmem.cached_attention(**swapped, backend="cpp")
    assert not any(event.name in ("aten::clone", "aten::contiguous", "aten::copy_") for event in watched.events())
    for a, e in zip(outputs, fastmem.cached_attention(**dense, backend="cpp"), strict=True):
        assert torch.equal(a, e)
    actual, expected = suite.run(swapped, "cpp"), suite.run(dense, "cpp")
    for a, e in zip((*actual[0], *actual[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(a, e)


@native
@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_and_threads_do_not_see_each_other(isa, dtype):
    """Cut by samples or by threads, results and the gradients of samples keep every bit."""
    suite, values = TestCachedAttention(), cases.make(70, 10, 20, 95, mask=True, dtype=dtype)
    with instruction_set(isa):
        with threads(1):
            whole = suite.run(values)
        with threads(2):
            shared = suite.run(values)
        parts = [fastmem.cached_attention(**{**values, **{n: values[n][rows] for n in suite.batched}})
                 for rows in (slice(0, 1), slice(1, 6), slice(6, 23), slice(23, 70))]  # fmt: skip
    for a, e in zip((*shared[0], *shared[1]), (*whole[0], *whole[1]), strict=True):
        assert torch.equal(a, e)
    for part, e in zip(zip(*parts, strict=True), whole[0], strict=True):
        assert torch.equal(torch.cat(part), e)


def test_the_mask_is_checked():
    values = cases.make(mask=True)
    with pytest.raises(TypeError, match=r"mask: expected dtype torch\.bool, got torch\.float32"):
        fastmem.cached_attention(**{**values, "mask": values["mask"].float()})
    with pytest.raises(ValueError, match=r"mask: expected shape \[B=2, L=7\], got \[1, 7\]"):
        fastmem.cached_attention(**{**values, "mask": values["mask"][:1]})
    with pytest.raises(ValueError, match="mask: expected device cpu, that of query, got meta"):
        fastmem.cached_attention(**{**values, "mask": values["mask"].to("meta")})


def test_vmap_over_shared_score_weights_is_refused():
    values = cases.make()
    tensors = [*values.values()][:4]
    with pytest.raises(NotImplementedError, match="cached_attention: vmap over argument 3"):
        torch.vmap(fastmem.cached_attention)(*(torch.stack([tensor] * 2) for tensor in tensors))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 4), length=st.integers(0, 140), attention=st.integers(0, 40), hidden=st.integers(0, 40),
    mask=st.booleans(), isa=st.sampled_from(isas() or ["none"]), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, length, attention, hidden, mask, isa, seed):
    suite = TestCachedAttention()
    values = double(batch=batch, length=length, attention=attention, hidden=hidden, mask=mask, seed=seed)
    expected = suite.oracle(values)
    if isa == "none":
        return suite.agree(suite.run(values), expected, values)
    with instruction_set(isa):
        suite.agree(suite.run(values), expected, values)
