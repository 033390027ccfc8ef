"""Bandwidth of the two passes on a GPU, relative to that of a copy.

    python -m sharded_lamb.bench.gpu_kernels --shapes bert-large --model bfloat16

Updates one rank's share of a model, in 32 MiB buckets as `ShardedLamb` plans them. Every round times a copy on the
device, pass 1 with its sums, and pass 2 in the calls of a step, in turn. Bandwidth counts the bytes that must move; a
ratio to the copy is the median of the rounds' ratios.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sharded_lamb import shapes
from sharded_lamb.core import rule
from sharded_lamb.core.layout import BLOCK, Bucket, plan_buckets
from sharded_lamb.core.rule import COLUMNS
from sharded_lamb.kernels import FlatShard, Kernel, ReferenceKernel, remainders
from sharded_lamb.kernels.engine import _batches
from sharded_lamb.kernels.triton_kernel import TritonKernel, usable

BUCKET_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Work:
    """The memory that one round updates."""

    shards: list[FlatShard]
    table: Tensor
    sums: Tensor
    step_sizes: Tensor

    @property
    def elements(self) -> int:
        return sum(shard.weight.numel() for shard in self.shards)

    def pass_1(self, kernel: Kernel) -> None:
        kernel.moments_and_norms(self.shards, self.table, self.sums)

    def pass_2(self, kernel: Kernel) -> None:
        for together in _batches([[shard] for shard in self.shards], are_gathered=True):
            kernel.apply([self.shards[index] for index in together], self.table, self.step_sizes)

    def bytes_of(self, passes: int) -> int:
        """Bytes that pass 1 or 2 moves: fp32 masters (or remainders), gradients, moments, and the model's copy."""
        first = self.shards[0]
        copy = 0 if first.model is None or first.master_format.beside_weight else first.model.itemsize
        return self.elements * ((24, 16)[passes - 1] + copy)


def work(name: str, model: torch.dtype | None, ranks: int, device: torch.device, *, splits: bool) -> Work:
    numels = [torch.Size(shape).numel() for shape in shapes.named(name).values()]
    itemsize = 4 if model is None else model.itemsize
    buckets = plan_buckets(numels, [None] * len(numels), [itemsize] * len(numels), BUCKET_BYTES, ranks)
    rows = torch.full((len(numels), len(COLUMNS)), 0.5, dtype=torch.float64, device=device)
    return Work(
        [_shard(bucket, model, device, splits) for bucket in buckets],
        rule.table(rule.Coefficients(*rows.unbind(1)), torch.float32),
        torch.zeros(2, len(numels), dtype=torch.float64, device=device),
        torch.full((1, len(numels)), 1e-6, device=device),
    )


def _shard(bucket: Bucket, model: torch.dtype | None, device: torch.device, splits: bool) -> FlatShard:
    """The first rank's shard of a bucket, filled with random numbers."""
    numel = bucket.shard_numel
    owners = torch.full((numel // BLOCK,), bucket.params[0], device="cpu")
    for segment in bucket.segments(0):
        first = segment.shard_start // BLOCK
        owners[first : -(-(segment.shard_start + segment.length) // BLOCK)] = segment.param
    weight, grad, exp_avg = (torch.randn(numel, device=device) for _ in range(3))
    copy = None if model is None else weight.to(model)
    if splits:
        copy, weight = remainders.split(weight)
    return FlatShard(weight, copy, grad, exp_avg, torch.rand(numel, device=device), owners.to(device))


def milliseconds(run: Callable[[], object], repeats: int) -> float:
    """Device time of one run, averaged over ``repeats``."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / repeats


def measured(kernel: Kernel, share: Work, rounds: int, repeats: int) -> str:
    """One backend's times and bandwidths, as a line of text."""
    source = torch.empty(256 << 20, dtype=torch.uint8, device=share.table.device)
    target = torch.empty_like(source)
    runs = (lambda: target.copy_(source)), (lambda: share.pass_1(kernel)), (lambda: share.pass_2(kernel))
    moved = 2 * source.nbytes, share.bytes_of(1), share.bytes_of(2)
    for run in runs:
        milliseconds(run, 3)  # compiles, and copies the addresses of the shards to the device
    times = [[milliseconds(run, repeats) for run in runs] for _ in range(rounds)]
    speeds = [[size / time * 1e-6 for size, time in zip(moved, row, strict=True)] for row in times]
    copy, first, second = (statistics.median(column) for column in zip(*speeds, strict=True))
    ratios = [statistics.median(row[i] / row[0] for row in speeds) for i in (1, 2)]
    return (
        f"{kernel.name}: {statistics.median(row[1] + row[2] for row in times):.3f} ms; copy {copy:,.0f} GB/s, pass 1 "
        f"{first:,.0f} GB/s ({ratios[0]:.0%} of the copy), pass 2 {second:,.0f} GB/s ({ratios[1]:.0%})"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one line per backend. Returns 0, or 1 without a GPU."""
    parser = argparse.ArgumentParser(prog="sharded_lamb.bench.gpu_kernels")
    parser.add_argument("--shapes", default="bert-large")
    parser.add_argument(
        "--model", choices=["bfloat16", "float16"], help="masters beside weights of this dtype"
    )
    parser.add_argument(
        "--store-param-remainders", action="store_true", help="16 bits of the masters (--model bfloat16)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="shards of the model, of which one is updated")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10, help="runs timed together")
    chosen = parser.parse_args(arguments)
    splits = chosen.store_param_remainders
    if splits and chosen.model != "bfloat16":
        parser.error("--store-param-remainders needs --model bfloat16")
    device = torch.device("cuda")
    reason = usable(device)
    if reason is not None:
        print(f"cannot measure: {reason}", file=sys.stderr)
        return 1
    model = None if chosen.model is None else getattr(torch, chosen.model)
    share = work(chosen.shapes, model, chosen.ranks, device, splits=splits)
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}: {share.elements:,} elements")
    backends: list[Kernel] = [TritonKernel(), ReferenceKernel()]
    for kernel in backends:
        print(measured(kernel, share, chosen.rounds, chosen.repeats))
    return 0


if __name__ == "__main__":
    sys.exit(main())
