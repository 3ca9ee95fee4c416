"""float32 against the results of published implementations (tests/golden)."""

import pytest

pytest.importorskip("triton")

from tests.golden.ops import EACH_FUNCTION, check_float32

# The logarithm of a zero weight is -inf on purpose, and the interpreter is NumPy.
pytestmark = [pytest.mark.interp, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize(("file", "function"), EACH_FUNCTION)
def test_ops(file: str, function: str) -> None:
    check_float32(file, function, "triton")
