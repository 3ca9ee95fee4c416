"""Special scores, masks and laws of the references."""

from typing import Any

import pytest
import torch
from torch import Tensor

from fastmem.reference.allocation import allocation
from fastmem.reference.content_addressing import content_addressing, content_addressing_backward
from fastmem.reference.content_read import content_read, content_read_backward
from fastmem.reference.program_lookup import program_lookup
from fastmem.reference.temporal_linkage import temporal_linkage, temporal_linkage_
from tests.cases import content_addressing as cases
from tests.cases import content_read as read_cases
from tests.cases import program_lookup as program_cases
from tests.cases import temporal_linkage as linkage_cases
from tests.cases.content_addressing import DEFAULT_EPS

NORMS = ["inner", "outer", "rsqrt", "clamp", "width"]
INFINITY = float("inf")
NAN = float("nan")


def both_gradients(inputs: dict[str, Any], grad_seed: int = 3) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Weights, reads, logsumexp; the gradients of weights and of reads, by autograd and by the closed form."""
    names = ("memory", "keys", "strengths")
    inputs = {name: value.detach().requires_grad_() if name in names else value for name, value in inputs.items()}
    weights = content_addressing(*inputs.values())
    reads, logsumexp = content_read(*inputs.values())
    torch.manual_seed(grad_seed)
    gradients = []
    for output in (weights, reads):
        grad = torch.randn_like(output)
        autograd = torch.autograd.grad(output, [inputs[name] for name in names], grad, retain_graph=True)
        saved: list[Any] = [value.detach() if isinstance(value, Tensor) else value for value in inputs.values()]
        saved.append([True, True, True, False])
        if output is weights:
            closed = content_addressing_backward(*[grad, weights.detach(), *saved])
        else:
            closed = content_read_backward(*[grad, reads.detach(), logsumexp, *saved])
        gradients += [list(autograd), list(closed[:3])]
    return [weights.detach(), reads.detach(), logsumexp], gradients


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_at_zero_rows_and_zero_keys_follows_the_table(norm):
    inputs = cases.make(slots=6, norm=norm, dtype=torch.float64)
    inputs["keys"][:, 0] = 0
    _, gradients = both_gradients(inputs)
    for autograd, closed in zip(gradients[::2], gradients[1::2], strict=True):
        for a, b in zip(autograd, closed, strict=True):
            assert a.isfinite().all()
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_at_a_zero_row_by_hand(norm):
    """One key, a zero row 0 and a row 1: d score_0 / d row_0 = s k / (a length(0) + delta), and the length is flat."""
    eps = DEFAULT_EPS[norm]
    memory = torch.tensor([[[0.0, 0.0], [0.6, 0.8]]], dtype=torch.float64, requires_grad=True)
    key = torch.tensor([[[3.0, 4.0]]], dtype=torch.float64)
    weights = content_addressing(memory, key, torch.ones(1, 1, dtype=torch.float64), None, None, norm, eps)
    a, b = {
        "inner": ((25 + eps) ** 0.5, eps**0.5),
        "outer": (5.0, 0.0),
        "rsqrt": (5.0, eps**0.5),
        "clamp": (5.0, eps),
        "width": (2 * (5.0 + eps), eps),
    }[norm]
    delta = eps if norm in ("inner", "outer", "width") else 0.0
    slope = (weights[0, 0, 0] * weights[0, 0, 1] / (a * b + delta)).item()
    (gradient,) = torch.autograd.grad(weights[0, 0, 0], memory)
    torch.testing.assert_close(gradient[0, 0], slope * key[0, 0], rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_norms_that_torch_has(scale):
    """clamp is torch's cosine similarity; rsqrt is the product of the two vectors over their floored lengths."""
    inputs = cases.make(slots=9, norm="clamp", dtype=torch.float64)
    inputs["memory"] = inputs["memory"] * scale
    memory, keys, strengths = inputs["memory"], inputs["keys"], inputs["strengths"]
    cosine = torch.nn.functional.cosine_similarity(keys.unsqueeze(2), memory.unsqueeze(1), dim=-1, eps=1e-8)
    expected = torch.softmax(strengths.unsqueeze(-1) * cosine, -1)
    torch.testing.assert_close(content_addressing(*inputs.values()), expected, rtol=1e-13, atol=0)
    key, row = (x * x.square().sum(-1, keepdim=True).clamp(min=1e-12).rsqrt() for x in (keys, memory))
    expected = torch.softmax(strengths.unsqueeze(-1) * (key @ row.mT), -1)
    actual = content_addressing(memory, keys, strengths, None, None, "rsqrt", 1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("strength", [INFINITY, -INFINITY])
def test_a_row_without_a_finite_score_is_zero_in_value_and_gradient(strength):
    inputs = cases.make(slots=5, word=3, dtype=torch.float64)
    # Every cosine of head 1 has the sign that makes its scores -inf.
    inputs["memory"] = inputs["memory"].abs() + 0.1
    inputs["keys"][:, 1] = -inputs["keys"][:, 1].abs() if strength > 0 else inputs["keys"][:, 1].abs()
    inputs["strengths"][:, 1] = strength
    (weights, reads, logsumexp), gradients = both_gradients(inputs)
    assert (weights[:, 1] == 0).all()
    assert (reads[:, 1] == 0).all()
    assert (logsumexp[:, 1] == -INFINITY).all()
    for grad_memory, grad_keys, grad_strengths in gradients:
        assert grad_memory.isfinite().all()
        assert (grad_keys[:, 1] == 0).all()
        assert (grad_strengths[:, 1] == 0).all()
        assert (grad_keys[:, 0] != 0).any()


def test_all_masked_slots_give_zero_even_with_nan_inside():
    inputs = cases.make(batch=3, slots=5, word=3, key_mask=True, slot_mask=True, dtype=torch.float64)
    inputs["memory"][0] = NAN
    inputs["keys"][0, 0] = NAN
    (weights, reads, logsumexp), gradients = both_gradients(inputs)
    assert (weights[0] == 0).all()
    assert (reads[0] == 0).all()
    assert (logsumexp[0] == -INFINITY).all()
    for grads in gradients:
        for gradient in grads:
            assert (gradient[0] == 0).all()
            assert gradient.isfinite().all()


def test_a_masked_slot_is_ignored_whatever_it_holds():
    inputs = cases.make(batch=3, slots=9, slot_mask=True, dtype=torch.float64)
    spoiled = {**inputs, "memory": inputs["memory"].clone()}
    spoiled["memory"][~inputs["slot_mask"]] = torch.tensor(NAN, dtype=torch.float64)
    outputs, gradients = both_gradients(inputs)
    spoiled_outputs, spoiled_gradients = both_gradients(spoiled)
    torch.testing.assert_close(outputs, spoiled_outputs, rtol=0, atol=0)
    torch.testing.assert_close(gradients, spoiled_gradients, rtol=0, atol=0)
    for grads in gradients:
        assert (grads[0][~inputs["slot_mask"]] == 0).all()
    kept = inputs["slot_mask"][1]
    alone = {**inputs, "memory": inputs["memory"][1:2, kept], "slot_mask": None}
    alone |= {name: inputs[name][1:2] for name in ("keys", "strengths")}
    torch.testing.assert_close(outputs[0][1:2, :, kept], content_addressing(*alone.values()), rtol=1e-13, atol=0)


@pytest.mark.parametrize("strength", [INFINITY, NAN])
def test_a_bad_score_stays_in_its_row(strength):
    inputs = cases.make(batch=3, slots=7, slot_mask=True, dtype=torch.float64)
    inputs["keys"][1, 2] = inputs["memory"][1][inputs["slot_mask"][1]][-1]
    inputs["strengths"][1, 2] = strength
    (weights, reads, logsumexp), gradients = both_gradients(inputs)
    bad = torch.zeros(3, 4, dtype=torch.bool)
    bad[1, 2] = True
    assert weights[bad].isnan().all()
    assert weights[~bad].isfinite().all()
    assert reads[bad].isnan().all()
    assert reads[~bad].isfinite().all()
    assert logsumexp[bad].isnan().all()
    for grad_memory, grad_keys, grad_strengths in gradients:
        assert grad_memory[[0, 2]].isfinite().all()
        assert (grad_memory[1][~inputs["slot_mask"][1]] == 0).all()
        assert grad_keys[~bad].isfinite().all()
        assert grad_strengths[~bad].isfinite().all()


def test_nan_in_a_program_query_stays_in_its_sample():
    inputs = program_cases.make(dtype=torch.float64)
    inputs["query"][1] = NAN
    outputs, program_weights = program_lookup(*inputs.values())
    rest = torch.tensor([0, 2, 3])
    assert outputs[1].isnan().all()
    assert program_weights[1].isnan().all()
    assert outputs[rest].isfinite().all()


@pytest.mark.parametrize("norm", NORMS)
def test_weights_sum_to_one(norm):
    weights = content_addressing(*cases.make(slots=63, norm=norm, dtype=torch.float64).values())
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, dtype=torch.float64), rtol=1e-14, atol=0)


