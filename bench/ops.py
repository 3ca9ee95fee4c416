"""Part c of the main job: each op against the same formula in eager PyTorch and under torch.compile."""

import importlib
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

import fastmem
from bench import floors, verify
from bench.cases import Case
from bench.timing import Contender, flushed_subnormals, race, sample_wall, spread, summarise, threads

OURS, FLOOR = "fastmem", "traffic floor"
HEADLINES = ("textbook", "eager", "torch.compile")
RIVALS = {
    "temporal_linkage": ("textbook", "fast_eager", "lerp_eager"),
    "content_addressing": ("textbook", "fast_eager"),
    "content_read": ("textbook", "fast_eager", "attention"),
    "program_lookup": ("textbook", "gemm_then_mix", "mix_then_gemm", "expand_then_gemm"),
    "program_mix": ("textbook", "gemm_then_mix", "mix_then_gemm", "expand_then_gemm"),
    "usage_update": ("textbook", "fast_eager"),
    "allocation": ("textbook", "fast_eager"),
    "memory_write": ("textbook", "fast_eager", "one_head_eager"),
    "weighted_read": ("textbook", "fast_eager"),
    "sharpen": ("textbook", "fast_eager"),
    "location_addressing": ("textbook", "fast_eager"),
    "cached_attention": ("textbook", "fast_eager"),
    "dnc_step": ("textbook", "fast_eager"),
    "ntm_step": ("textbook", "fast_eager"),
}
IN_PLACE = {
    "temporal_linkage": ("textbook", "fast_eager_", "lerp_eager_"),
    "memory_write": ("textbook", "one_head_eager_"),
    "dnc_step": ("textbook", "fast_eager_"),
    "ntm_step": ("textbook", "fast_eager_"),
}


def modes(op: str) -> tuple[str, ...]:
    return ("forward", "backward", "in_place") if op in IN_PLACE else ("forward", "backward")


def rivals(op: str, mode: str) -> tuple[str, ...]:
    return IN_PLACE[op] if mode == "in_place" else RIVALS[op]


def headline(contenders: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The ratios to report: the textbook's, that of the fastest other eager form, and torch.compile's."""
    ratios = {name: entry["ratio"] for name, entry in contenders.items() if name != OURS}
    found = {name: ratio for name, ratio in ratios.items() if name in HEADLINES}
    eager = [ratio for name, ratio in ratios.items() if name not in HEADLINES]
    if eager:
        found["eager"] = min(eager, key=lambda ratio: ratio["median"])
    return found


def _options(op: str, inputs: tuple[Tensor, ...]) -> dict[str, Any]:
    """What fastmem asks for besides tensors. The NTMs that are raced have pairs of a read head and a write head."""
    return {"heads": "rw" * (inputs[2].shape[1] // 2)} if op == "ntm_step" else {}


def _forward(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Contender:
    def call() -> Any:
        with torch.no_grad():
            return function(*inputs)

    return Contender(call)


def _backward(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> Contender:
    """Forward and backward, with an upstream gradient for every output, as in the middle of a sequence."""
    leaves = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)

    def outputs() -> tuple[Tensor, ...]:
        results = function(*leaves)
        return tuple(out for out in ((results,) if isinstance(results, Tensor) else results) if out.requires_grad)

    generator = torch.Generator().manual_seed(1)
    upstream = tuple(torch.randn(out.shape, generator=generator).to(out.device) for out in outputs())
    return Contender(lambda: torch.autograd.grad(outputs(), leaves, upstream))


def _in_place(op: str, function: Callable[..., Any], inputs: tuple[Tensor, ...], workspace: bool) -> Contender:
    """Sixteen calls on one state, which is restored before each sample, outside the clock."""
    with torch.no_grad():
        arguments = verify.in_place(op, inputs, getattr(fastmem, op)(*inputs, **_options(op, inputs)))
    states = arguments[verify.WRITTEN[op]]
    originals = [state.clone() for state in states]
    if workspace:
        arguments.append(torch.empty_like(max(states, key=torch.numel)))

    def prepare() -> None:
        for state, original in zip(states, originals, strict=True):
            state.copy_(original)

    def call() -> Any:
        with torch.no_grad():
            return function(*arguments)

    return Contender(call, prepare, calls=16)


@lru_cache(maxsize=1)
def _compiled(op: str, case: str) -> Callable[..., Any]:
    """The textbook under torch.compile; kept for all races of one case, so that each graph is compiled once."""
    torch.compiler.reset()
    warnings.filterwarnings("ignore", message=".*lru_cache", category=UserWarning)  # traces the cached mask
    peers = importlib.import_module(f"bench.peers.{op}")
    return torch.compile(peers.textbook, fullgraph=True, dynamic=False)


def contenders(
    op: str, mode: str, inputs: tuple[Tensor, ...], compiled: str = "", backend: str | None = None
) -> dict[str, Contender]:
    """All who race: fastmem first. `compiled` names the case for which torch.compile joins."""
    peers = importlib.import_module(f"bench.peers.{op}")
    build = _backward if mode == "backward" else _forward
    options = {"backend": backend, **_options(op, inputs)}
    if mode == "in_place":
        ours = partial(getattr(fastmem, f"{op}_"), **options)
        made = {OURS: _in_place(op, ours, inputs, workspace=False)}
        for name in rivals(op, mode):
            in_place = name.endswith("_")
            function = getattr(peers, name)
            made[name] = _in_place(op, function, inputs, workspace=True) if in_place else _forward(function, inputs)
        return made
    made = {OURS: build(partial(getattr(fastmem, op), **options), inputs)}
    made |= {name: build(getattr(peers, name), inputs) for name in rivals(op, mode)}
    if compiled:
        made["torch.compile"] = build(_compiled(op, compiled), inputs)
    return made


def measure(case: Case, mode: str, source: str, flush: bool, compiled: bool, seconds: float, rate: float) -> dict:
    """One row of the table. `flush`: PyTorch's own flush-to-zero switch is on, for the rivals' sake."""
    inputs = case.inputs(source)
    with flushed_subnormals(flush):
        racing = contenders(case.op, mode, inputs, case.name if compiled else "")
        racing[FLOOR] = Contender(floors.traffic(case.op, mode, inputs))
        samples = race(racing, seconds)
    flop_ms = 1e3 * floors.flops(case.op, mode, inputs) / rate
    floor = [max(1e3 * value, flop_ms) for value in samples.pop(FLOOR)]
    return {
        "op": case.op, "case": case.name, "mode": mode, "inputs": source, "flush": flush,
        "threads": torch.get_num_threads(),
        "floor_ms": spread(floor)["median"], "floor_flops_ms": flop_ms,
        "times_floor": spread([1e3 * mine / least for mine, least in zip(samples[OURS], floor, strict=True)]),
        "contenders": summarise(samples, OURS),
    }  # fmt: skip


def scaling(case: Case, mode: str, source: str, seconds: float) -> dict:
    """Two threads against one, in wall time; the speed-up is that of a paired round."""
    call = contenders(case.op, mode, case.inputs(source))[OURS]

    def on(count: int) -> Contender:
        def prepare() -> None:
            torch.set_num_threads(count)
            call.call()  # the first call after a change of threads wakes them
            if call.prepare is not None:
                call.prepare()

        return Contender(call.call, prepare, call.calls)

    with threads(2):  # what it is afterwards again
        summary = summarise(race({"1 thread": on(1), "2 threads": on(2)}, seconds, sample=sample_wall), "2 threads")
    return {"op": case.op, "case": case.name, "mode": mode, "inputs": source, "threads": summary}
