"""Flat memory for state on CPUs, aligned so that the two passes run at memory bandwidth."""

import contextlib
import mmap

import torch
from torch import Tensor

LANE_BYTES = 832
"""Distance between the page offsets at which kinds of memory begin. With element i of every kind at the same page
offset, a load of one waits for a store to another (processors compare 12 bits of an address first): 8 % of a step."""

MIN_BYTES = 1 << 20
"""torch allocates smaller tensors."""


def zeros(numel: int, dtype: torch.dtype, device: torch.device, lane: int) -> Tensor:
    """Zeros of shape [numel]. ``lane``: the kind of memory, a different number for each kind.

    Uses huge pages on Linux where available: without them TLB misses cost 6 % of a step.
    """
    nbytes = numel * dtype.itemsize
    if device.type != "cpu" or nbytes < MIN_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes + lane * LANE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=lane * LANE_BYTES)
