"""``sharded-lamb bench step``: times whole iterations of all candidates, in turn, in one run."""

import argparse
import gc
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb import shapes
from sharded_lamb.bench import report
from sharded_lamb.bench.candidates import BARE, PEERS, Candidate, Kind, Setting, choose
from sharded_lamb.bench.timing import Clock, Spread, Turns, by_round, quotients, world
from sharded_lamb.bench.workload import Workload
from sharded_lamb.comm.progress import with_progress

COUNTED = (
    "An iteration zeroes gradients, runs a backward that writes this rank's gradients into fresh memory and computes "
    "nothing else, reduces them, and ends when the slowest rank has updated weights. The net time is that minus the "
    "bare backward of the same round, so a reduction that overlaps with backward is counted by what it adds."
)

WARM_UP = 2
"""Untimed iterations of a new candidate: DDP rebuilds its buckets, stage 1 compares gradients over ranks."""

_BYTES_PER_ELEMENT = 28
"""Upper bound of a candidate's memory between its turns: parameters, gradients, moments, buckets, masters."""


def measure(chosen: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Measures, prints, writes; returns the content of the JSON. Collective.

    Raises:
        ValueError: an unknown shape list or peer.
    """
    rank, world_size = world()
    parameters = shapes.load(chosen.shapes)
    kinds, skipped = choose(chosen.peers, chosen.stage, world_size, list(parameters.values()))
    setting = Setting(Workload(parameters, rank, device), world_size, chosen.bucket_mb)
    kinds = [BARE, *kinds]
    keep = chosen.alive == "all" or (
        chosen.alive == "auto" and _on_all_ranks(_fit(len(kinds), setting), device)
    )
    turns, kernel, failed = _take_turns(
        kinds, setting, keep=keep, rounds=chosen.rounds, iterations=chosen.iterations
    )
    kinds = [kind for kind in kinds if kind.name not in failed]
    reference = kinds[1].name
    summary = summarize(turns, reference)
    content = {
        **report.about(device),
        "benchmark": "step",
        "counted": COUNTED,
        "shapes": {"name": chosen.shapes, "tensors": len(parameters), "elements": setting.workload.numel},
        "bucket_mb": chosen.bucket_mb,
        "kernel": kernel,
        "alive": "all" if keep else "one",
        "reference": reference,
        "titles": {kind.name: kind.titled(world_size) for kind in kinds},
        "summary": summary,
        "rounds_ms": turns,
        "skipped": {**skipped, **failed},
    }
    report.publish(chosen, _text(content, kinds), content, _panels(content, kinds))
    return content


def _fit(count: int, setting: Setting) -> bool:
    """Whether the memory of this machine holds all candidates of all its ranks at once."""
    each = setting.workload.numel * _BYTES_PER_ELEMENT
    if setting.workload.device.type == "cuda":
        return count * each < 0.7 * torch.cuda.mem_get_info()[0]
    here = int(os.environ.get("LOCAL_WORLD_SIZE", setting.world_size))
    return count * each * here < 0.6 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _on_all_ranks(here: bool, device: torch.device) -> bool:
    """Whether ``here`` is True on every rank. Collective."""
    everywhere = torch.tensor(int(here), device=device)
    if dist.is_initialized():
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return bool(everywhere.item())


def _take_turns(
    kinds: Sequence[Kind], setting: Setting, *, keep: bool, rounds: int, iterations: int
) -> tuple[dict[str, Turns], str | None, dict[str, str]]:
    """(turns of each candidate, name of our kernel, {failed candidate: reason}). Collective.

    Without ``keep`` each turn builds its candidate anew.
    """
    clock = Clock(setting.workload.device)
    turns: dict[str, Turns] = {kind.name: [] for kind in kinds}
    alive: dict[str, Candidate] = {}
    failed: dict[str, str] = {}
    kernel = None
    for kind in with_progress([*kinds] * rounds, "bench step", lambda kind: kind.name):
        if kind.name in failed:
            continue
        candidate = alive.get(kind.name) or _warm(kind, setting)
        if isinstance(candidate, str):
            failed[kind.name] = candidate
            del turns[kind.name]
            continue
        turns[kind.name].append(clock.milliseconds(candidate.iterate, iterations))
        kernel = candidate.kernel or kernel
        if keep:
            alive[kind.name] = candidate
        else:
            candidate.close()
            del candidate
            gc.collect()
    for candidate in alive.values():
        candidate.close()
    return turns, kernel, failed


def _warm(kind: Kind, setting: Setting) -> Candidate | str:
    """A candidate after its first iterations, or the reason why a peer fails, equal on every rank. Collective."""
    candidate, reason = None, None
    try:
        candidate = kind.build(setting)
        if (
            setting.world_size == 1
        ):  # torch.compile compiles here; with several ranks, others may wait for this one's part
            candidate.iterate()
    except Exception as error:
        if kind.name not in PEERS:
            raise
        reason = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
    reasons = _all_reasons(reason)
    if candidate is None or any(reasons):
        return next(reason for reason in reasons if reason)
    for _ in range(WARM_UP - (setting.world_size == 1)):
        candidate.iterate()
    return candidate


def _all_reasons(reason: str | None) -> list[str | None]:
    """Every rank's reason, in rank order. Collective."""
    reasons: list[str | None] = [reason] * world()[1]
    if dist.is_initialized():
        dist.all_gather_object(reasons, reason)
    return reasons


def summarize(turns: Mapping[str, Turns], reference: str) -> dict[str, dict[str, Any]]:
    """For each candidate: spreads of the iteration, of the net time, and of both over the reference's, by round.

    ``net_ratio`` is None if the net time of a round, or the reference's, is not > 0: noise exceeds the update.
    """
    rounds = {name: by_round(each) for name, each in turns.items()}
    bare = rounds[BARE.name]
    net = {name: [a - b for a, b in zip(times, bare, strict=True)] for name, times in rounds.items()}
    summary = {}
    for name in rounds:
        summary[name] = {
            "iteration_ms": asdict(Spread.of(rounds[name])),
            "net_ms": asdict(Spread.of(net[name])),
            "iteration_ratio": asdict(Spread.of(quotients(rounds[name], rounds[reference]))),
            "net_ratio": asdict(Spread.of(quotients(net[name], net[reference])))
            if min(*net[name], *net[reference]) > 0
            else None,
        }
    return summary


def _text(content: Mapping[str, Any], kinds: Sequence[Kind]) -> str:
    rows = []
    for kind in kinds:
        row = content["summary"][kind.name]
        whole, net = row["iteration_ms"], row["net_ms"]
        rows.append(
            [
                content["titles"][kind.name],
                f"{whole['median']:.0f}",
                f"{whole['low']:.0f}-{whole['high']:.0f}",
                f"{row['iteration_ratio']['median']:.2f}x",
                *(["", ""] if kind == BARE else _net(net["median"], row["net_ratio"])),
            ]
        )
    about = content["shapes"]
    head = [
        f"{about['name']}, {content['ranks']} ranks",
        "ms",
        "quartiles",
        "to ours",
        "net ms",
        "net to ours",
    ]
    lines = [
        report.table(head, rows),
        "",
        f"{about['tensors']:,} tensors, {about['elements']:,} elements; {len(content['rounds_ms'][BARE.name])} rounds; "
        f"kernel {content['kernel']}, bucket_mb {content['bucket_mb']:g}; ratios to {content['reference']}.",
        COUNTED,
        *(f"without {name}: {reason}" for name, reason in content["skipped"].items()),
    ]
    return "\n".join(lines)


def _net(milliseconds: float, ratio: Mapping[str, float] | None) -> list[str]:
    """A dash if noise exceeds the net time."""
    return [f"{milliseconds:.0f}" if milliseconds > 0 else "—", f"{ratio['median']:.2f}x" if ratio else "—"]


def _panels(content: Mapping[str, Any], kinds: Sequence[Kind]) -> list[report.Panel]:
    title = f"{content['shapes']['name']}, {content['ranks']} ranks: iteration without the bare backward"
    ours = [content["titles"][kind.name] for kind in kinds if kind.name.startswith("ours")]
    bars = {}
    for kind in kinds:
        if kind != BARE:
            net = content["summary"][kind.name]["net_ms"]
            bars[content["titles"][kind.name]] = (net["median"], net["low"], net["high"])
    return [report.Panel(title, "ms", bars, ours)]
