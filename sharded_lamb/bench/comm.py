"""``sharded-lamb bench comm``: compares our exchanges with torch's collectives, by bucket size."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb import kernels
from sharded_lamb.bench import report
from sharded_lamb.bench.timing import Clock, Spread, Turns, by_round, quotients, take_turns, world
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.topology import Topology
from sharded_lamb.core.layers import Layers
from sharded_lamb.core.layout import plan_buckets
from sharded_lamb.gradients.exchange import Staging
from sharded_lamb.sharding.buckets import FlatBucket, Precision

ALL_REDUCE = "all_reduce"

PAIR = "point to point"

SMALLEST = 8
"""Bytes of the message that measures the latency."""

COUNTED = (
    "MB/s: bytes of the bucket over the time of the slowest rank. A reduce-scatter is counted until the averaged fp32 "
    "shard is there (ours with its squares summed), a gather until the whole bucket is. point to point: every rank "
    "sends its neighbour the (W-1)/W of a bucket that either must move, and receives as many; its MB/s are of those."
)


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints, writes; returns the content of the JSON. Collective.

    Raises:
        ValueError: there is one rank, or a size is not a number > 0.
    """
    _, world_size = world()
    sizes = _sizes(chosen.mb)
    if world_size == 1:
        raise ValueError("comm measures exchanges between ranks, and there is one: run it under torchrun")
    collectives, clock = Collectives(Topology.of(None, None), device), Clock(device)
    turns = {}
    for size in sizes:
        turns[f"{size:g}"] = take_turns(
            Exchanges(collectives, size, device).actions(), clock, rounds=chosen.rounds, title=f"{size:g} MB"
        )
    smallest = take_turns({PAIR: _smallest(device)}, clock, rounds=chosen.rounds)[PAIR]
    summary = {size: summarize(each, float(size), world_size) for size, each in turns.items()}
    content = {
        **report.about(device),
        "benchmark": "comm",
        "counted": COUNTED,
        "reference": ALL_REDUCE,
        "wire_bytes_per_second": wire_bytes_per_second(summary),
        "latency_seconds": Spread.of(by_round(smallest)).median / 1e3,
        "summary": summary,
        "rounds_ms": turns,
        "smallest_rounds_ms": smallest,
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


class Exchanges:
    """The timed actions on one fp32 bucket of ``size_mb`` MB, and their memory."""

    def __init__(self, collectives: Collectives, size_mb: float, device: torch.device) -> None:
        self.collectives, self.world_size = collectives, collectives.world_size
        (plan,) = plan_buckets([max(int(size_mb * 1e6 / 4), 1)], [0], [4], 1, self.world_size)
        precision = Precision.of(torch.float32, torch.float32, torch.float32, None)
        param = torch.zeros(plan.numels[0], device=device)
        rank = collectives.topology.shard_rank
        layers = Layers([1], plan.numels)
        self.bucket = FlatBucket(plan, [param], layers, precision, rank, device, holds_gradients=True)
        self.grad = torch.zeros_like(param)  # source of our reductions
        self.full = torch.zeros(
            plan.numel, device=device
        )  # source of torch's reductions, target of its gathers
        self.shard = torch.zeros(plan.shard_numel, device=device)
        self.kernel, self.staging = kernels.choose("auto", device), Staging([self.bucket], collectives)
        self.sums = torch.zeros(1, dtype=torch.float64, device=device)
        self.steps = torch.zeros(1, dtype=torch.float64, device=device)
        self.sent = torch.zeros(plan.numel - plan.shard_numel, device=device)
        self.arrived = torch.empty_like(self.sent)

    def actions(self) -> dict[str, Callable[[], object]]:
        return {
            ALL_REDUCE: lambda: dist.all_reduce(self.full),
            "ours: reduce-scatter": self.our_reduce_scatter,
            "reduce_scatter_tensor": self.their_reduce_scatter,
            "ours: all-gather": lambda: self.collectives.all_gather(self.bucket.flat).wait(),
            "all_gather_into_tensor": self.their_all_gather,
            PAIR: self.point_to_point,
        }

    def our_reduce_scatter(self) -> None:
        """As stage 2: averages into the bucket's gradient shard."""
        exchange = self.staging.exchange(0, self.bucket)
        exchange.start([self.grad], self.steps).wait()
        received = exchange.received([self.grad])
        self.kernel.average(self.bucket.shard, self.bucket.segments, received, self.sums, add=False)

    def their_reduce_scatter(self) -> None:
        reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
        reduce_scatter(self.shard, self.full)
        self.shard.div_(self.world_size)

    def their_all_gather(self) -> None:
        all_gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        all_gather(self.full, self.shard)

    def point_to_point(self) -> None:
        _pass_on(self.sent, self.arrived)


def _pass_on(sent: Tensor, arrived: Tensor) -> None:
    """Send to the next rank and receive from the previous one at once. Collective."""
    rank, world_size = world()
    works = [
        dist.irecv(arrived, (rank - 1) % world_size),
        dist.isend(sent, (rank + 1) % world_size),
    ]
    for work in works:
        assert work is not None
        work.wait()


def _smallest(device: torch.device) -> Callable[[], None]:
    sent = torch.zeros(SMALLEST, dtype=torch.uint8, device=device)
    arrived = torch.empty_like(sent)
    return lambda: _pass_on(sent, arrived)


def wire_bytes_per_second(summary: Mapping[str, Mapping[str, Any]]) -> float:
    """Bytes a second that a rank sends while it receives as much: point to point, at the largest size."""
    largest = max(summary, key=float)
    return float(summary[largest][PAIR]["mb_per_s"]["median"]) * 1e6


def summarize(turns: Mapping[str, Turns], size_mb: float, world_size: int) -> dict[str, dict[str, Any]]:
    """For each action: spreads of the time, of the rate, and of the time over all_reduce's by round."""
    moved = {name: size_mb * (1 - 1 / world_size) if name == PAIR else size_mb for name in turns}
    rounds = {name: by_round(each) for name, each in turns.items()}
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
    for size, actions in content["summary"].items():
        cells = [
            f"{actions[name]['mb_per_s']['median']:,.0f} ({actions[name]['ratio']['median']:.2f}x)"
            for name in names
        ]
        rows.append([f"{size} MB", *cells])
    head = [f"{content['ranks']} ranks, {content['backend']}: MB/s (time to all_reduce's)", *names]
    return "\n".join([report.table(head, rows), "", COUNTED])


def _panels(content: Mapping[str, Any]) -> Sequence[report.Panel]:
    panels = []
    for size, actions in content["summary"].items():
        bars = {
            name: tuple(row["mb_per_s"][key] for key in ("median", "low", "high"))
            for name, row in actions.items()
        }
        ours = [name for name in bars if name.startswith("ours")]
        panels.append(report.Panel(f"buckets of {size} MB", "MB/s", bars, ours))
    return panels
