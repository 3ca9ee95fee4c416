"""The code of the README runs."""

import re
from pathlib import Path

import fastmem

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_lines_of_use_run() -> None:
    text = README.read_text()
    (block,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(block, names)
    assert names["weights"].shape == (8, 5, 128) and names["memory"].grad is not None
    assert names["output"].shape == (20, 8, 8)
    (call,) = re.findall(r"`(fastmem\.explain\(.*?\))`", text)
    assert eval(call, names).backend in ("cpp", "reference")
    assert fastmem.__version__ in (README.parent / "CHANGELOG.md").read_text()
