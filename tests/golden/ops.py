"""The ops of the files `ops_*` by the public functions, whichever backend is in use."""

from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import softplus

import fastmem
from fastmem.reference.location_addressing import interpolated, shifted
from tests.golden import load
from tests.helpers import assert_no_worse

Named = dict[str, Tensor]


def content_outer(M: Tensor, k: Tensor, beta: Tensor, m: Tensor | None = None, floor: float = 0.0) -> Named:
    mask = None if m is None else m * (1 - floor) + floor
    return {"w": fastmem.content_addressing(M, k, beta, mask, norm="outer", eps=1e-6)}


def content_inner(M: Tensor, k: Tensor, beta: Tensor) -> Named:
    return {"w": fastmem.content_addressing(M, k, softplus(beta), norm="inner", eps=1e-6)}


def linkage_one_write_head(L: Tensor, p: Tensor, w: Tensor, w_r: Tensor) -> Named:
    outputs = fastmem.temporal_linkage(L.unsqueeze(1), p.unsqueeze(1), w.unsqueeze(1), w_r)
    return dict(zip(("L", "p", "fwd", "bwd"), (output.squeeze(1) for output in outputs), strict=True))


def linkage_several_write_heads(L: Tensor, p: Tensor, w: Tensor, w_r: Tensor) -> Named:
    link, precedence, forward, backward = fastmem.temporal_linkage(L, p, w, w_r)
    return {"L": link, "p": precedence, "fwd": forward.transpose(1, 2), "bwd": backward.transpose(1, 2)}


def usage_and_allocation(u: Tensor, w_w: Tensor, w_r: Tensor, f: Tensor) -> Named:
    usage, retention = fastmem.usage_update(u, w_w.detach().unsqueeze(1), w_r, f)
    # The published code takes no gradient through w_w: keep w_w in the graph with a gradient of zero.
    return {"u": usage + 0 * w_w, "psi": retention, "a": fastmem.allocation(usage).squeeze(1)}


def usage(u: Tensor, w_w: Tensor, w_r: Tensor, f: Tensor) -> Named:
    return {"u": fastmem.usage_update(u, w_w.detach(), w_r, f)[0] + 0 * w_w.sum()}


def allocation(u: Tensor, g: Tensor) -> Named:
    return {"a": fastmem.allocation(u, g)}


def write_one_head(M: Tensor, w: Tensor, e: Tensor, v: Tensor, psi: Tensor | None = None) -> Named:
    return {"M": fastmem.memory_write(M, *(tensor.unsqueeze(1) for tensor in (w, e, v)), psi)}


def write_several_heads(M: Tensor, w: Tensor, e: Tensor, v: Tensor) -> Named:
    return {"M": fastmem.memory_write(M, w, e, v)}


def sharpen(d: Tensor, s: Tensor) -> Named:
    return {"w": fastmem.sharpen(d, 1 + softplus(s))}


def address(M: Tensor, k: Tensor, beta: Tensor, g: Tensor, s: Tensor, gamma: Tensor, w_prev: Tensor) -> Named:
    """The intermediate weightings come from the plain formula, so that their gradients count too."""
    content = fastmem.content_addressing(M, k.unsqueeze(1), softplus(beta), norm="clamp")
    previous, gate, shift = w_prev.unsqueeze(1), g.sigmoid(), s.softmax(-1).unsqueeze(1)
    gated = interpolated(content, previous, gate)
    outputs = {
        "w_c": content,
        "w_g": gated,
        "w_s": shifted(gated, shift, True),
        "w": fastmem.location_addressing(content, previous, gate, shift, 1 + softplus(gamma), True, "power"),
    }
    return {name: output.squeeze(1) for name, output in outputs.items()}


OPS: dict[tuple[str, str], Callable[..., Named]] = {
    ("ops_csordas", "content"): content_outer,
    ("ops_csordas", "content_mask"): content_outer,
    ("ops_csordas", "content_mask_floor"): partial(content_outer, floor=0.1),
    ("ops_csordas", "usage_alloc"): usage_and_allocation,
    ("ops_csordas", "usage_alloc_ties"): usage_and_allocation,
    ("ops_csordas", "link"): linkage_one_write_head,
    ("ops_csordas", "sharpen"): sharpen,
    ("ops_csordas", "write"): write_one_head,
    ("ops_csordas", "write_dealloc"): write_one_head,
    ("ops_deepmind", "cosine"): content_inner,
    ("ops_deepmind", "linkage"): linkage_several_write_heads,
    ("ops_deepmind", "usage"): usage,
    ("ops_deepmind", "alloc"): allocation,
    ("ops_deepmind", "write"): write_several_heads,
    **{
        (f"ops_ntm_{code}", f"address{case}"): address
        for code in ("nsm", "loud")
        for case in ("", "_sharp", "_w0")
    },
}  # fmt: skip
# The published function behind each.
FUNCTIONS = {(file, op): load(file)[1]["ops"][op]["fn"] for file, op in OPS}
EACH_FUNCTION = sorted({(file, function) for (file, _), function in FUNCTIONS.items()})


def run(
    file: str, op: str, backend: str, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> tuple[Named, Named]:
    """What the backend gives, on the CPU, and what the file holds: outputs by name, gradients as `d.NAME`."""
    arrays, _ = load(file)
    fields = {key.removeprefix(f"{op}."): array for key, array in arrays.items() if key.startswith(f"{op}.")}
    inputs = {name: array.to(device, dtype).requires_grad_() for name, array in fields.items() if "." not in name}
    with fastmem.use_backend(backend):
        outputs = OPS[file, op](**inputs)
        weights = [fields[f"loss_w.{name}"].to(output) for name, output in outputs.items()]
        gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), weights)
    found = outputs | {f"d.{name}": gradient for name, gradient in zip(inputs, gradients, strict=True)}
    expected = {
        name.removeprefix("out."): array for name, array in fields.items() if name.startswith(("out.", "d."))
    }  # fmt: skip
    assert set(found) == set(expected)
    return {name: tensor.detach().cpu() for name, tensor in found.items()}, expected


def check_float32(file: str, function: str, backend: str, device: str = "cpu") -> None:
    """The error rule of every op, with the published results for the truth.

    The errors of all cases of a function count as one, since the luck of a few numbers is not the backend's.
    """
    drawn = defaultdict(list)
    for op in (op for (other, op), name in FUNCTIONS.items() if (other, name) == (file, function)):
        actual, exact = run(file, op, backend, torch.float32, device)
        plain, _ = run(file, op, "reference", torch.float32, device)
        for name, tensor in actual.items():
            drawn[name].append([side.flatten() for side in (tensor, exact[name], plain[name])])
    for name, rows in drawn.items():
        ours, truth, formula = (torch.cat(side) for side in zip(*rows, strict=True))
        assert_no_worse(ours, truth, formula, 3 if name.startswith("d.") else 2, name)
