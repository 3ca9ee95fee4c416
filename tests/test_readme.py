"""The code of the README runs."""

import re
from pathlib import Path

import torch

import fastmem

README = Path(__file__).resolve().parent.parent / "README.md"


def test_the_lines_of_use_run() -> None:
    text = README.read_text()
    first, second = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict = {}
    exec(first, names)
    assert names["weights"].shape == (8, 5, 128) and names["memory"].grad is not None
    assert names["output"].shape == (20, 8, 8)
    exec(second, names)
    assert names["loss"].requires_grad and names["output"].shape == (50, 8, 8)
    of_a_network, of_an_op = re.findall(r"`(fastmem\.explain\(.*?\))`", text)
    assert eval(
        of_a_network, names | {"net": fastmem.nn.DNC(10, 6, 4, 3), "input": torch.randn(20, 8, 10)}
    ).backend in (
        "sequence op on cpp",
        "step by step",
    )
    assert eval(of_an_op, names).backend in ("cpp", "reference")
    assert fastmem.__version__ in (README.parent / "CHANGELOG.md").read_text()
