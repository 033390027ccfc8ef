"""Several ranks: every check that one rank cannot make, ``python -m sharded_lamb.gpu_check.ranks cpu|cuda``.

`SECTION` runs it on ranks that share one GPU, under NCCL; in a rehearsal under gloo.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sharded_lamb import ShardedLamb, checkpoint, shapes
from sharded_lamb.gpu_check import processes
from sharded_lamb.gpu_check.battery import Findings, Section, Setting
from sharded_lamb.gpu_check.host import captured_and_eager
from sharded_lamb.gpu_check.training import (
    CPU,
    STAGES,
    GivenRun,
    name_of,
    rank,
    result_of,
    small_model,
    train_small,
)
from sharded_lamb.verify import verify

WORLD_SIZES = (2, 3)
RANKS_S = 60.0
"""Seconds that the battery must have left for both world sizes, each of which takes at most as many."""


def ranks(setting: Setting, found: Findings) -> str:
    """The checks of `PARTS`, by world size."""
    for world_size in WORLD_SIZES if setting.on_gpu else WORLD_SIZES[:1]:
        timeout = max(RANKS_S / 2, min(RANKS_S, setting.seconds_left))
        of_parts = processes.rows_of(__name__, setting.device, world_size, timeout)
        for row in of_parts:
            holds = row["checks"] > 0 and not row["failures"]
            found.check(f"{row['part']}, ranks: {world_size}", holds, row["found"])
        parts = [row["part"] for row in of_parts]
        found.check(f"parts, ranks: {world_size}", parts == parts_on(setting.device), ", ".join(parts))
    return f"{', '.join(parts_on(setting.device))}: pass"


def parts_on(device: torch.device) -> list[str]:
    """The names of `PARTS` that ``device`` can run."""
    return [name for name in PARTS if name != "graph" or device.type == "cuda"]


def main(kind: str) -> int:
    """Run every part on this rank; one that raises ends it, and `processes.rows_of` the others, which wait."""
    device = processes.joined_group(kind)
    setting = Setting(device, "triton" if device.type == "cuda" else "torch", time.monotonic() + RANKS_S)
    for row in rows(setting):
        processes.print_row(row)
    dist.destroy_process_group()
    return 0


def rows(setting: Setting) -> Iterator[dict[str, Any]]:
    """A row a part: the failures of all ranks, else what this rank has found. Collective.

    Raises:
        Exception: a part's, on the rank where it occurs.
    """
    for name in parts_on(setting.device):
        found = Findings()
        PARTS[name](setting, found)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (found.checks, found.failures))
        failures = [f"rank {number}: {text}" for number, (_, texts) in enumerate(everyone) for text in texts]
        checks = min(count for count, _ in everyone)
        yield {"part": name, "checks": checks, "failures": len(failures), "found": failures or found.rows}


def exact(setting: Setting, found: Findings) -> None:
    """Stages x dtypes against a single-process fp64 LAMB; the ranks' bits are equal."""
    for stage in STAGES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            steps = 4 if setting.on_gpu else 1
            done = verify(shapes.load("tiny"), steps=steps, stage=stage, dtype=dtype, device=setting.device)
            found.check(f"stage {stage} {name_of(dtype)}", done.passed, "; ".join(done.problems[:3]))


def bits(setting: Setting, found: Findings) -> None:
    """The device's backend and kernel against gloo and stock operations on the CPU, to the bit.

    Gradients travel in fp32: in 16 bits NCCL sums in 16 bits.
    """
    for stage in STAGES:
        for dtype, splits in ((torch.float32, False), (torch.bfloat16, True)):
            run = GivenRun(stage, dtype, remainders=splits, micro_batches=2, reduce_dtype=torch.float32)
            ours, expected = run.trained(setting.device, setting.kernel), run.trained(CPU, "torch")
            _compare(found, f"stage {stage} {name_of(dtype)}", ours, expected)
        run = GivenRun(stage, gather_dtype=torch.bfloat16)
        ours, expected = run.trained(setting.device, setting.kernel), run.trained(CPU, "torch")
        if dist.get_world_size() == 2:
            found.equal(f"stage {stage} gathered in bfloat16", ours, expected)
    run = GivenRun(2, reduce_dtype=torch.float8_e4m3fn)  # summed here, in one order on every backend
    found.equal("reduced in 8 bits", run.trained(setting.device, setting.kernel), run.trained(CPU, "torch"))


