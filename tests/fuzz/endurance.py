"""Trains for long with everything on, and watches what a process holds::

    python -m tests.fuzz.endurance --steps 20000

Two ranks, stage 2: steps, skipped steps, evaluations, saves and asynchronous saves. At intervals it counts memory,
descriptors, threads, live tensors, live objects and process groups. Exits with 1 if one of them grows.
"""

import argparse
import gc
import json
import os
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.checkpoint import Checkpoints
from tests.harness import run_ranks

WORLD = 2
SKIP_EVERY, EVALUATE_EVERY, SAVE_EVERY, ASYNC_SAVE_EVERY = 17, 10, 50, 70
MOST_GROWTH_MIB = 16.0
SPARE = {"descriptors": 2, "threads": 1, "tensors": 20, "objects": 2000, "groups": 0}
"""Growth from the first count to the last that is no leak: a save in flight, caches that fill late (every save
of the first rank adds a pattern to pathlib's and re's, which hold 128 and 512)."""


@dataclass(frozen=True)
class Count:
    """One count of one rank; ``seconds`` for the steps since the count before."""

    step: int
    rss_mib: float
    descriptors: int
    threads: int
    tensors: int
    objects: int
    groups: int
    seconds: float


def count(step: int, seconds: float) -> Count:
    gc.collect()
    objects = gc.get_objects()
    statm = Path("/proc/self/statm").read_text().split()
    return Count(
        step=step,
        rss_mib=int(statm[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20,
        descriptors=len(os.listdir("/proc/self/fd")),
        threads=len(os.listdir("/proc/self/task")),
        tensors=sum(issubclass(type(o), Tensor) for o in objects),
        objects=len(objects),
        groups=len(dist.distributed_c10d._world.pg_map),
        seconds=seconds,
    )


def train(rank: int, steps: int, every: int, folder: str) -> list[Count]:
    """One rank's counts, after ``every`` steps each; the first comes after as many steps of warm-up."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 10))
    optimizer = ShardedLamb(model.named_parameters(), lr=1e-3, stage=2, bucket_mb=0.01, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    saved = Checkpoints(folder, keep=2)
    generator = torch.Generator().manual_seed(rank)
    counts, began = [], time.perf_counter()
    for step in range(1, steps + 1):
        x = torch.randn(16, 64, generator=generator)
        loss = model(x).square().mean()
        if step % SKIP_EVERY == 0 and rank == step % WORLD:
            loss = loss * torch.nan
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % EVALUATE_EVERY == 0:
            _evaluate(model, optimizer, x)
        if step % SAVE_EVERY == 0:
            saved.save(step, model, optimizer)
        elif step % ASYNC_SAVE_EVERY == 0:
            saved.async_save(step, model, optimizer)
        if step % every == 0:
            saved.wait()
            counts.append(count(step, time.perf_counter() - began))
            began = time.perf_counter()
    assert optimizer.skipped_steps == steps // SKIP_EVERY
    return counts


def _evaluate(model: nn.Module, optimizer: ShardedLamb, x: Tensor) -> None:
    model.eval()
    with torch.no_grad():
        model(x)
    model.train()
    optimizer.trust_ratios()
    optimizer.state_dict()


def growth(counts: list[Count]) -> list[str]:
    """The counts that are not flat, of one rank."""
    first, last = asdict(counts[0]), asdict(counts[-1])
    grown = [
        f"{kind}: {first[kind]} after {counts[0].step} steps, {last[kind]} after {counts[-1].step}"
        for kind, spare in SPARE.items()
        if last[kind] > first[kind] + spare
    ]
    if last["rss_mib"] > first["rss_mib"] + MOST_GROWTH_MIB:
        grown.append(f"memory: {first['rss_mib']:.1f} MiB, then {last['rss_mib']:.1f} MiB")
    return grown


def main() -> int:
    """Returns the exit code: 1 if a count grows."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.endurance", description="Long training, counted."
    )
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=int, default=1_000, help="steps between counts")
    parser.add_argument("--out", type=Path, help="a file of one JSON row per count of a rank")
    args = parser.parse_args()
    if args.steps < args.every:
        parser.error(f"--steps must be at least --every ({args.every}), got {args.steps}")
    folder = tempfile.mkdtemp(prefix="endurance-")
    try:
        ranks = run_ranks(WORLD, train, args.steps, args.every, folder, timeout=max(600.0, args.steps))
    finally:
        shutil.rmtree(folder)
    rows: list[dict[str, Any]] = [
        {"rank": rank, **asdict(row)} for rank, counts in enumerate(ranks) for row in counts
    ]
    print("".join(f"{key:>12}" for key in rows[0]))
    for row in rows:
        print("".join(f"{round(value, 2):>12}" for value in row.values()))
    if args.out is not None:
        args.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ratio = ranks[0][-1].seconds / ranks[0][0].seconds
    print(f"time of the last {args.every} steps / of the first: {ratio:.2f}")
    grown = [f"rank {rank}: {line}" for rank, counts in enumerate(ranks) for line in growth(counts)]
    print("\n".join(grown) or "flat")
    return 1 if grown else 0


if __name__ == "__main__":
    sys.exit(main())
