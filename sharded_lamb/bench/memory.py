"""``sharded-lamb bench memory``: peak memory of every contestant, each in processes of its own.

Every rank starts a child process for each contestant, one after the other, so that nobody inherits what another one
left in the allocator; the children of one contestant form a process group of their own.
"""

import argparse
import json
import math
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # every optimizer of torch imports it when it is made: part of the baseline
import torch.distributed as dist

from sharded_lamb import shapes
from sharded_lamb.bench import report
from sharded_lamb.bench.contestants import BARE, OURS, PEERS, Kind, Setting, choose
from sharded_lamb.bench.timing import world
from sharded_lamb.bench.workload import Workload

COUNTED = (
    "peak: the most resident memory (on a GPU: allocated) of the rank that had most, in construction and steps; "
    "baseline: the same after imports and joining the process group. formula, of ours in fp32: 4 B of parameters, 4 B "
    "of gradients, 8/W of state and 4/W of gradient shard an element, and staging. Every contestant runs with "
    "MALLOC_MMAP_THRESHOLD_=1048576."
)

_TIMEOUT_S = 600
MB = 1e6

GIVES_BACK = "MALLOC_MMAP_THRESHOLD_", str(1 << 20)
"""Lets glibc give back what tensors of a MiB and more held; by default it keeps freed memory of up to 32 MiB a tensor,
which is noise of 100 to 200 MB in every contestant."""


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints and writes. Returns what the JSON holds. Collective.

    Raises:
        ValueError: a shape or a peer that is not known, or a child process that failed, with its last words.
    """
    _, world_size = world()
    parameters = shapes.load(chosen.shapes)
    kinds, skipped = choose(chosen.peers, chosen.stage, world_size, list(parameters.values()))
    kinds = [BARE, *kinds]
    elements = sum(math.prod(shape) for shape in parameters.values())
    found = {}
    for kind in kinds:
        report.progress(kind.name)
        found[kind.name] = _everyones(_child(kind, chosen, device))
    content = {
        **report.about(device),
        "benchmark": "memory",
        "counted": COUNTED,
        "shapes": {"name": chosen.shapes, "tensors": len(parameters), "elements": elements},
        "bucket_mb": chosen.bucket_mb,
        "steps": chosen.steps,
        "titles": {kind.name: kind.titled(world_size) for kind in kinds},
        "summary": {name: _summarize(ranks, elements, world_size) for name, ranks in found.items()},
        "ranks_bytes": found,
        "skipped": skipped,
    }
    report.publish(chosen, _text(content), content, _panels(content))
    return content


def _everyones(mine: dict[str, Any]) -> list[dict[str, Any]]:
    """What all ranks' children said; where one failed, every rank raises."""
    _, world_size = world()
    found: list[Any] = [mine]
    if world_size > 1:
        found = [None] * world_size
        dist.all_gather_object(found, mine)
    failed = [said["error"] for said in found if "error" in said]
    if failed:
        raise ValueError(failed[0])
    return found


def _child(kind: Kind, chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Runs this rank's child. {"error": …} where it failed. Collective."""
    rank, world_size = world()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    environment.setdefault(*GIVES_BACK)
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    environment |= {"MASTER_ADDR": os.environ.get("MASTER_ADDR", "localhost"), "MASTER_PORT": str(_port())}
    arguments = [kind.name, chosen.shapes, str(chosen.bucket_mb), str(chosen.steps), str(device)]
    command = [sys.executable, "-m", "sharded_lamb.bench.memory", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"{kind.name} did not end within {_TIMEOUT_S} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": f"{kind.name} failed on rank {rank}: {last}"}
    said: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return said


def _port() -> int:
    """A port that was free on the first rank a moment ago; the same on every rank."""
    rank, world_size = world()
    found = [0]
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            found = [free.getsockname()[1]]
    if world_size > 1:
        dist.broadcast_object_list(found, 0)
    return found[0]


def peak_bytes(device: torch.device) -> int:
    """The most memory that this process has had."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss begins with what the parent had when it forked; VmHWM is this process's own.
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    unit = 1 if sys.platform == "darwin" else 1024
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(arguments: Sequence[str]) -> dict[str, Any]:
    """One rank of one contestant. ``arguments``: its name, shapes, bucket_mb, steps, device."""
    name, shape_list, bucket_mb, steps, where = arguments
    device = torch.device(where)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if int(os.environ["WORLD_SIZE"]) > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        dist.barrier()
    kind = {BARE.name: BARE, **{ours.name: ours for ours in OURS.values()}, **PEERS}[name]
    if "deepspeed" in kind.needs:
        import deepspeed  # noqa: F401
    rank, world_size = world()
    workload = Workload(shapes.load(shape_list), rank, device)
    baseline = peak_bytes(device)
    contestant = kind.build(Setting(workload, world_size, float(bucket_mb)))
    for _ in range(int(steps)):
        contestant.iterate()
    found = {"baseline": baseline, "peak": peak_bytes(device), "by_kind": contestant.bytes_by_kind()}
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return found


def formula(elements: int, world_size: int, staging: int) -> float:
    """Bytes a rank of ours in fp32, padding left out."""
    return elements * (4 + 4 + 8 / world_size + 4 / world_size) + staging


def _summarize(ranks: Sequence[Mapping[str, Any]], elements: int, world_size: int) -> dict[str, Any]:
    most = max(ranks, key=lambda said: said["peak"])
    row = {"peak": most["peak"], "baseline": most["baseline"], "own": most["peak"] - most["baseline"]}
    if most["by_kind"] is not None:
        row["held_by_optimizer"] = sum(most["by_kind"].values())
        row["formula"] = formula(elements, world_size, most["by_kind"]["staging"])
    return row


def _text(content: Mapping[str, Any]) -> str:
    rows = []
    for name, row in content["summary"].items():
        own = [f"{row[key] / MB:,.0f}" if key in row else "" for key in ("held_by_optimizer", "formula")]
        rows.append(
            [
                content["titles"][name],
                f"{row['peak'] / MB:,.0f}",
                f"{row['baseline'] / MB:,.0f}",
                f"{row['own'] / MB:,.0f}",
                f"{row['own'] / content['shapes']['elements']:.1f}",
                *own,
            ]
        )
    head = [f"{content['shapes']['name']}, {content['ranks']} ranks: MB a rank", "peak", "baseline"]
    head += ["peak - baseline", "B an element", "optimizer.memory()", "formula"]
    lines = [report.table(head, rows), "", COUNTED]
    return "\n".join([*lines, *(f"without {name}: {why}" for name, why in content["skipped"].items())])


def _panels(content: Mapping[str, Any]) -> list[report.Panel]:
    bars = {}
    for name, row in content["summary"].items():
        peak = row["peak"] / MB
        bars[content["titles"][name]] = (peak, peak, peak)
    title = f"{content['shapes']['name']}, {content['ranks']} ranks: peak memory a rank"
    ours = [content["titles"][name] for name in content["summary"] if name.startswith("ours")]
    return [report.Panel(title, "MB", bars, ours)]


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1:])))
