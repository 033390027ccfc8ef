"""This machine's speeds, in a second: what `--check` predicts times with where nothing else is said."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb.collectives import Collectives, Topology
from sharded_lamb.footprint import update_bytes
from sharded_lamb.lamb import Lamb
from sharded_lamb.plan.machine import Machine
from sharded_lamb.plan.sharding import Choices

_NUMEL = 1 << 21
_ROUNDS = 5


def probed(device: torch.device) -> Machine:
    """Speeds of the default group's ranks while all are busy, each the slowest rank's. Collective.

    The update by `Lamb` on 8 MiB of fp32, the wire by all-gathers of 8 MiB and of next to nothing.
    """
    world = dist.get_world_size()
    p = torch.nn.Parameter(torch.ones(_NUMEL, device=device))
    p.grad = torch.ones_like(p)
    lamb = Lamb([p])
    collectives = Collectives(Topology.of(None, None), device)
    large = torch.zeros(_NUMEL // world * world, device=device)
    small = torch.zeros(world, device=device)
    seconds = [
        _median(lamb.step, device),
        _median(lambda: collectives.all_gather(small).wait(), device),
        _median(lambda: collectives.all_gather(large).wait(), device),
    ]
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    update, latency, gather = slowest.tolist()
    others = max(world - 1, 1)
    bandwidth = large.nbytes * others / world / max(gather - latency, 1e-9)
    moved = update_bytes(_NUMEL, Choices().precision.widths)
    return Machine(moved / update, bandwidth, bandwidth, latency / others, latency / others, world)


def _median(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds, after one run that is not counted; ranks begin together."""
    found = []
    for _ in range(1 + _ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])
