"""Makes bench/recorded/n<N>.npz: trains a DNC with N slots on repeat copy, then records one long run of it.

No parameter depends on the number of slots, so where N is large most of the training takes place with few slots, where
it is quick, and the last part with all N.

The run shows a pattern longer than the memory, so that every slot is written and some a second time, and goes on into
the recall. Kept: the controller's outputs and the layer that makes interface vectors of them (float16), which together
fix the interface vectors; what the network learned is in `meta`. `python -m bench.record [N ...]`, minutes for each N.
"""

import json
import sys
from typing import Any, NamedTuple

import numpy as np
import torch

import fastmem
from bench.recorded import FOLDER, HEADS
from fastmem.tasks import RepeatCopy, bit_errors, masked_loss

HIDDEN = 64
LEARNING_RATE = 1e-3
FEW = 32


class Plan(NamedTuple):
    word: int
    batch: int  # of the recorded run
    iterations: int  # with few slots, and then
    last_iterations: int  # with all of them


PLANS = {
    16: Plan(16, 16, 0, 4000),
    64: Plan(16, 16, 0, 4000),
    128: Plan(32, 16, 0, 3000),
    256: Plan(64, 8, 5000, 600),
    512: Plan(64, 4, 5000, 300),
}
TASK = RepeatCopy(bits=4, min_length=1, max_length=3, min_repeats=1, max_repeats=2)


def train(slots: int, plan: Plan) -> tuple[fastmem.nn.DNC, dict[str, float]]:
    torch.manual_seed(0)
    start_slots = FEW if plan.iterations else slots
    network = fastmem.nn.DNC(TASK.input_size, HIDDEN, start_slots, plan.word, HEADS, output_size=TASK.output_size)
    optimiser = torch.optim.RMSprop(network.parameters(), lr=LEARNING_RATE, eps=1e-10)
    generator = torch.Generator().manual_seed(1)
    recent: list[tuple[float, float]] = []
    iterations = plan.iterations + plan.last_iterations
    for iteration in range(iterations):
        if iteration == plan.iterations:
            network.num_slots = slots
        batch = TASK.sample(16, generator)
        output, _ = network(batch.input)
        loss = masked_loss(output, batch)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimiser.step()
        recent = [*recent[-99:], (loss.item(), bit_errors(output, batch).item())]
        if iteration % 250 == 249:
            loss_now, errors_now = np.mean(recent, axis=0)
            print(f"N {slots}, iteration {iteration + 1}: loss {loss_now:.3f}, wrong bits {errors_now:.3f}", flush=True)
    loss_now, errors_now = np.mean(recent, axis=0)
    return network, {"iterations": iterations, "loss": float(loss_now), "wrong_bits": float(errors_now)}


def record(network: fastmem.nn.DNC, slots: int, plan: Plan) -> tuple[torch.Tensor, float]:
    """The controller's outputs [T,B,H], and the share of slots that all writes together changed by half or more."""
    steps = max(slots + 100, 260)
    length = slots + 20
    task = RepeatCopy(TASK.bits, length, length, steps // length, steps // length)
    inputs = task.sample(plan.batch, torch.Generator().manual_seed(2)).input[:steps]
    state = network.initial_state(plan.batch)
    hidden = []
    kept = torch.ones(plan.batch, slots)
    with torch.no_grad():
        for step_input in inputs:
            _, state = network.step(step_input, state)
            hidden.append(state.hidden)
            kept *= 1 - state.write_weights[:, 0]
    return torch.stack(hidden), (kept < 0.5).float().mean().item()


def main(chosen: list[int]) -> None:
    FOLDER.mkdir(exist_ok=True)
    for slots in chosen:
        network, learned = train(slots, PLANS[slots])
        hidden, filled = record(network, slots, PLANS[slots])
        meta = {"slots": slots, "read_heads": HEADS, "word": PLANS[slots].word, "slots_written": filled, **learned}
        arrays = {"hidden": hidden, "weight": network.interface.weight, "bias": network.interface.bias}
        half: dict[str, Any] = {name: tensor.detach().numpy().astype(np.float16) for name, tensor in arrays.items()}
        np.savez_compressed(FOLDER / f"n{slots}.npz", meta=json.dumps(meta), **half)
        print(meta, flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main([int(argument) for argument in sys.argv[1:]] or list(PLANS))
