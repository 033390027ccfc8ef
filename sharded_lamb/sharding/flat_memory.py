"""Flat memory for state on CPUs, laid out so that the two passes run at the speed of the memory."""

import contextlib
import mmap

import torch
from torch import Tensor

LANE_BYTES = 832
"""How far apart in a page kinds of memory begin. Were element i of all kinds at the same place of a page, a load of one
would wait for the store to another (processors compare 12 bits of an address first): 8 % of a step."""

LEAST_BYTES = 1 << 20
"""Smaller memory is torch's own."""


def zeros(numel: int, dtype: torch.dtype, device: torch.device, lane: int) -> Tensor:
    """[numel] of zeros. ``lane``: which kind of memory it is for, another number for each.

    On Linux it lies in huge pages where the system has any to give: 6 % of a step are misses of the table of pages.
    """
    nbytes = numel * dtype.itemsize
    if device.type != "cpu" or nbytes < LEAST_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(numel, dtype=dtype, device=device)
    memory = mmap.mmap(-1, nbytes + lane * LANE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=numel, offset=lane * LANE_BYTES)
