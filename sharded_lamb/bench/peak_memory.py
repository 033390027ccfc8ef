"""``sharded-lamb bench memory``: peak memory of every candidate, each in processes of its own.

Every rank starts a child process for each candidate, one after the other, so that none inherits another's allocator
state; the children of one candidate form a process group of their own.
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
import torch._dynamo  # the construction of any torch optimizer imports it: part of the baseline
import torch.distributed as dist

from sharded_lamb import shapes
from sharded_lamb.bench import report
from sharded_lamb.bench.candidates import BARE, OURS, PEERS, Kind, Setting, choose
from sharded_lamb.bench.timing import world
from sharded_lamb.bench.workload import Workload
from sharded_lamb.comm.progress import with_progress

COUNTED = (
    "peak: the most resident memory (on a GPU: allocated) of the rank that had most, in construction and steps; "
    "baseline: the same after imports and joining the process group. formula, of ours in fp32: 4 B of parameters, 4 B "
    "of gradients, 8/W of state and 4/W of gradient shard an element, and staging. Every candidate runs with "
    "MALLOC_MMAP_THRESHOLD_=1048576."
)

_TIMEOUT_S = 600
MB = 1e6

MMAP_THRESHOLD = "MALLOC_MMAP_THRESHOLD_", str(1 << 20)
"""Makes glibc return the freed memory of tensors of a MiB and more; by default it keeps up to 32 MiB a tensor, which is
noise of 100 to 200 MB in every candidate."""


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints, writes; returns the content of the JSON. Collective.

    Raises:
        ValueError: an unknown shape list or peer, or a child process that failed; shows its last line.
    """
    _, world_size = world()
    parameters = shapes.load(chosen.shapes)
    kinds, skipped = choose(chosen.peers, chosen.stage, world_size, list(parameters.values()))
    kinds = [BARE, *kinds]
    elements = sum(math.prod(shape) for shape in parameters.values())
    by_kind = {}
    for kind in with_progress(kinds, "bench memory", lambda kind: kind.name):
        by_kind[kind.name] = _all_ranks(_child(kind, chosen, device))
    content = {
        **report.about(device),
        "benchmark": "memory",
        "counted": COUNTED,
        "shapes": {"name": chosen.shapes, "tensors": len(parameters), "elements": elements},
        "bucket_mb": chosen.bucket_mb,
        "steps": chosen.steps,
        "titles": {kind.name: kind.titled(world_size) for kind in kinds},
        "summary": {name: _summarize(ranks, elements, world_size) for name, ranks in by_kind.items()},
        "ranks_bytes": by_kind,
        "skipped": skipped,
    }
    report.publish(chosen, _text(content), content, _panels(content))
    return content


def _all_ranks(own: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of all ranks' children. Collective.

    Raises:
        ValueError: a child failed; on every rank.
    """
    _, world_size = world()
    results: list[Any] = [own]
    if world_size > 1:
        results = [None] * world_size
        dist.all_gather_object(results, own)
    failed = [result["error"] for result in results if "error" in result]
    if failed:
        raise ValueError(failed[0])
    return results


def _child(kind: Kind, chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Run this rank's child; returns its result, or {"error": …} if it failed. Collective."""
    rank, world_size = world()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    environment.setdefault(*MMAP_THRESHOLD)
    environment |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
    environment |= {"MASTER_ADDR": os.environ.get("MASTER_ADDR", "localhost"), "MASTER_PORT": str(_port())}
    arguments = [kind.name, chosen.shapes, str(chosen.bucket_mb), str(chosen.steps), str(device)]
    command = [sys.executable, "-m", "sharded_lamb.bench.peak_memory", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"error": f"{kind.name} did not end within {_TIMEOUT_S} s"}
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"error": f"{kind.name} failed on rank {rank}: {last}"}
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def _port() -> int:
    """A port that was free on the first rank a moment ago; the same on every rank. Collective."""
    rank, world_size = world()
    port = [0]
    if rank == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            port = [free.getsockname()[1]]
    if world_size > 1:
        dist.broadcast_object_list(port, 0)
    return port[0]


def peak_bytes(device: torch.device) -> int:
    """This process's peak memory: resident, or on a GPU allocated."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # ru_maxrss starts at the parent's value at the fork; VmHWM is this process's own.
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    peaks = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    unit = 1 if sys.platform == "darwin" else 1024
    return peaks[0] if peaks else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def child(arguments: Sequence[str]) -> dict[str, Any]:
    """Runs one rank of one candidate; returns its peak, its baseline and its bytes by kind.

    Args:
        arguments: the candidate's name, shapes, bucket_mb, steps, device.
    """
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
    candidate = kind.build(Setting(workload, world_size, float(bucket_mb)))
    for _ in range(int(steps)):
        candidate.iterate()
    result = {"baseline": baseline, "peak": peak_bytes(device), "by_kind": candidate.bytes_by_kind()}
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
    return result


def formula(elements: int, world_size: int, staging: int) -> float:
    """Bytes that one rank of ours holds in fp32, without padding."""
    return elements * (4 + 4 + 8 / world_size + 4 / world_size) + staging


def _summarize(ranks: Sequence[Mapping[str, Any]], elements: int, world_size: int) -> dict[str, Any]:
    most = max(ranks, key=lambda rank: rank["peak"])
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
