"""Every task against its definition, sample by sample and step by step in plain loops."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from fastmem.tasks import (
    AssociativeRecall,
    BlockCopy,
    BlockRecall,
    Copy,
    DynamicNGrams,
    KeyValue,
    LongCopy,
    PrioritySort,
    RepeatCopy,
    bit_errors,
    masked_loss,
    soft_bit_errors,
)
from tests.tasks.laws import follows_its_seed, generator, knows_right_from_wrong

TASKS = [
    Copy(),
    Copy(bits=5, min_length=3, max_length=3, delimiters="end"),
    LongCopy(),
    RepeatCopy(),
    RepeatCopy(8, 1, 10, 1, 10, count="normalised"),
    AssociativeRecall(),
    AssociativeRecall(bits=2, item_length=1, min_items=4, max_items=4),
    DynamicNGrams(),
    DynamicNGrams(context=2, length=9),
    PrioritySort(),
    PrioritySort(3, 4, 4),
    BlockCopy(),
    BlockCopy(min_blocks=1, max_blocks=3),
    BlockRecall(),
    KeyValue(),
    KeyValue(two_way=True),
    KeyValue(bits=6, min_pairs=8, max_pairs=8, two_way=True),
]
every_task = pytest.mark.parametrize("task", TASKS, ids=repr)

Sample = tuple[Tensor, Tensor, Tensor]


def samples(task, count: int = 25) -> list[Sample]:
    """(input, target, mask) of each sample, cut after its last masked step; nothing may come after that."""
    batch = task.sample(count, generator())
    assert batch.input.shape[2] == task.input_size and batch.target.shape[2] == task.output_size
    assert torch.equal(batch.mask, batch.mask.bool().float()), "a mask is 0 or 1"
    assert not (batch.target * (1 - batch.mask).unsqueeze(-1)).any(), "targets lie inside the mask"
    found, ends = [], []
    for b in range(count):
        end = int(batch.mask[:, b].nonzero().max()) + 1
        ends.append(end)
        assert not batch.input[end:, b].any() and not batch.target[end:, b].any()
        found.append((batch.input[:end, b], batch.target[:end, b], batch.mask[:end, b]))
    assert max(ends) == len(batch.mask), "a batch is as long as its longest sample"
    return found


@every_task
def test_a_seed_gives_the_same_batch_in_any_dtype(task):
    follows_its_seed(task)


@every_task
def test_a_perfect_output_has_no_loss_and_no_errors(task):
    knows_right_from_wrong(task)


@pytest.mark.parametrize("task", [task for task in TASKS if isinstance(task, Copy)], ids=repr)
def test_copy(task):
    lengths = set()
    for input, target, mask in samples(task, 60):
        length = int(mask.sum())
        lengths.add(length)
        first = 1 if task.delimiters == "both" else 0
        vectors = input[first : first + length, : task.bits]
        expected = torch.zeros_like(input)
        expected[first : first + length, : task.bits] = vectors
        if first:
            expected[0, task.bits] = 1
        expected[first + length, -1] = 1
        assert torch.equal(input, expected)
        assert torch.equal(target[first + length + 1 :], vectors)
        assert len(mask) == first + 2 * length + 1 and mask[-length:].all()
    assert min(lengths) >= task.min_length and max(lengths) <= task.max_length
    assert len(lengths) == 1 if task.min_length == task.max_length else len(lengths) > 10


def test_normalised_count_has_mean_zero_and_deviation_one():
    batch = RepeatCopy(4, 1, 1, 1, 10, count="normalised").sample(20_000, generator())
    count = batch.input[2, :, 5]
    assert abs(count.mean()) < 0.03 and abs(count.std() - 1) < 0.02
    assert torch.unique(count).numel() == 10
    assert not RepeatCopy(min_repeats=2, max_repeats=2, count="normalised").sample(3).input[..., 5].any()


@pytest.mark.parametrize("task", [task for task in TASKS if isinstance(task, AssociativeRecall)], ids=repr)
def test_associative_recall(task):
    long, bits = task.item_length, task.bits
    queries = set()
    for input, target, mask in samples(task):
        count = int(input[:, bits].sum())
        assert task.min_items <= count <= task.max_items
        items = [input[i * (long + 1) + 1 : (i + 1) * (long + 1), :bits] for i in range(count)]
        at = count * (long + 1)
        query = input[at + 1 : at + 1 + long, :bits]
        expected = torch.zeros_like(input)
        for i, item in enumerate(items):
            expected[i * (long + 1), bits] = 1
            expected[i * (long + 1) + 1 : (i + 1) * (long + 1), :bits] = item
        expected[at, bits + 1] = expected[at + long + 1, bits + 1] = 1
        expected[at + 1 : at + 1 + long, :bits] = query
        assert torch.equal(input, expected)
        assert len(input) == at + 2 * long + 2 and torch.equal(mask, (torch.arange(len(mask)) >= at + long + 2).float())
        matches = [i for i in range(count - 1) if torch.equal(items[i], query)]
        queries.update(matches)
        assert any(torch.equal(items[i + 1], target[-long:]) for i in matches)
    assert len(queries) > 2


def test_dynamic_ngrams():
    task = DynamicNGrams(context=2, length=3000)
    batch = task.sample(20, generator())
    assert torch.equal(batch.input[1:], batch.target[:-1])
    assert torch.equal(batch.mask[:, 0], (torch.arange(2999) >= 1).float())
    bits = torch.cat([batch.input[:1], batch.target])[..., 0]
    index = 2 * bits[:-2] + bits[1:-1]
    for context in range(4):
        chance = torch.stack([bits[2:, b][index[:, b] == context].mean() for b in range(20)]).nan_to_num(0.5)
        assert chance.min() < 0.15 and chance.max() > 0.85, "the arcsine distribution favours its ends"
    optimal, fair = task.optimal_loss(batch), masked_loss(torch.zeros_like(batch.target), batch)
    assert 0.4 * fair < optimal < 0.75 * fair  # Beta(1/2, 1/2): 0.557 of a bit each
    published = DynamicNGrams()
    batch = published.sample(2000, generator())
    costs = published.costs(torch.zeros_like(batch.target), batch)
    assert 128 < costs.optimal < 136  # about 131 to 132 bits a sequence in Graves et al.
    torch.testing.assert_close(costs.model, torch.tensor(195.0))  # a bit for each that the table decides


@pytest.mark.parametrize("task", [task for task in TASKS if isinstance(task, PrioritySort)], ids=repr)
def test_priority_sort(task):
    for input, target, mask in samples(task):
        vectors, priority = input[: task.items, : task.bits], input[: task.items, task.bits]
        assert priority.abs().max() <= 1 and priority.unique().numel() == task.items
        ranked = sorted(range(task.items), key=lambda i: -float(priority[i]))[: task.outputs]
        assert torch.equal(target[task.items :], vectors[ranked])
        assert not input[task.items :].any()
        assert torch.equal(mask, (torch.arange(task.items + task.outputs) >= task.items).float())


@pytest.mark.parametrize("task", [task for task in TASKS if isinstance(task, BlockCopy)], ids=repr)
def test_block_copy(task):
    counts = set()
    for input, target, mask in samples(task):
        step = blocks = 0
        while step < len(input):
            length = int(input[step:, task.bits].nonzero()[0])
            assert task.min_length <= length <= task.max_length
            vectors, flag = input[step : step + length, : task.bits], step + length
            assert not input[step:flag, task.bits].any() and not input[flag, : task.bits].any()
            assert mask[step : flag + length + 2].all() and not target[step : flag + 1].any()
            assert not input[flag + 1 : flag + length + 2].any()
            assert torch.equal(target[flag + 1 : flag + 1 + length, : task.bits], vectors)
            assert not target[flag + 1 : flag + 1 + length, task.bits].any()
            assert target[flag + 1 + length].tolist() == [0.0] * task.bits + [1.0]
            step, blocks = flag + length + 2, blocks + 1
        assert task.min_blocks <= blocks <= task.max_blocks
        counts.add(blocks)
    assert len(counts) > 2


def test_block_recall():
    task = BlockRecall(bits=6, block_length=2, max_blocks=5)
    for input, target, mask in samples(task):
        ends = input[:, 7].nonzero()[:, 0].tolist()
        assert len(ends) == 2 and ends[1] == ends[0] + 3
        count = (ends[0] + 1) // 3
        assert input[:, 6].nonzero()[:, 0].tolist() == [3 * i + 2 for i in range(count - 1)]
        blocks = [input[3 * i : 3 * i + 2, :6] for i in range(count)]
        query = input[ends[0] + 1 : ends[0] + 3, :6]
        assert mask.all() and len(mask) == ends[1] + 3
        assert not target[:-2].any() and not target[:, 6:].any()
        answer = target[-2:, :6]
        assert any(torch.equal(query, blocks[i]) and torch.equal(answer, blocks[i + 1]) for i in range(count - 1))


@pytest.mark.parametrize("task", [task for task in TASKS if isinstance(task, KeyValue)], ids=repr)
def test_key_value(task):
    bits, half, rounds = task.bits, task.bits // 2, 2 if task.two_way else 1
    assert (task.input_size, task.output_size) == (bits + rounds, half)
    for input, target, mask in samples(task):
        pairs = len(input) // (rounds + 1) - 1
        assert len(input) == (rounds + 1) * (pairs + 1) and mask.all()
        assert task.min_pairs <= pairs <= task.max_pairs
        flags = torch.zeros(len(input), rounds)
        flags[[pairs, -1], 0] = 1
        flags[[2 * pairs + 1, -1], rounds - 1] = 1
        assert torch.equal(input[:, bits:], flags)
        shown = sorted((row[:half], row[half:bits]) for row in input[:pairs].tolist())
        assert all(first[0] != second[0] for first, second in pairwise(shown)), "keys are unique"
        assert not input[pairs:, half:bits].any(), "what is asked by lies on the channels of the keys"
        assert not target[: pairs + 1].any() and not target[flags.any(1)].any()
        for turn in range(1, rounds + 1):
            asked = slice(turn * (pairs + 1), turn * (pairs + 1) + pairs)
            answers = [*zip(input[asked, :half].tolist(), target[asked].tolist(), strict=True)]
            assert sorted(answers if turn == 1 else [(key, value) for value, key in answers]) == shown


def test_values_of_key_value_may_repeat():
    values = KeyValue(bits=4, min_pairs=4, max_pairs=4, two_way=True).sample(50, generator()).input[:4, :, 2:4]
    assert any(len(sample.unique(dim=0)) < 4 for sample in values.unbind(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Copy(bits=0), "bits: expected a positive integer, got 0"),
        (lambda: Copy(min_length=3, max_length=2), "min_length, max_length: expected 1 <= min <= max, got 3 and 2"),
        (lambda: Copy(delimiters="none"), "delimiters: expected one of both, end, got 'none'"),
        (lambda: RepeatCopy(count="raw"), "count: expected one of tenths, normalised, got 'raw'"),
        (lambda: AssociativeRecall(min_items=1), "min_items, max_items: expected 2 <= min <= max, got 1 and 6"),
        (lambda: AssociativeRecall(item_length=0), "item_length: expected a positive integer, got 0"),
        (lambda: DynamicNGrams(context=0), "context: expected a positive integer, got 0"),
        (lambda: DynamicNGrams(length=5), "length: expected more than the context of 5, got 5"),
        (lambda: PrioritySort(items=3), "outputs: expected 1 to 3 of the items, got 16"),
        (lambda: BlockCopy(min_blocks=0), "min_blocks: expected a positive integer, got 0"),
        (lambda: BlockRecall(min_blocks=1), "min_blocks, max_blocks: expected 2 <= min <= max, got 1 and 16"),
        (lambda: Copy(bits="8"), "bits: expected a positive integer, got '8'"),
        (lambda: Copy(bits=True), "bits: expected a positive integer, got True"),
        (lambda: Copy(max_length=2.5), r"max_length: expected a positive integer, got 2\.5"),
        (lambda: Copy().sample(-1), "batch_size: expected an integer of at least 0, got -1"),
        (lambda: Copy().sample(2.5), r"batch_size: expected an integer of at least 0, got 2\.5"),
        (lambda: Copy().lesson(1.5), r"level: expected 1 to 20, got 1\.5"),
        (lambda: RepeatCopy(count_range=5), "count_range: expected two integers, 1 <= low <= high, got 5"),
        (lambda: RepeatCopy(count_range=(1, 2, 3)), r"count_range: expected two integers, .*, got \(1, 2, 3\)"),
        (lambda: RepeatCopy(count_range=(3, 2)), r"count_range: expected two integers, .*, got \(3, 2\)"),
        (lambda: RepeatCopy(count_range=(1.5, 2)), r"count_range: expected two integers, .*, got \(1\.5, 2\)"),
        (lambda: PrioritySort(items=-3, outputs=-3), "items: expected a positive integer, got -3"),
        (lambda: KeyValue(bits=5), "bits: expected a positive even integer, got 5"),
        (lambda: KeyValue(bits=4, max_pairs=5), "max_pairs: expected at most 4 unique keys, got 5"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("function", [masked_loss, bit_errors, soft_bit_errors])
def test_an_output_of_another_shape_is_an_error(function):
    batch = Copy().sample(2)
    for output in (batch.target[..., :1], batch.target[0, 0], batch.target[1:]):
        with pytest.raises(ValueError, match=r"output: expected shape \[.*\], got \["):
            function(output, batch)


def test_sizes_may_be_integers_of_numpy():
    task = Copy(bits=np.int64(3), max_length=np.int32(2))
    assert task == Copy(bits=3, max_length=2) and type(task.bits) is int
    assert task.sample(np.int64(4)).input.shape[1:] == (4, 5)
    assert RepeatCopy(count_range=[np.int64(1), 3]).count_range == (1, 3)
