import pytest

from bench.timing import threads


@pytest.fixture(autouse=True)
def one_thread():
    """As the benchmark runs: small operations are slower on several threads when the machine is busy."""
    with threads(1):
        yield
