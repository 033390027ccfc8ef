"""``sharded-lamb preflight``: run under torchrun or srun, before the job and with its arguments."""

import argparse
import json
import math
import os
import secrets
import socket
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sharded_lamb.comm import devices
from sharded_lamb.plan.machine import PRESETS, Machine, calibrated
from sharded_lamb.preflight import network, rank_report
from sharded_lamb.preflight.rank_report import RankReport
from sharded_lamb.watchdog.diagnosis import rank_ranges


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``sharded-lamb preflight``."""
    parser.description = (
        "Run it as the job will run, e.g. torchrun --nnodes 2 --nproc-per-node 8 … -m sharded_lamb preflight. "
        "Exit code 1, with the hosts named, if there is a problem."
    )
    parser.add_argument(
        "--config", type=Path, action="append", default=[], help="a file that must be equal on all ranks"
    )
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="a folder whose files and manifests must be equal on all ranks",
    )
    parser.add_argument(
        "--writes", type=Path, help="the run's folder, which is created if missing; all ranks must see it"
    )
    parser.add_argument("--free-gb", type=float, help="free space that --writes needs (default: 1)")
    parser.add_argument("--world-size", type=int, help="the expected number of ranks")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="seconds to wait for ranks")
    parser.add_argument(
        "--mb", type=float, default=32.0, help="message size that measures the network; 0: skip it"
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="the plan that the network is compared with"
    )
    parser.add_argument(
        "--gbits", type=float, help="instead of --preset: Gbit/s that a rank should send to other hosts"
    )
    parser.add_argument("--calibrate", action="append", default=[], help="JSON of sharded-lamb bench comm")
    parser.add_argument("--at-least", type=float, default=0.5, help="share of the plan, and of links like it")
    parser.add_argument("--device", help=devices.OF_HERE)
    parser.add_argument("--json", type=Path, help="rank 0 writes all reports there")


def run(chosen: argparse.Namespace) -> int:
    """Returns 0, or 1 if there is a problem.

    Raises:
        ValueError: a wrong argument.
    """
    for name in ("timeout_s", "at_least"):
        if not getattr(chosen, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be > 0, got {getattr(chosen, name)}")
    if chosen.free_gb is not None and (chosen.writes is None or not 0 <= chosen.free_gb < math.inf):
        raise ValueError(f"--free-gb {chosen.free_gb} must be a number >= 0, and needs --writes FOLDER")
    chosen.free_gb = 1.0 if chosen.free_gb is None else chosen.free_gb
    machine = _machine(chosen)
    began = time.monotonic()
    missing = _join(chosen)
    if missing:
        print(f"preflight: {missing}", file=sys.stderr, flush=True)
        return 1
    try:
        return _together(chosen, machine, began)
    finally:
        dist.destroy_process_group()


def _machine(chosen: argparse.Namespace) -> Machine | None:
    """The network's planned speeds; None without --preset, --gbits and --calibrate."""
    if chosen.gbits is not None and not chosen.gbits > 0:
        raise ValueError(f"--gbits must be > 0, got {chosen.gbits}")
    if chosen.preset is None and chosen.gbits is None and not chosen.calibrate:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    speed = (chosen.gbits or 10.0) * 1e9 / 8
    base = PRESETS[chosen.preset] if chosen.preset else Machine(1e11, 1e10, speed, 5e-5, 5e-5, local)
    return calibrated(base, chosen.calibrate)


def _join(chosen: argparse.Namespace) -> str | None:
    """Join the launcher's ranks; returns None, or the problem if some do not come."""
    device = devices.of_this_rank(chosen.device)
    timeout = timedelta(seconds=chosen.timeout_s)
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    try:
        store = _store(rank, timeout)
    except (RuntimeError, dist.DistError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        return f"rank {rank} on host {socket.gethostname()} does not reach the store at {where}: {error}"
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"preflight {attempt}", store)  # type: ignore[attr-defined]
    problem = _present(store, rank, world, timeout)
    if problem is None and chosen.world_size not in (None, world):
        problem = f"there are {world} ranks and {chosen.world_size} were expected (--world-size)"
    if problem is None:
        backends = devices.backends(device)
        dist.init_process_group(backends, store=store, rank=rank, world_size=world, timeout=timeout)
    return problem


def _store(rank: int, timeout: timedelta) -> Any:
    """torchrun's store; without torchrun, one that rank 0 serves and that does not wait, to report missing ranks."""
    if "RANK" not in os.environ:
        return dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=serves, timeout=timeout, wait_for_workers=False
    )


