"""The network's speed: an all-reduce over all ranks, and all links to the next rank at once, which names slow ones."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb.comm import devices
from sharded_lamb.plan.machine import Group, Machine

ROUNDS = 3
COLLECTIVES = 2 + (1 + ROUNDS) + (1 + ROUNDS) + 2
"""Of a preflight on any number of ranks: reports (2), all-reduces, exchanges with neighbours, numbers (2)."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Measured speeds."""

    all_reduce_seconds: float
    bytes: int  # of the message
    links: tuple[float, ...]  # [ranks] bytes a second from rank r to the next one, all links at once


def measure(device: torch.device, size: int) -> Speeds:
    """The best of `ROUNDS` rounds, of the slowest rank. Collective over the default group."""
    rank, world = dist.get_rank(), dist.get_world_size()
    buffer = torch.zeros(max(1, size // 4), device=device)
    incoming = torch.empty_like(buffer)

    def exchange() -> None:
        work = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, buffer, (rank + 1) % world),
                dist.P2POp(dist.irecv, incoming, (rank - 1) % world),
            ]
        )
        for one in work:
            one.wait()

    reduced = _best(lambda: dist.all_reduce(buffer), device)
    received = _best(exchange, device)
    numbers = torch.tensor([reduced, received], dtype=torch.float64, device=device)
    gathered = [torch.empty_like(numbers) for _ in range(world)]
    dist.all_gather(gathered, numbers)
    seconds: Tensor = torch.stack(gathered).cpu()  # [ranks, 2]
    nbytes = buffer.numel() * 4
    into = [nbytes / seconds[(sender + 1) % world, 1].item() for sender in range(world)]
    return Speeds(seconds[:, 0].max().item(), nbytes, tuple(into))


def _best(work: Callable[[], object], device: torch.device) -> float:
    times = []
    for _ in range(1 + ROUNDS):  # the first makes connections
        devices.synchronize(device)
        begin = time.perf_counter()
        work()
        devices.synchronize(device)
        times.append(time.perf_counter() - begin)
    return min(times[1:])


def problems_of(
    speeds: Speeds, hosts: Sequence[str], machine: Machine | None, *, at_least: float
) -> list[str]:
    """A line for an all-reduce below ``at_least`` times the plan, and for each link below that of the median."""
    lines = []
    world = len(hosts)
    if machine is not None and world > 1:
        (planned,) = Group.of(machine, world).all_reduce_seconds(machine, [speeds.bytes])
        if planned < at_least * speeds.all_reduce_seconds:
            lines.append(
                f"an all-reduce of {speeds.bytes / 1e6:.0f} MB takes {speeds.all_reduce_seconds * 1e3:.1f} ms over "
                f"{world} ranks, and the plan says {planned * 1e3:.1f} ms"
            )
    for between in (False, True):
        links = {
            r: speed
            for r, speed in enumerate(speeds.links)
            if (hosts[r] != hosts[(r + 1) % world]) is between
        }
        if len(links) < 2:
            continue
        usual = statistics.median(links.values())
        for r, speed in links.items():
            if speed < at_least * usual:
                other = (r + 1) % world
                lines.append(
                    f"from host {hosts[r]} (rank {r}) to host {hosts[other]} (rank {other}) {speed / 1e6:,.0f} MB/s "
                    f"arrive, over links like it {usual / 1e6:,.0f} are usual"
                )
    return lines


def seconds(machine: Machine, world: int, size: int) -> float:
    """Predicted seconds of a preflight's own collectives, without start and rendezvous."""
    group = Group.of(machine, world)
    reduced = sum(group.all_reduce_seconds(machine, [size] * (1 + ROUNDS)))
    exchanged = (1 + ROUNDS) * (machine.inter_latency + size / machine.inter_bytes_per_second)
    reports = group.ring_seconds(machine, [2048 * world, 8 * world, 16 * world, 8 * world])
    return reduced + exchanged + sum(reports)
