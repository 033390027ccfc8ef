"""``sharded-lamb bench host``: ``step()`` alone over many small tensors, where the host's work per tensor counts.

Gradients are in ``.grad`` beforehand and stay there, so that backward, reductions and FSDP take no part.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from sharded_lamb import Lamb, ShardedLamb
from sharded_lamb.bench import report
from sharded_lamb.bench.timing import Clock, Spread, Turns, by_round, quotients, take_turns, world

COUNTED = (
    "A call of step(), gradients being there, until the slowest rank returns. Under FSDP2 the parameters are DTensors "
    "sharded on dim 0, as fully_shard makes them. 'two all-reduces': of 3 P + 1 and 2 P + 6 fp64, as a step of ours "
    "contains."
)

OURS, SUMS = "ShardedLamb", "two all-reduces"


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints, writes; returns the content of the JSON. Collective."""
    world_size = world()[1]
    actions = {}
    for kind in ("plain", "FSDP2") if world_size > 1 else ("plain",):
        for name, make in _optimizers(world_size).items():
            params = _parameters(chosen.tensors, chosen.elements, device, is_sharded=kind == "FSDP2")
            actions[f"{kind}: {name}"] = make(params).step
    if world_size > 1:
        actions[SUMS] = partial(_all_reduce, chosen.tensors, device)
    turns = take_turns(actions, Clock(device), rounds=chosen.rounds, iterations=chosen.iterations)
    summary = summarize(turns, chosen.tensors)
    content = {
        **report.about(device),
        "benchmark": "host",
        "counted": COUNTED,
        "tensors": chosen.tensors,
        "elements": chosen.elements,
        "summary": summary,
        "rounds_ms": turns,
    }
    report.publish(chosen, _text(summary, content), content, _panels(summary))
    return content


def _optimizers(world_size: int) -> dict[str, Callable[[Sequence[nn.Parameter]], Any]]:
    adamw = partial(torch.optim.AdamW, lr=1e-6)
    chosen: dict[str, Callable[[Sequence[nn.Parameter]], Any]] = {
        OURS: partial(ShardedLamb, lr=1e-6),
        "fused AdamW": partial(adamw, fused=True),
        "foreach AdamW": partial(adamw, foreach=True),
    }
    if world_size == 1:
        chosen["Lamb"] = partial(Lamb, lr=1e-6)
    return chosen


def _parameters(tensors: int, elements: int, device: torch.device, *, is_sharded: bool) -> list[nn.Parameter]:
    """Each of ``elements``, with a gradient equal on all ranks."""
    generator = torch.Generator().manual_seed(0)

    def made() -> Tensor:
        whole = torch.randn(elements, generator=generator, device="cpu").to(device)
        if not is_sharded:
            return whole
        return distribute_tensor(whole, init_device_mesh(device.type, (world()[1],)), [Shard(0)])

    params = [nn.Parameter(made()) for _ in range(tensors)]
    for p in params:
        p.grad = made()
    return params


def _all_reduce(tensors: int, device: torch.device) -> None:
    for numel in (3 * tensors + 1, 2 * tensors + 6):
        dist.all_reduce(torch.ones(numel, dtype=torch.float64, device=device))


def summarize(turns: Mapping[str, Turns], tensors: int) -> dict[str, dict[str, Any]]:
    """For each action: ms, µs a tensor, and the time over ours of the same kind, round by round."""
    rounds = {name: by_round(each) for name, each in turns.items()}
    summary = {}
    for name, each in rounds.items():
        ours = rounds.get(f"{name.partition(':')[0]}: {OURS}")
        summary[name] = {
            "ms": asdict(Spread.of(each)),
            "us_per_tensor": 1e3 * Spread.of(each).median / tensors,
            "to_ours": asdict(Spread.of(quotients(each, ours))) if ours is not None else None,
        }
    return summary


def _text(summary: Mapping[str, Mapping[str, Any]], content: Mapping[str, Any]) -> str:
    rows = [
        [
            name,
            f"{row['ms']['median']:.2f}",
            f"{row['ms']['low']:.2f}-{row['ms']['high']:.2f}",
            f"{row['us_per_tensor']:.1f}",
            f"{row['to_ours']['median']:.2f}x" if row["to_ours"] else "",
        ]
        for name, row in summary.items()
    ]
    head = ["", "ms", "quartiles", "µs a tensor", "to ours"]
    about = f"{content['tensors']:,} tensors of {content['elements']:,} elements, {content['ranks']} ranks."
    return "\n".join([report.table(head, rows), "", about, COUNTED])


def _panels(summary: Mapping[str, Mapping[str, Any]]) -> list[report.Panel]:
    bars = {name: tuple(row["ms"][at] for at in ("median", "low", "high")) for name, row in summary.items()}
    return [report.Panel("step() alone", "ms", bars, [name for name in bars if name.endswith(OURS)])]
