from typing import Any

import torch

from tests.cases import content_addressing


def make(
    shared: bool = False, bank_dtype: torch.dtype | None = None, batch: int = 2, **arguments: Any
) -> dict[str, Any]:
    """The inputs of content_addressing; a shared bank has batch 1, its slot mask too. `bank_dtype` is the memory's."""
    inputs = content_addressing.make(batch=batch, **arguments)
    if shared:
        bank = content_addressing.make(batch=2, **arguments)  # of two samples, since sample 0 is all masked
        inputs["memory"] = bank["memory"][1:]
        inputs["slot_mask"] = None if bank["slot_mask"] is None else bank["slot_mask"][1:]
    if bank_dtype is not None:
        inputs["memory"] = inputs["memory"].to(bank_dtype)
    return inputs


CASES: dict[str, dict[str, Any]] = {
    **content_addressing.CASES,
    "shared": {"shared": True, "batch": 3, "slots": 65, "word": 20},
    "shared_masks": {"shared": True, "batch": 3, "slots": 33, "key_mask": True, "slot_mask": True},
    "shared_no_batch": {"shared": True, "batch": 0},
    "bfloat16_bank": {"slots": 65, "word": 20, "bank_dtype": torch.bfloat16},
    "float16_shared_bank": {"shared": True, "batch": 3, "slots": 33, "bank_dtype": torch.float16},
}
INTERPRETED = [name for name in CASES if name != "many_slots"]