def _compare(found: Findings, name: str, ours: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Check sums of two backends: of two ranks to the bit; with more, the order of a sum shows."""
    if dist.get_world_size() == 2:
        found.equal(name, ours, expected)
    else:
        found.within(name, ours, expected, 1e-2 if ours[0].dtype == torch.bfloat16 else 1e-5)


def side_stream(setting: Setting, found: Findings) -> None:
    """Stage 2 on another stream than the constructor's, with buckets in flight."""
    run = GivenRun(2, width=1500, micro_batches=2)
    stream = torch.cuda.Stream() if setting.on_gpu else None  # type: ignore[no-untyped-call]
    ours = run.trained(setting.device, setting.kernel, stream)
    found.equal("equal to a run on one stream", ours, run.trained(setting.device, setting.kernel))


def frameworks(setting: Setting, found: Findings) -> None:
    """Stage 1 under DistributedDataParallel, and FSDP2, against stage 2."""

    def make(model: nn.Module, stage: Any = 1) -> ShardedLamb:
        return ShardedLamb(model.named_parameters(), lr=0.01, max_grad_norm=1.0, stage=stage)

    mesh = init_device_mesh(setting.device.type, (dist.get_world_size(),))

    def sharded(model: nn.Module) -> nn.Module:
        for layer in model.children():
            if any(True for _ in layer.parameters()):
                fully_shard(layer, mesh=mesh)
        return fully_shard(model, mesh=mesh)  # type: ignore[return-value]

    expected = train_small(lambda model: make(model, 2), setting.device).weights
    wrappers: dict[str, Callable[[nn.Module], nn.Module]] = {
        "DistributedDataParallel": DistributedDataParallel,
        "fully_shard": sharded,
    }
    for name, wrap in wrappers.items():
        found.within(name, train_small(make, setting.device, wrap=wrap).weights, expected, 1e-6)


def move(setting: Setting, found: Findings) -> None:
    """A model that moves to the device after construction, and back and forth later, against one that is there."""
    for stage in STAGES:
        run = GivenRun(stage, torch.bfloat16, reduce_dtype=torch.float32)
        expected = run.trained(setting.device, "torch")
        places = [setting.device, CPU, setting.device]
        _compare(found, f"stage {stage}", result_of(*run.run(CPU, "torch", moves=places)), expected)


def overflow(setting: Setting, found: Findings) -> None:
    """GradScaler: gradients that overflow on the last rank alone skip the step on every rank."""
    last = rank() == dist.get_world_size() - 1
    scaler = torch.amp.GradScaler(setting.device.type, init_scale=2.0**10)
    trained = train_small(
        lambda model: ShardedLamb(model.named_parameters(), lr=0.01, stage=2),
        setting.device,
        scaler=scaler,
        overflow_at=2 if last else None,
    )
    result = (scaler.get_scale(), trained.optimizer.skipped_steps)
    found.check("scale, skipped steps", result == (512.0, 1), list(result))


def states(setting: Setting, found: Findings) -> None:
    """save and async_save; what a fresh model and optimizer load has the bits of what was saved."""
    run = GivenRun(2, torch.bfloat16)
    model, optimizer = run.run(setting.device, setting.kernel)
    expected = result_of(model, optimizer)
    with tempfile.TemporaryDirectory() as mine:
        folder = [mine]
        dist.broadcast_object_list(folder)
        checkpoint.save(Path(folder[0], "save"), model, optimizer)
        checkpoint.async_save(Path(folder[0], "async_save"), model, optimizer).result()
        dist.barrier()
        for name in ("save", "async_save"):
            loaded = GivenRun(2, torch.bfloat16, steps=1).run(setting.device, setting.kernel)
            checkpoint.load(Path(folder[0], name), *loaded)
            found.equal(name, result_of(*loaded), expected)
        dist.barrier()


def graph(setting: Setting, found: Findings) -> None:
    """Backward and step of stage 2 in one CUDA graph with the collectives, against an eager twin."""
    captured_and_eager(setting, found, 2, alone=False)


def mistakes(setting: Setting, found: Findings) -> None:
    """A rank that differs is an error on every rank: in a learning rate, and in a shape at construction."""
    model = small_model(setting.device)
    optimizer = ShardedLamb(model.named_parameters(), lr=0.01)
    optimizer.param_groups[0]["lr"] *= 1 + rank()
    message = "no error"
    try:
        for _ in range(3):  # on a GPU a step after the one that differs
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    except ValueError as error:
        message = str(error)
    found.check("learning rates", "lr" in message, message)
    layer, message = nn.Linear(8, 8 + rank()).to(setting.device), "no error"
    try:
        ShardedLamb(layer.named_parameters(), lr=0.01)
    except ValueError as error:
        message = str(error)
    found.check("shapes", "weight" in message, message)


PARTS: dict[str, Callable[[Setting, Findings], None]] = {
    "exact": exact,
    "bits": bits,
    "side stream": side_stream,
    "frameworks": frameworks,
    "move": move,
    "overflow": overflow,
    "states": states,
    "mistakes": mistakes,
    "graph": graph,
}
SECTION = Section("ranks", "Two and three ranks on one GPU", RANKS_S, ranks)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