def test_slots_permute_and_samples_permute():
    inputs = cases.make(batch=3, slots=9, key_mask=True, slot_mask=True, dtype=torch.float64)
    slots, samples = torch.randperm(9), torch.randperm(3)
    moved = {**inputs, "memory": inputs["memory"][:, slots], "slot_mask": inputs["slot_mask"][:, slots]}
    weights = content_addressing(*inputs.values())
    torch.testing.assert_close(content_addressing(*moved.values()), weights[..., slots], rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(content_read(*moved.values()), content_read(*inputs.values()), rtol=1e-13, atol=1e-15)
    moved = {name: value[samples] if isinstance(value, Tensor) else value for name, value in inputs.items()}
    torch.testing.assert_close(content_addressing(*moved.values()), weights[samples], rtol=1e-13, atol=1e-15)


def test_read_is_the_weighted_mean_and_a_shared_bank_equals_its_copies():
    inputs = read_cases.make(shared=True, batch=3, key_mask=True, slot_mask=True, dtype=torch.float64)
    reads, logsumexp = content_read(*inputs.values())
    copies = {**inputs, "memory": inputs["memory"].expand(3, -1, -1), "slot_mask": inputs["slot_mask"].expand(3, -1)}
    torch.testing.assert_close(content_addressing(*copies.values()) @ copies["memory"], reads, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(content_read(*copies.values()), (reads, logsumexp), rtol=1e-13, atol=1e-15)
    grad = torch.randn_like(reads)
    shared = content_read_backward(*[grad, reads, logsumexp, *inputs.values(), [True] * 4])
    copied = content_read_backward(*[grad, reads, logsumexp, *copies.values(), [True] * 4])
    torch.testing.assert_close(shared[0], copied[0].sum(0, keepdim=True), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(shared[1:], copied[1:], rtol=1e-12, atol=1e-14)


def test_a_mask_per_sample_on_a_shared_bank():
    inputs = read_cases.make(shared=True, batch=3, slots=9, dtype=torch.float64)
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0], mask[2] = False, True
    inputs["slot_mask"] = mask
    copies = {**inputs, "memory": inputs["memory"].expand(3, -1, -1)}
    outputs = content_read(*inputs.values())
    torch.testing.assert_close(content_read(*copies.values()), outputs, rtol=1e-13, atol=1e-15)
    grad = torch.randn_like(outputs[0])
    shared = content_read_backward(*[grad, *outputs, *inputs.values(), [True] * 4])
    copied = content_read_backward(*[grad, *outputs, *copies.values(), [True] * 4])
    torch.testing.assert_close(shared[0], copied[0].sum(0, keepdim=True), rtol=1e-12, atol=1e-14)


def test_linkage_in_place_equals_functional_and_leaves_inputs_alone():
    inputs = linkage_cases.make(**linkage_cases.CASES["small"], dtype=torch.float64)
    before = {name: value.clone() for name, value in inputs.items()}
    link, precedence, forward, backward = temporal_linkage(*inputs.values())
    torch.testing.assert_close(inputs, before, rtol=0, atol=0)
    assert (link.diagonal(dim1=-2, dim2=-1) == 0).all()
    reads = temporal_linkage_(*inputs.values())
    torch.testing.assert_close(reads, (forward, backward), rtol=1e-14, atol=1e-16)
    torch.testing.assert_close((inputs["link"], inputs["precedence"]), (link, precedence), rtol=1e-14, atol=1e-16)


def test_link_sums_stay_below_one():
    inputs = linkage_cases.make(slots=9, dtype=torch.float64)
    for seed in range(20):
        link, precedence, *_ = temporal_linkage(*inputs.values())
        inputs |= {"link": link, "precedence": precedence}
        inputs["write_weights"] = linkage_cases.make(slots=9, dtype=torch.float64, seed=seed)["write_weights"]
    assert link.min() >= 0
    assert link.sum(-1).max() <= 1 + 1e-12
    assert link.sum(-2).max() <= 1 + 1e-12
    assert precedence.sum(-1).max() <= 1 + 1e-12


def test_allocation_sums_to_one_less_the_product_of_usage_and_ties_go_to_the_lowest_slot():
    usage = torch.rand(2, 9, dtype=torch.float64)
    used = 1e-6 + (1 - 1e-6) * usage
    torch.testing.assert_close(allocation(usage, None, 1e-6).sum(-1).squeeze(1), 1 - used.prod(-1), rtol=1e-13, atol=0)
    weights = allocation(torch.tensor([[0.5, 0.0, 0.5, 0.0]]), None, 1e-6)[0, 0]
    assert weights.argsort(descending=True).tolist() == [1, 3, 0, 2]
