"""What every launcher needs on the host."""

import triton
from torch import Tensor


def unit_stride(tensor: Tensor) -> Tensor:
    """The kernels take any strides but the last, which is 1; another one costs a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def splits(count: int, blocks: int, most_programs: int) -> tuple[int, int]:
    """The tiles of one split and the number of splits: as many as keep a launch to about `most_programs` programs,
    when each split of the `count` tiles runs `blocks` of them."""
    tiles = max(1, triton.cdiv(count, max(1, most_programs // blocks)))
    return tiles, triton.cdiv(count, tiles)
