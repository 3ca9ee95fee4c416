import os
from typing import Any

import pytest
import torch

import fastmem
from tests.helpers import threads


def pytest_generate_tests(metafunc):
    """Tests of an OpSuite run over the cases of its op; `small_case` leaves out the large ones."""
    cases = getattr(metafunc.cls, "cases", None)
    if cases is None:
        return
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", list(cases.CASES))
    if "small_case" in metafunc.fixturenames:
        metafunc.parametrize("small_case", cases.INTERPRETED)


def pytest_collection_modifyitems(items):
    """A marked test runs where it can: interpreted kernels and compiled ones need two processes, `gpu` a device."""
    interpreting = os.environ.get("TRITON_INTERPRET") == "1"
    for item in items:
        if "interp" in item.keywords and not interpreting:
            item.add_marker(pytest.mark.skip(reason="runs in a process of its own, with TRITON_INTERPRET=1"))
        if "aot" in item.keywords and interpreting:
            item.add_marker(pytest.mark.skip(reason="ahead-of-time compilation needs TRITON_INTERPRET unset"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def one_thread():
    """Two that wait for each other on a busy machine take many times as long; a test that wants two says so."""
    with threads(1):
        yield


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Uninitialised tensors hold NaN, so that a read of one shows."""
    previous = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic  # its type does not show the setting
    deterministic.fill_uninitialized_memory = True
    if fastmem.native.module:
        fastmem.native.module.set_poison(True)
    yield
    torch.use_deterministic_algorithms(previous)
