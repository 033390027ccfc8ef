"""Measures this machine's speeds in about a second, for `--check` without other speeds."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb import kernels
from sharded_lamb.comm import devices
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.topology import Topology
from sharded_lamb.core import rule
from sharded_lamb.core.footprint import update_bytes
from sharded_lamb.core.layout import BLOCK
from sharded_lamb.kernels import FlatShard
from sharded_lamb.plan.machine import Machine
from sharded_lamb.plan.sharding import Choices

_UPDATED = 1 << 23
"""Elements: their 128 MiB exceed every cache."""

_SENT = 1 << 21
_ROUNDS = 5


def probed(device: torch.device) -> Machine:
    """Speeds of the default group's ranks while all are busy, each the slowest rank's. Collective.

    Times the update as the two passes of the optimizers' kernel over one fp32 shard, and the wire as all-gathers of
    8 MiB and of a few bytes.
    """
    world = dist.get_world_size()
    collectives = Collectives(Topology.of(None, None), device)
    large = torch.zeros(_SENT // world * world, device=device)
    small = torch.zeros(world, device=device)
    seconds = [
        _median(_two_passes(device), device),
        _median(lambda: collectives.all_gather(small).wait(), device),
        _median(lambda: collectives.all_gather(large).wait(), device),
    ]
    slowest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    update, latency, gather = slowest.tolist()
    others = max(world - 1, 1)
    bandwidth = large.nbytes * others / world / max(gather - latency, 1e-9)
    moved = update_bytes(_UPDATED, Choices().precision.widths)
    return Machine(moved / update, bandwidth, bandwidth, latency / others, latency / others, world)


def _two_passes(device: torch.device) -> Callable[[], None]:
    """Passes 1 and 2 over one whole parameter."""
    weight = torch.ones(_UPDATED, device=device)
    grad, exp_avg, exp_avg_sq = (torch.full_like(weight, value) for value in (1e-2, 0.0, 0.0))
    owners = torch.zeros(_UPDATED // BLOCK, dtype=torch.int64, device=device)
    shards = [FlatShard(weight, None, grad, exp_avg, exp_avg_sq, owners)]
    values = rule.Coefficients(
        grad_scale=1.0,
        l2=0.0,
        beta1=0.9,
        c1=0.1,
        beta2=0.999,
        c2=0.001,
        unbias1=1.0,
        unbias2=1.0,
        eps_inside=0.0,
        eps_outside=1e-6,
        decay=0.01,
        opposed=1.0,
        salt=1.0,
    )
    table = torch.tensor([[getattr(values, name) for name in rule.COLUMNS]], device=device)
    sizes = torch.full((1,), 1e-4, device=device)
    kernel = kernels.choose("auto", device)

    @torch.no_grad()
    def run() -> None:
        sums = torch.zeros(len(rule.SUMS), 1, dtype=torch.float64, device=device)
        kernel.moments_and_norms(shards, table, sums)
        kernel.apply(shards, table, sizes[None])

    return run


def _median(work: Callable[[], Any], device: torch.device) -> float:
    """Median seconds over rounds after an untimed one; ranks begin together. Collective."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        dist.barrier()
        start = time.perf_counter()
        work()
        devices.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])
