"""The least time that an op can take on this machine, by limits measured in the same run.

Floor = max(traffic, flops / rate). Traffic is raced with the contenders: a plain PyTorch loop over buffers of the op's
own size that reads and writes each byte which the op must read and write, once, and computes nothing. The rate is that
of a large float32 matrix product, so it favours the floor: the products inside the ops are small.

| op | forward reads and writes | backward, on top |
| temporal_linkage | old link, new link | old link, gradient of the new link; gradient of the old link |
| temporal_linkage_ | link, in place | |
| memory_write | old memory, new memory | old memory, gradient of the new memory; gradient of the old memory |
| memory_write_ | memory, in place | |
| content_addressing, content_read, weighted_read | memory | memory; gradient of memory |
| program_lookup | program weights | program weights; their gradient |
| cached_attention | keys, cache | keys, cache; their gradients |
| usage_update, allocation | arguments, results | arguments, gradients of results; gradients of arguments |
| sharpen | weights, new weights | both kinds of weights, gradient of the new; gradient of the old |
| location_addressing | content and previous weights, new weights | all of them, gradient of the new; of the old two |
| dnc_step, ntm_step | old memory (and link), new ones | as memory_write, temporal_linkage |
| dnc_step_, ntm_step_ | memory (and link), in place | |
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.timing import cpu_clock


def gemm_rate(size: int = 1024, rounds: int = 9) -> float:
    """Floating-point operations a second of one square float32 product, at the current thread count: the most found."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    out = torch.empty(size, size)
    clock = cpu_clock()
    seconds = []
    for _ in range(rounds):
        start = clock()
        torch.mm(a, b, out=out)
        seconds.append(clock() - start)
    return 2 * size**3 / min(seconds[1:])


def traffic(op: str, mode: str, inputs: tuple[Tensor, ...]) -> Callable[[], Any]:
    """A call that moves the bytes which the op has to move; mode is forward, backward (both ways) or in_place."""
    if op in ("usage_update", "allocation"):
        arguments = torch.rand(sum(tensor.numel() for tensor in inputs))
        results = torch.rand((2 if op == "usage_update" else 1) * inputs[0].numel())
        if mode == "forward":
            return lambda: (arguments.sum(), results.fill_(1.0))
        return lambda: (arguments.sum(), results.fill_(1.0), arguments.sum(), results.sum(), arguments.fill_(1.0))
    places = {
        "program_lookup": slice(4, 5), "program_mix": slice(2, 3), "cached_attention": slice(1, 3),
        "dnc_step": slice(1, 5, 3), "ntm_step": slice(1, 2),
    }  # fmt: skip
    large = inputs[places.get(op, slice(1))]
    count = sum(tensor.numel() for tensor in large)
    old, other, third, new = (torch.rand(count) for _ in range(4))  # ordinary numbers, whatever the inputs hold
    if op in ("temporal_linkage", "memory_write", "dnc_step", "ntm_step"):
        if mode == "in_place":
            return lambda: old.mul_(1.0)
        if mode == "forward":
            return lambda: new.copy_(old)
        return lambda: (new.copy_(old), torch.add(old, other, out=new))
    if op == "sharpen":
        if mode == "forward":
            return lambda: new.copy_(old)
        return lambda: (new.copy_(old), torch.addcmul(old, other, third, out=new))
    if op == "location_addressing":
        if mode == "forward":
            return lambda: torch.add(old, other, out=new)
        return lambda: (torch.add(old, other, out=new), torch.add(old, other, out=new), torch.add(third, new, out=old))
    if mode == "forward":
        return lambda: old.sum()
    return lambda: (old.sum(), new.copy_(old))


def flops(op: str, mode: str, inputs: tuple[Tensor, ...]) -> int:
    """Operations on the large parts, each counted as one; the backward of a product counts twice."""
    if op == "temporal_linkage":
        batch, heads, slots, _ = inputs[0].shape
        count = batch * heads * slots * slots * (4 + 4 * inputs[3].shape[1])
    elif op in ("program_lookup", "program_mix"):
        programs, width, outputs = inputs[-2].shape
        count = 2 * inputs[0].shape[0] * programs * width * outputs
    elif op == "usage_update":
        count = inputs[0].numel() * (3 * inputs[1].shape[1] + 2 * inputs[2].shape[1] + 1)
    elif op == "allocation":
        count = 5 * inputs[0].numel()
    elif op == "memory_write":
        count = 5 * inputs[0].numel() * inputs[1].shape[1]
    elif op == "weighted_read":
        count = 2 * inputs[0].numel() * inputs[1].shape[1]
    elif op == "cached_attention":  # of each element of a key a sum, a tanh and a product; of an entry its product
        count = 3 * inputs[1].numel() + 2 * inputs[2].numel()
    elif op == "dnc_step":
        memory, link, readers = inputs[1].numel(), inputs[4].numel(), inputs[6].shape[1]
        writers = inputs[5].shape[1]
        count = link * (4 + 4 * readers) + memory * (2 * (readers + writers + 2) + 5 * writers + 2 * readers)
    elif op == "ntm_step":  # of each pair two lookups and the norms of the rows, a read and a write
        memory, pairs = inputs[1].numel(), inputs[2].shape[1] // 2
        count = memory * pairs * (2 * 3 + 2 + 5) + inputs[2].numel() * (5 + 2 * 3)
    elif op in ("sharpen", "location_addressing"):  # a logarithm, a product, an exponential, a sum and a division
        taps = inputs[3].shape[-1] if op == "location_addressing" else 0
        count = inputs[0].numel() * (5 + 2 * taps)
    else:
        batch, heads, word = inputs[1].shape
        products = 1 if op == "content_addressing" else 2
        count = 2 * inputs[0].shape[1] * word * (products * batch * heads + inputs[0].shape[0])
    return count * (3 if mode == "backward" else 1)
