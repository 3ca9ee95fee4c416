"""One contender of the race of sequences, in a process of its own.

The process builds the network, then obeys its parent: it waits for the name of a method of `Network` and arguments, and
answers with what the method gave. Waiting, it is blocked on the pipe and takes no time from the one that is measured.
All contenders draw the same parameters and the same input from one seed.
"""

import gc
import importlib.util
import multiprocessing
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

import fastmem
from bench.peers.dnc_compiled import CompiledDNC
from bench.peers.dnc_eager import EagerDNC
from bench.peers.dnc_pypi import PypiDNC
from bench.peers.dnc_textbook import TextbookDNC
from bench.sequence_floor import INPUTS, OUTPUTS, Shape
from bench.timing import (
    SAMPLE_SECONDS,
    Contender,
    can_measure_peak,
    cpu_clock,
    flushed_subnormals,
    peak_bytes,
    return_freed_memory,
    saved,
)

OURS, TEXTBOOK, EAGER, COMPILED = "fastmem", "textbook", "eager", "torch.compile"
JAX, CHECKPOINTED, PYPI = "JAX scan", "JAX scan, checkpoints", "dnc 1.1.0"
RIVALS = (TEXTBOOK, EAGER, COMPILED, JAX, CHECKPOINTED, PYPI)
PEERS: dict[str, type[nn.Module]] = {TEXTBOOK: TextbookDNC, EAGER: EagerDNC, COMPILED: CompiledDNC, PYPI: PypiDNC}
NEEDS = {JAX: "jax", CHECKPOINTED: "jax", PYPI: "dnc"}
MODES = ("forward", "backward")
ENVIRONMENT = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false", "JAX_PLATFORMS": "cpu"}  # read when JAX starts


def rivals() -> list[str]:
    """Those that are installed here."""
    return [name for name in RIVALS if name not in NEEDS or importlib.util.find_spec(NEEDS[name])]


def is_torch(name: str) -> bool:
    return NEEDS.get(name) != "jax"


class TorchRun:
    def __init__(self, network: nn.Module, inputs: Tensor) -> None:
        self.network, self.inputs = network, inputs
        self.parameters = dict(network.named_parameters())

    def forward(self) -> Tensor:
        with torch.no_grad():
            return self.network(self.inputs)[0]

    def gradients(self) -> dict[str, Tensor]:
        loss = self.network(self.inputs)[0].square().mean()
        return dict(zip(self.parameters, torch.autograd.grad(loss, list(self.parameters.values())), strict=True))


def build(name: str, shape: Shape) -> Any:
    """What runs the contender: `forward` gives the output, `gradients` those of the mean square of the output."""
    torch.manual_seed(0)
    sizes = (INPUTS, shape.hidden, shape.slots, shape.word, shape.heads)
    ours = fastmem.nn.DNC(*sizes, output_size=OUTPUTS)
    inputs = torch.randn(shape.steps, shape.batch, INPUTS)
    if name == OURS:
        return TorchRun(ours, inputs)
    if not is_torch(name):
        from bench.peers.dnc_jax import JaxDNC

        return JaxDNC(ours, inputs, checkpoint=name == CHECKPOINTED)
    network = PEERS[name](*sizes, OUTPUTS)
    if name != PYPI:  # whose parameters are others
        network.load_state_dict(ours.state_dict())
    return TorchRun(network, inputs)


class Network:
    """What the parent may ask for."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.shape, self.run = shape, build(name, shape)
        self.calls = {"forward": self.run.forward, "backward": self.run.gradients}

    def values(self) -> tuple[Any, dict[str, Any]]:
        """Output and gradients, as numpy arrays."""
        gradients = self.run.gradients()
        return numpy(self.run.forward()), {name: numpy(gradient) for name, gradient in gradients.items()}

    def sample(self, mode: str, flush: bool) -> float:
        """CPU seconds a time step: calls until the clock is long in the sample.

        The first, which finds the caches as the contender before left them, is not in it: one call can be the sample.
        """
        call, clock, calls = self.calls[mode], cpu_clock(), 0
        gc.disable()
        with flushed_subnormals(flush):
            call()
            start = now = clock()
            while now < start + SAMPLE_SECONDS:
                call()
                now, calls = clock(), calls + 1
        gc.enable()
        return (now - start) / calls / self.shape.steps

    def peak(self) -> int | None:
        """Bytes of a forward and backward at their peak, beyond what was there before. The last that may be asked."""
        if not can_measure_peak():
            return None
        return peak_bytes(Contender(self.calls["backward"], prepare=return_freed_memory))

    def kept(self) -> tuple[int, int]:
        """Bytes that the graph of a forward keeps for the backward, and those of links and memories among them.

        Links and memories are told by their last two dimensions. What is given anyway does not count: parameters, input
        and output.
        """
        states = {(self.shape.slots, self.shape.slots), (self.shape.slots, self.shape.word)}
        given = (*self.run.parameters.values(), self.run.inputs)
        kept = saved(lambda: [self.run.network(self.run.inputs)[0]], given)
        return sum(size for size, _ in kept), sum(size for size, shape in kept if shape[-2:] in states)

    def results(self) -> int:
        """Bytes of what a forward and backward give: output, last state and gradients."""
        with torch.no_grad():
            output, state = self.run.network(self.run.inputs)
        given = (output, *state, *self.run.parameters.values())  # a gradient for each parameter
        return sum(tensor.numel() * tensor.element_size() for tensor in given)


def numpy(array: Any) -> Any:
    return array.numpy() if isinstance(array, Tensor) else array.__array__()


def serve(pipe: Any, name: str, shape: Shape) -> None:
    """What a child does until it is told None."""
    torch.set_num_threads(1)
    os.environ.update(ENVIRONMENT)
    network = Network(name, shape)
    while (order := pipe.recv()) is not None:
        method, *arguments = order
        pipe.send(getattr(network, method)(*arguments))


class Child:
    """The parent's end of a contender."""

    def __init__(self, name: str, shape: Shape) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")  # a fork would share the state of PyTorch's threads
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=serve, args=(far_end, name, shape), daemon=True)
        self.process.start()
        far_end.close()

    def ask(self, method: str, *arguments: Any) -> Any:
        try:
            self.pipe.send((method, *arguments))
            return self.pipe.recv()
        except (EOFError, BrokenPipeError):
            self.process.join()
            raise RuntimeError(f"the process of {self.name} ended with status {self.process.exitcode}") from None

    def end(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join()


@contextmanager
def children(names: dict[Any, tuple[str, Shape]]) -> Iterator[dict[Any, Child]]:
    """Children by the keys given, with one thread each; they inherit the cores on which this process may run."""
    started = {key: Child(*who) for key, who in names.items()}
    try:
        yield started
    finally:
        for child in started.values():
            child.end()
