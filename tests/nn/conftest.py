import pytest

import fastmem
from tests.nn.networks import IN_ONE_OP, NETWORKS
from tests.ops.suite import has_cpp, native

CHOICE = "fastmem.nn._network.of_a_module"  # what a module asks whether whole sequences run in one op


@pytest.fixture
def by_steps(monkeypatch):
    """Sequences run step by step."""
    monkeypatch.setattr(CHOICE, lambda stem, inputs: (None, "for a test"))


@pytest.fixture(params=["reference", "cpp"])
def in_one_op(request, monkeypatch):
    """Sequences run in one op where they can."""
    if request.param == "cpp" and not has_cpp("dnc_sequence"):
        pytest.skip("the C++ extension has no dnc_sequence")
    monkeypatch.setattr(CHOICE, lambda stem, inputs: (request.param, "for a test"))
    with fastmem.use_backend(request.param):
        yield request.param


@pytest.fixture(params=["reference", pytest.param("cpp", marks=native)])
def backend(request):
    with fastmem.use_backend(request.param):
        yield request.param


def pytest_generate_tests(metafunc):
    """A test of a `network` runs for each of them, one that also takes `options` for each of its variants."""
    if "network" not in metafunc.fixturenames:
        return
    networks = IN_ONE_OP if "in_one_op" in metafunc.fixturenames else NETWORKS
    if "options" in metafunc.fixturenames:
        rows = {
            f"{kind}-{name}": (network, options)
            for kind, network in networks.items()
            for name, options in network.variants.items()
        }
        metafunc.parametrize(("network", "options"), rows.values(), ids=rows)
    else:
        metafunc.parametrize("network", networks.values(), ids=networks)