def _present(store: Any, rank: int, world: int, timeout: timedelta) -> str | None:
    """None once every rank has come; else which ranks are missing or mismatched. O(ranks) store operations."""
    store.set(f"here/{rank}", f"{socket.gethostname()} {world}")
    if rank == 0:
        deadline, hosts, absent, mismatched = time.monotonic() + timeout.total_seconds(), set(), [], []
        for other in range(world):
            try:
                store.wait([f"here/{other}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except (RuntimeError, dist.DistStoreError):
                absent.append(other)
                continue
            host, other_world = store.get(f"here/{other}").decode().rsplit(" ", 1)
            hosts.add(host)
            if int(other_world) != world:
                mismatched.append(
                    f"rank {other} on host {host} was started for {other_world} ranks and rank 0 for {world}"
                )
        problem = "; ".join(mismatched)
        if absent:
            problem = (
                f"ranks {rank_ranges(absent)} did not come in {timeout.total_seconds():g} s; those on "
                f"{', '.join(sorted(hosts))} did: look at the hosts that are not among them"
            )
        store.set("problem", problem)
    try:
        store.wait(["problem"], timeout * 2)
    except (RuntimeError, dist.DistStoreError):
        return f"rank 0 did not answer in {2 * timeout.total_seconds():g} s: look at its host"
    return store.get("problem").decode() or None


def _together(chosen: argparse.Namespace, machine: Machine | None, began: float) -> int:
    """Compare reports and measure the network; returns the exit code, the same on every rank. Collective."""
    rank, world = dist.get_rank(), dist.get_world_size()
    device = devices.of_this_rank(chosen.device)
    token = _leave_token(chosen.writes) if rank == 0 else None
    own = rank_report.collect(rank, device, chosen.config, chosen.data, chosen.writes)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (own, token))
    reports: list[RankReport] = [report for report, _ in gathered]
    hosts = [report.host for report in reports]
    unseen = _does_not_see(chosen.writes, gathered[0][1])
    problems = rank_report.problems_of(reports, int(chosen.free_gb * 1e9)) if rank == 0 else []
    speeds = network.measure(device, int(chosen.mb * 1e6)) if world > 1 and chosen.mb else None
    if speeds is not None and rank == 0:
        problems += network.problems_of(speeds, hosts, machine, at_least=chosen.at_least)
    outcomes: list[Any] = [None] * world
    dist.all_gather_object(outcomes, (unseen, problems))
    problems = outcomes[0][1]
    blind = [report for report, (missing, _) in zip(reports, outcomes, strict=True) if missing]
    if blind:
        problems = [
            *problems,
            f"{rank_report.hosts_of(blind)} does not see what rank 0 writes to {chosen.writes}: checkpoints need a "
            f"folder that all ranks see",
        ]
    if rank == 0:
        _tidy(chosen.writes, token)
        _show(chosen, reports, speeds, problems, time.monotonic() - began)
    elif problems and os.environ.get("LOCAL_RANK") == "0":
        print("preflight: " + "; ".join(problems), file=sys.stderr, flush=True)
    return 1 if problems else 0


def _leave_token(folder: Path | None) -> str | None:
    if folder is None:
        return None
    name = f".preflight-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except OSError:
        return None  # this rank's report names the problem
    return name


def _does_not_see(folder: Path | None, token: str | None) -> bool:
    # NFS asks its server for a listing; it may cache whether one file exists.
    return folder is not None and token is not None and not (folder.is_dir() and token in os.listdir(folder))


def _tidy(folder: Path | None, token: str | None) -> None:
    if folder is not None and token is not None:
        (folder / token).unlink(missing_ok=True)


def _show(
    chosen: argparse.Namespace,
    reports: list[RankReport],
    speeds: network.Speeds | None,
    problems: list[str],
    took: float,
) -> None:
    """Print the summary and the problems; write both to ``--json``."""
    hosts = list(dict.fromkeys(report.host for report in reports))
    same = reports[0].same
    print(
        f"preflight: {len(reports)} ranks on {len(hosts)} hosts, {same['device']}, code "
        f"{same['code']}, torch {same['version of torch']}: "
        f"{'ok' if not problems else f'{len(problems)} problems'} in {took:.1f} s, {network.COLLECTIVES} collectives"
    )
    if speeds is not None:
        sent = 2 * (len(reports) - 1) / len(reports) * speeds.bytes / speeds.all_reduce_seconds
        print(
            f"preflight: an all-reduce of {speeds.bytes / 1e6:.0f} MB takes {speeds.all_reduce_seconds * 1e3:.1f} ms "
            f"({sent / 1e6:,.0f} MB/s sent by a rank); the next rank receives {min(speeds.links) / 1e6:,.0f} to "
            f"{max(speeds.links) / 1e6:,.0f} MB/s"
        )
    sys.stdout.flush()
    for problem in problems:
        print(f"preflight: {problem}", file=sys.stderr, flush=True)
    if chosen.json:
        content = {
            "ranks": [asdict(report) for report in reports],
            "network": None if speeds is None else asdict(speeds),
            "problems": problems,
        }
        chosen.json.write_text(json.dumps(content, indent=1) + "\n")
