import numpy as np
import pytest
import torch

from bench import recorded
from bench.cases import cases
from bench.peers import dnc_step, dnc_textbook
from bench.record import PLANS


@pytest.mark.parametrize("slots", PLANS)
def test_files_are_small_and_whole(slots):
    path = recorded.FOLDER / f"n{slots}.npz"
    assert path.stat().st_size <= 1.5 * 2**20
    with np.load(path) as file:
        steps, batch, _ = file["hidden"].shape
        assert steps >= max(slots + 60, 200) and batch == PLANS[slots].batch
        assert all(np.isfinite(file[name]).all() for name in ("hidden", "weight", "bias"))


def test_rebuilt_state():
    link, precedence, write_weights, read_weights = recorded.temporal_linkage(batch=24, slots=16)
    assert link.shape == (24, 1, 16, 16) and read_weights.shape == (24, 4, 16)
    assert link.diagonal(dim1=-2, dim2=-1).abs().max() == 0
    for weights in (precedence, write_weights, read_weights, link, link.mT):
        assert weights.min() >= 0 and weights.sum(-1).max() <= 1 + 1e-5
    assert not torch.equal(link[0], link[16])  # the second sixteen are another moment of the run


def test_allocation_alone_fills_the_link_with_subnormal_numbers():
    def subnormal(**options):
        link = recorded.temporal_linkage(batch=4, slots=128, **options)[0]
        return ((link != 0) & (link.abs() < torch.finfo(torch.float32).tiny)).float().mean()

    assert subnormal(allocated=True) > 0.01
    assert subnormal() < 0.01


def test_a_recorded_step_goes_on_as_the_run_did():
    (latest, *_), inputs = recorded.moments(16), recorded.dnc_step(batch=16, slots=16, word=16)
    for actual, expected in zip(dnc_step.textbook(*inputs), latest.after, strict=False):  # and the reads
        assert torch.equal(actual, expected)
    first_head = recorded.dnc_step(batch=16, slots=16, word=16, read_heads=1)
    fields, whole = (dnc_textbook.parse(x[0], x[-1].shape[1], 16) for x in (first_head, inputs))
    for name, field in fields._asdict().items():
        assert torch.equal(field, getattr(whole, name)[:, : field.shape[1]]), name


def test_a_wrong_word_or_batch_is_refused():
    with pytest.raises(ValueError, match="batch"):
        recorded.temporal_linkage(batch=100, slots=16)
    with pytest.raises(ValueError, match="word"):
        recorded.content_addressing(batch=1, slots=16, word=20)
    with pytest.raises(ValueError, match="word"):
        recorded.dnc_step(batch=1, slots=16, word=20)


def test_every_recorded_case_exists():
    for case in cases(full=True):
        if case.recorded:
            assert case.shape["slots"] in PLANS
            assert case.shape.get("word", PLANS[case.shape["slots"]].word) == PLANS[case.shape["slots"]].word
