"""What happens when the C++ op, which a plain call tries before any check, raises."""

import traceback

import pytest
import torch

import fastmem
from fastmem import _library
from tests.cases import content_addressing, content_read
from tests.ops.suite import native

pytestmark = native


@pytest.fixture
def called(monkeypatch):
    """The backends that were called, in order."""
    backends = []
    find = _library.implementation

    def recording(backend, stem, name):
        backends.append(backend)
        return find(backend, stem, name)

    monkeypatch.setattr(_library, "implementation", recording)
    return backends


def test_what_the_checks_cannot_explain_is_tried_once_and_raised_as_it_came(monkeypatch):
    calls = []

    def out_of_memory(*arguments):
        calls.append(arguments)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(_library, "implementation", lambda backend, stem, name: out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory") as raised:
        fastmem.content_addressing(**content_addressing.make())
    assert len(calls) == 1
    assert raised.value.__context__ is None


def test_what_the_checks_explain_is_told_without_the_first_error(called):
    values = content_addressing.make()
    with pytest.raises(ValueError, match="strengths: expected") as raised:
        fastmem.content_addressing(**{**values, "strengths": values["strengths"][:1]})
    assert called == ["cpp"]
    assert "During handling" not in "".join(traceback.format_exception(raised.value))


def test_what_another_backend_serves_goes_there(called):
    values = content_read.make(bank_dtype=torch.bfloat16)
    assert fastmem.content_read(**values)[0].dtype == torch.float32
    assert called == ["cpp", "reference"]
