import pytest

import fastmem
from tests.nn.networks import NETWORKS
from tests.ops.suite import native


@pytest.fixture(params=["reference", pytest.param("cpp", marks=native)])
def backend(request):
    with fastmem.use_backend(request.param):
        yield request.param


def pytest_generate_tests(metafunc):
    """A test of a `network` runs for each of them, one that also takes `options` for each of its variants."""
    if "network" not in metafunc.fixturenames:
        return
    if "options" in metafunc.fixturenames:
        rows = {
            f"{kind}-{name}": (network, options)
            for kind, network in NETWORKS.items()
            for name, options in network.variants.items()
        }
        metafunc.parametrize(("network", "options"), rows.values(), ids=rows)
    else:
        metafunc.parametrize("network", NETWORKS.values(), ids=NETWORKS)
