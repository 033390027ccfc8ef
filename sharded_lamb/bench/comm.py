"""``sharded-lamb bench comm``: our exchanges against torch's collectives, by bucket size."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb import kernels
from sharded_lamb.bench import report
from sharded_lamb.bench.timing import Clock, Spread, Turns, by_round, quotients, take_turns, world
from sharded_lamb.collectives import Collectives, Topology
from sharded_lamb.kernels import FlatShard
from sharded_lamb.layout import BLOCK, round_up

ALL_REDUCE = "all_reduce"

PAIR = "point to point"

COUNTED = (
    "MB/s: bytes of the bucket over the time of the slowest rank. A reduce-scatter is counted until the averaged fp32 "
    "shard is there (ours with its squares summed), a gather until the whole bucket is. point to point: every rank "
    "sends its neighbour the (W-1)/W of a bucket that either must move, and receives as many; its MB/s are of those."
)


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints and writes. Returns what the JSON holds. Collective.

    Raises:
        ValueError: one rank, or sizes that are not numbers > 0.
    """
    _, world_size = world()
    sizes = _sizes(chosen.mb)
    if world_size == 1:
        raise ValueError("comm measures what several ranks exchange: run it under torchrun")
    collectives, clock = Collectives(Topology.of(None, None), device), Clock(device)
    turns = {}
    for size in sizes:
        report.progress(f"{size:g} MB")
        turns[f"{size:g}"] = take_turns(_actions(collectives, size, device), clock, rounds=chosen.rounds)
    content = {
        **report.about(device),
        "benchmark": "comm",
        "counted": COUNTED,
        "reference": ALL_REDUCE,
        "summary": {size: summarize(of_size, float(size), world_size) for size, of_size in turns.items()},
        "rounds_ms": turns,
    }
    report.publish(chosen, _text(content), content, _panels(content))
    return content


def _sizes(text: str) -> list[float]:
    try:
        sizes = [float(part) for part in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) <= 0:
        raise ValueError(f"--mb {text!r}: expected numbers > 0 with commas, such as 16,32")
    return sizes


def _actions(collectives: Collectives, size_mb: float, device: torch.device) -> dict[str, Callable[[], None]]:
    """Everything that is timed on a bucket of ``size_mb`` MB of fp32, by name."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    numel = round_up(max(int(size_mb * 1e6 / 4), 1), BLOCK * world_size)
    part = numel // world_size
    full = torch.zeros(numel, device=device)
    received = torch.empty(collectives.received_numel(numel), device=device)
    shard = torch.zeros(part, device=device)
    sent, arrived = torch.zeros(numel - part, device=device), torch.empty(numel - part, device=device)
    reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

    kernel, sums = kernels.choose("auto", device), torch.zeros(1, dtype=torch.float64, device=device)
    owners = torch.zeros(part // BLOCK, dtype=torch.int64, device=device)
    target = FlatShard(shard, None, shard, shard, shard, owners)

    def ours_reduce_scatter() -> None:
        collectives.reduce_scatter(full, received).wait()
        parts = collectives.parts_of_sum(full, received, torch.float32)
        kernel.average(target, parts, world_size, sums, add=False)

    def their_reduce_scatter() -> None:
        reduce_scatter(shard, full)
        shard.div_(world_size)

    def pair() -> None:
        works = [
            dist.irecv(arrived, (rank - 1) % world_size),
            dist.isend(sent, (rank + 1) % world_size),
        ]
        for work in works:
            assert work is not None
            work.wait()

    return {
        ALL_REDUCE: lambda: dist.all_reduce(full),
        "ours: reduce-scatter": ours_reduce_scatter,
        "reduce_scatter_tensor": their_reduce_scatter,
        "ours: all-gather": lambda: collectives.all_gather(full).wait(),
        "all_gather_into_tensor": lambda: all_gather(full, shard),
        PAIR: pair,
    }


def summarize(turns: Mapping[str, Turns], size_mb: float, world_size: int) -> dict[str, dict[str, Any]]:
    """For every action: time, rate, and time over all_reduce's by round."""
    moved = {name: size_mb * (1 - 1 / world_size) if name == PAIR else size_mb for name in turns}
    rounds = {name: by_round(of_one) for name, of_one in turns.items()}
    return {
        name: {
            "ms": asdict(Spread.of(times)),
            "mb_per_s": asdict(Spread.of([moved[name] / time * 1e3 for time in times])),
            "ratio": asdict(Spread.of(quotients(times, rounds[ALL_REDUCE]))),
        }
        for name, times in rounds.items()
    }


def _text(content: Mapping[str, Any]) -> str:
    names = list(next(iter(content["summary"].values())))
    rows = []
    for size, found in content["summary"].items():
        cells = [
            f"{found[name]['mb_per_s']['median']:,.0f} ({found[name]['ratio']['median']:.2f}x)"
            for name in names
        ]
        rows.append([f"{size} MB", *cells])
    head = [f"{content['ranks']} ranks, {content['backend']}: MB/s (time to all_reduce's)", *names]
    return "\n".join([report.table(head, rows), "", COUNTED])


def _panels(content: Mapping[str, Any]) -> Sequence[report.Panel]:
    panels = []
    for size, found in content["summary"].items():
        bars = {
            name: tuple(row["mb_per_s"][key] for key in ("median", "low", "high"))
            for name, row in found.items()
        }
        ours = [name for name in bars if name.startswith("ours")]
        panels.append(report.Panel(f"buckets of {size} MB", "MB/s", bars, ours))
    return panels
