"""A rival is only a rival when it computes the same thing."""

import importlib

import pytest
import torch

import fastmem
from bench import ops
from bench.model import TASK, Trainer
from bench.peers import dnc_step, memory_write, ntm_step, temporal_linkage
from bench.peers.dnc_eager import EagerDNC
from bench.peers.dnc_textbook import TextbookDNC
from tests.helpers import assert_close, converted, run_with_gradients

# `attention` leaves out the 1e-6 that the norm rule adds to the product of norms: 3e-4 of the product at a zero row.
BOUNDS = {("content_read", "attention"): 1e-3}


def tensors(op, **shape):
    made = importlib.import_module(f"tests.cases.{op}").make(dtype=torch.float64, **shape)
    return made, [value for value in made.values() if isinstance(value, torch.Tensor)]


@pytest.mark.parametrize(("op", "rival"), [(op, rival) for op, rivals in ops.RIVALS.items() for rival in rivals])
def test_rival_equals_reference(op, rival):
    made, inputs = tensors(op, batch=3)
    reference = getattr(importlib.import_module(f"fastmem.reference.{op}"), op)
    function = getattr(importlib.import_module(f"bench.peers.{op}"), rival)
    outputs = {
        "temporal_linkage": 4,
        "program_lookup": 2,
        "cached_attention": 2,
        "usage_update": 2,
        "dnc_step": 7,
        "ntm_step": 3,
    }.get(op, 1)
    options = list(made.values())[len(inputs) :]
    expected = run_with_gradients(lambda *leaves: reference(*leaves, *options), inputs, outputs)
    actual = run_with_gradients(function, inputs, outputs)
    bound = BOUNDS.get((op, rival), 1e-12)
    for a, e in zip(actual[0], expected[0], strict=False):  # content_read also gives logsumexp
        assert_close(a, e, bound, rival)
    for a, e in zip(actual[1], expected[1], strict=True):
        assert_close(a, e, bound, rival)


@pytest.mark.parametrize("rival", ["textbook", "fast_eager", "attention"])
def test_shared_bank(rival):
    _, (memory, keys, strengths) = tensors("content_read", shared=True, batch=3, slots=20)
    function = getattr(importlib.import_module("bench.peers.content_read"), rival)
    expected, _ = fastmem.content_read(memory, keys, strengths, backend="reference")
    assert_close(function(memory, keys, strengths), expected, BOUNDS.get(("content_read", rival), 1e-12))


@pytest.mark.parametrize("rival", ["fast_eager_", "lerp_eager_"])
@pytest.mark.parametrize("write_heads", [1, 2])
def test_in_place_rival(rival, write_heads):
    _, inputs = tensors("temporal_linkage", batch=3, write_heads=write_heads)
    link, precedence, forward, backward = temporal_linkage.textbook(*inputs)
    old, before, *weights = (tensor.clone() for tensor in inputs)
    workspace = torch.empty_like(old)
    reads = getattr(temporal_linkage, rival)(old, before, *weights, workspace)
    new = workspace if rival == "lerp_eager_" else old
    for actual, expected in zip((new, before, *reads), (link, precedence, forward, backward), strict=True):
        assert_close(actual, expected)


def test_in_place_rival_of_memory_write():
    _, inputs = tensors("memory_write", batch=3)
    memory, *others = (tensor.clone() for tensor in inputs)
    memory_write.one_head_eager_(memory, *others, torch.empty_like(memory))
    assert_close(memory, memory_write.textbook(*inputs))


def test_in_place_rival_of_dnc_step():
    _, inputs = tensors("dnc_step", batch=3)
    interface, *state = (tensor.clone() for tensor in inputs)
    reads, new_link = torch.empty(3, 2, 8, dtype=torch.float64), torch.empty_like(state[3])
    dnc_step.fast_eager_(*[interface, *state, reads, new_link])
    state[3] = new_link
    for actual, expected in zip((*state, reads), dnc_step.textbook(*inputs), strict=True):
        assert_close(actual, expected)


def test_in_place_rival_of_ntm_step():
    _, inputs = tensors("ntm_step", batch=3, heads="rwrw")
    interface, memory, weights = (tensor.clone() for tensor in inputs)
    reads = torch.empty(3, 2, 8, dtype=torch.float64)
    ntm_step.fast_eager_(interface, memory, weights, reads, torch.empty_like(memory))
    for actual, expected in zip((memory, weights, reads), ntm_step.textbook(*inputs), strict=True):
        assert_close(actual, expected)


@pytest.mark.parametrize("rival", ["textbook", "fast_eager"])
def test_rivals_of_ntm_step_take_several_pairs(rival):
    made, inputs = tensors("ntm_step", heads="rwrwrw")
    interface, memory, weights = inputs
    expected = fastmem.ntm_step(interface, memory, weights, made["heads"], backend="reference")
    for actual, right in zip(getattr(ntm_step, rival)(*inputs), expected, strict=True):
        assert_close(actual, right)


@pytest.mark.parametrize("rival", ["textbook", "fast_eager"])
def test_rivals_of_memory_write_take_several_heads(rival):
    made, inputs = tensors("memory_write", write_heads=3)
    assert_close(getattr(memory_write, rival)(*inputs), fastmem.memory_write(**made, backend="reference"))


@pytest.mark.parametrize("rival", [TextbookDNC, EagerDNC])
def test_eager_dnc_learns_alike(rival):
    """The same parameters and batches give the same losses: the premise of the race of models."""
    torch.manual_seed(0)
    ours = fastmem.nn.DNC(TASK.input_size, 16, 12, 8, 2, output_size=TASK.output_size)
    theirs = rival(TASK.input_size, 16, 12, 8, 2, output_size=TASK.output_size)
    theirs.load_state_dict(ours.state_dict())
    trainers = [Trainer(ours), Trainer(theirs)]
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        batch = TASK.sample(4, generator)
        for trainer in trainers:
            trainer.train(batch)
    assert trainers[0].losses == pytest.approx(trainers[1].losses, rel=1e-4)


@pytest.mark.parametrize("rival", [TextbookDNC, EagerDNC])
def test_eager_dnc_in_float64(rival):
    torch.manual_seed(0)
    ours = fastmem.nn.DNC(6, 16, 12, 8, 2, output_size=5).double()
    theirs = rival(6, 16, 12, 8, 2, 5).double()
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(15, 3, 6, dtype=torch.float64)
    results = []
    for network in (ours, theirs):
        output, _ = network(inputs)
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), list(network.parameters()))))
    assert_close(results[0][0], results[1][0])
    for a, e in zip(results[0][1], results[1][1], strict=True):
        assert_close(a, e)


def test_pypi_dnc_trains():
    pytest.importorskip("dnc")
    from bench.peers.dnc_pypi import PypiDNC

    trainer = Trainer(PypiDNC(TASK.input_size, 16, 12, 8, 2, TASK.output_size))
    trainer.train(TASK.sample(4))
    assert len(trainer.losses) == 1


def test_float32_matches_too():
    _, inputs = tensors("temporal_linkage")
    for actual, expected in zip(
        temporal_linkage.lerp_eager(*converted(inputs, torch.float32)), temporal_linkage.textbook(*inputs), strict=True
    ):
        assert_close(actual.double(), expected, 1e-6)
