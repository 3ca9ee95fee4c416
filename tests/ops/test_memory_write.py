import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastmem
from fastmem.reference import memory_write as reference
from tests.cases import memory_write as cases
from tests.helpers import assert_close
from tests.ops.suite import OpSuite


class TestMemoryWrite(OpSuite):
    op = staticmethod(fastmem.memory_write)
    reference = reference
    cases = cases
    differentiable_outputs = 1
    batched = ("memory", "write_weights", "erase", "values", "retention")
    strided = "memory"


BACKENDS = pytest.mark.parametrize("backend", ["reference", "cpp"])


@BACKENDS
def test_a_sharp_write_replaces_its_row_exactly_and_leaves_the_others(backend):
    values = cases.make(slots=9)
    values["write_weights"] = torch.nn.functional.one_hot(torch.tensor([[3], [5]]), 9).float()
    values["erase"] = torch.ones_like(values["erase"])
    expected = values["memory"].clone()
    for sample, slot in enumerate((3, 5)):
        expected[sample, slot] = values["values"][sample, 0]
    assert torch.equal(fastmem.memory_write(**values, backend=backend), expected)


@BACKENDS
def test_closed_gates_leave_the_memory(backend):
    values = cases.make(write_heads=2)
    closed = {**values, "write_weights": torch.zeros_like(values["write_weights"])}
    assert torch.equal(fastmem.memory_write(**closed, backend=backend), values["memory"])
    closed = {**values, "erase": torch.zeros(2, 2, 12), "values": torch.zeros(2, 2, 12)}
    assert torch.equal(fastmem.memory_write(**closed, backend=backend), values["memory"])


@BACKENDS
def test_gradient_where_two_heads_erase_everything(backend):
    """Every product over the heads is zero, so a division by a factor would show."""
    suite = TestMemoryWrite()
    values = cases.make(slots=5, word=3, write_heads=3, retention=True, dtype=torch.float64)
    values["write_weights"][:, :2, 0] = 1
    values["erase"][:, :2] = 1
    values["retention"][:, 1] = 0
    actual = suite.run(values, backend)
    assert all(gradient.isfinite().all() for gradient in actual[1])
    suite.agree(actual, suite.oracle(values), values)


def test_no_retention_means_all_is_kept():
    values = cases.make(write_heads=2)
    ones = {**values, "retention": torch.ones(2, 16)}
    assert torch.equal(fastmem.memory_write(**values), fastmem.memory_write(**ones))


def test_slot_permutation_permutes_the_memory():
    values = cases.make(slots=17, write_heads=2, retention=True, dtype=torch.float64)
    order = torch.randperm(17, generator=torch.Generator().manual_seed(0))
    permuted = {
        **values,
        "memory": values["memory"][:, order],
        "write_weights": values["write_weights"][..., order],
        "retention": values["retention"][:, order],
    }
    assert torch.equal(fastmem.memory_write(**permuted), fastmem.memory_write(**values)[:, order])


def test_the_order_of_the_heads_does_not_matter():
    values = cases.make(write_heads=3, retention=True, dtype=torch.float64)
    turned = {**values, **{name: values[name].flip(1) for name in ("write_weights", "erase", "values")}}
    assert_close(fastmem.memory_write(**turned), fastmem.memory_write(**values))


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_place_form_equals_the_functional_one(backend, dtype):
    for case in cases.CASES.values():
        values = cases.make(**case, dtype=dtype)
        expected = fastmem.memory_write(**values, backend=backend)
        fastmem.memory_write_(**values, backend=backend)
        assert torch.equal(values["memory"], expected)


def test_in_place_form_writes_a_view():
    values = cases.make(slots=9, retention=True)
    expected = fastmem.memory_write(**values)
    wide = torch.nn.functional.pad(values["memory"], (0, 3, 0, 2), value=7.0)
    fastmem.memory_write_(**{**values, "memory": wide[:, :9, :12]})
    assert torch.equal(wide[:, :9, :12], expected)
    assert (wide[:, 9:] == 7).all() and (wide[..., 12:] == 7).all()


def test_in_place_form_checks_what_it_writes():
    values = cases.make(slots=12, retention=True)
    for wrong in (values["memory"][:1].expand(2, -1, -1), values["memory"].mT, torch.zeros(1, 1, 1).expand(2, 12, 12)):
        with pytest.raises(ValueError, match="memory: expected dense rows and elements that do not overlap"):
            fastmem.memory_write_(**{**values, "memory": wrong})
    for name, other in (("retention", values["memory"][:, 0]), ("values", values["memory"][:, :1])):
        with pytest.raises(ValueError, match=f"memory: expected memory of its own, got memory shared with {name}"):
            fastmem.memory_write_(**{**values, name: other})
    for op in (fastmem.memory_write_, torch.ops.fastmem.memory_write_):
        with pytest.raises(RuntimeError, match="got arguments that require a gradient"):
            op(*{**values, "retention": values["retention"].clone().requires_grad_()}.values())
    with torch.no_grad():
        fastmem.memory_write_(**{**values, "retention": values["retention"].clone().requires_grad_()})
    torch.library.opcheck(torch.ops.fastmem.memory_write_.default, tuple(cases.make(retention=True).values()))
    torch.library.opcheck(torch.ops.fastmem.memory_write_.default, tuple(cases.make().values()))


def test_in_place_form_compiles_without_graph_breaks():
    values, others = cases.make(retention=True), cases.make(retention=True)
    torch._dynamo.reset()
    torch.compile(fastmem.memory_write_, fullgraph=True, backend="aot_eager")(*values.values())
    fastmem.memory_write_(**others)
    assert torch.equal(values["memory"], others["memory"])


@BACKENDS
def test_autograd_notices_what_the_in_place_form_overwrites(backend):
    values = cases.make()
    written = fastmem.memory_write(**{**values, "erase": values["erase"].clone().requires_grad_()})
    with torch.no_grad():
        fastmem.memory_write_(**values, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        written.sum().backward()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), slots=st.integers(0, 70), word=st.integers(0, 40), write_heads=st.integers(0, 4),
    retention=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_sizes(batch, slots, word, write_heads, retention, seed):
    suite = TestMemoryWrite()
    values = cases.make(batch, slots, word, write_heads, retention, dtype=torch.float64, seed=seed)
    suite.agree(suite.run(values), suite.oracle(values), values)


def test_writing_in_place_has_no_derivative():
    memory, *others = list(cases.make(dtype=torch.float64).values())[:4]

    def total(memory):
        fastmem.memory_write_(memory, *others)
        return memory.sum()

    with pytest.raises(NotImplementedError, match="memory_write_: what writes in place has no derivative"):
        torch.func.jvp(total, (memory,), (torch.ones_like(memory),))
