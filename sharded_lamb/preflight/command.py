"""``sharded-lamb preflight``, under torchrun or srun, before the job and with its arguments."""

import argparse
import json
import os
import secrets
import socket
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from sharded_lamb.plan.machine import PRESETS, Machine, calibrated
from sharded_lamb.preflight import facts, network
from sharded_lamb.preflight.facts import Facts


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of ``sharded-lamb preflight``."""
    parser.description = (
        "Run it as the job will be run, e.g. torchrun --nnodes 2 --nproc-per-node 8 … -m sharded_lamb preflight. "
        "Exit code 1, with the hosts named, where something is wrong."
    )
    parser.add_argument(
        "--config", type=Path, action="append", default=[], help="a file that must be the same"
    )
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        default=[],
        help="a folder whose files and manifests must be the same",
    )
    parser.add_argument(
        "--writes", type=Path, help="the folder that the run writes to; all ranks must see it"
    )
    parser.add_argument("--free-gb", type=float, default=1.0, help="that --writes must have")
    parser.add_argument("--world-size", type=int, help="ranks that there must be")
    parser.add_argument("--timeout-s", type=float, default=60.0, help="for ranks to come")
    parser.add_argument("--mb", type=float, default=32.0, help="sent to measure the network; 0: it is not")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="what the network should do")
    parser.add_argument("--gbits", type=float, help="instead: Gbit/s that a rank should send to other hosts")
    parser.add_argument("--calibrate", action="append", default=[], help="JSON of sharded-lamb bench comm")
    parser.add_argument("--at-least", type=float, default=0.5, help="share of the plan, and of links like it")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--json", type=Path, help="where rank 0 writes what was found")


def run(chosen: argparse.Namespace) -> int:
    """Returns 0, or 1 where something is wrong. Raises ValueError for wrong arguments."""
    for name in ("timeout_s", "at_least"):
        if not getattr(chosen, name) > 0:
            raise ValueError(f"--{name.replace('_', '-')} must be > 0, got {getattr(chosen, name)}")
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
    """None where nothing was said of what the network should do."""
    if chosen.gbits is not None and not chosen.gbits > 0:
        raise ValueError(f"--gbits must be > 0, got {chosen.gbits}")
    if chosen.preset is None and chosen.gbits is None and not chosen.calibrate:
        return None
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    speed = (chosen.gbits or 10.0) * 1e9 / 8
    base = PRESETS[chosen.preset] if chosen.preset else Machine(1e11, 1e10, speed, 5e-5, 5e-5, local)
    return calibrated(base, chosen.calibrate)


def _join(chosen: argparse.Namespace) -> str | None:
    """Join the ranks that the launcher describes; what is wrong where some do not come."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    kind = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if kind == "cuda":
        torch.cuda.set_device(local)
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
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timeout)
    return problem


def _store(rank: int, timeout: timedelta) -> Any:
    """torchrun's; without it, one that rank 0 serves: not waiting for the others, so that it can say who is missing."""
    if "RANK" not in os.environ:
        return dist.TCPStore("127.0.0.1", 0, is_master=True)  # type: ignore[attr-defined]
    serves = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.TCPStore(  # type: ignore[attr-defined]
        address, port, is_master=serves, timeout=timeout, wait_for_workers=False
    )


def _present(store: Any, rank: int, world: int, timeout: timedelta) -> str | None:
    """Everyone says that it is here; the first rank waits for all and says who is not. O(ranks) store operations."""
    store.set(f"here/{rank}", f"{socket.gethostname()} {world}")
    if rank == 0:
        deadline, hosts, absent, odd = time.monotonic() + timeout.total_seconds(), set(), [], []
        for other in range(world):
            try:
                store.wait([f"here/{other}"], timedelta(seconds=max(0.01, deadline - time.monotonic())))
            except (RuntimeError, dist.DistStoreError):
                absent.append(other)
                continue
            host, theirs = store.get(f"here/{other}").decode().rsplit(" ", 1)
            hosts.add(host)
            if int(theirs) != world:
                odd.append(
                    f"rank {other} on host {host} was started for {theirs} ranks and rank 0 for {world}"
                )
        verdict = "; ".join(odd)
        if absent:
            verdict = (
                f"ranks {facts.spans(absent)} did not come in {timeout.total_seconds():g} s; those on "
                f"{', '.join(sorted(hosts))} did: look at the hosts that are not among them"
            )
        store.set("verdict", verdict)
    try:
        store.wait(["verdict"], timeout * 2)
    except (RuntimeError, dist.DistStoreError):
        return f"rank 0 did not answer in {2 * timeout.total_seconds():g} s: look at its host"
    return store.get("verdict").decode() or None


def _together(chosen: argparse.Namespace, machine: Machine | None, began: float) -> int:
    rank, world = dist.get_rank(), dist.get_world_size()
    kind = chosen.device or ("cuda" if torch.cuda.is_available() else "cpu")
    device = (
        torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    )
    token = _leave_token(chosen.writes) if rank == 0 else None
    own = facts.collect(rank, device, chosen.config, chosen.data, chosen.writes)
    gathered: list[Any] = [None] * world
    dist.all_gather_object(gathered, (own, token))
    found: list[Facts] = [one for one, _ in gathered]
    hosts = [one.host for one in found]
    unseen = _does_not_see(chosen.writes, gathered[0][1])
    lines = facts.complaints(found, int(chosen.free_gb * 1e9)) if rank == 0 else []
    speeds = network.measure(device, int(chosen.mb * 1e6)) if world > 1 and chosen.mb else None
    if speeds is not None and rank == 0:
        lines += network.complaints(speeds, hosts, machine, at_least=chosen.at_least)
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, (unseen, lines))
    lines = everyone[0][1]
    blind = [one for one, (missing, _) in zip(found, everyone, strict=True) if missing]
    if blind:
        lines = [
            *lines,
            f"{facts.who(blind)} does not see what rank 0 writes to {chosen.writes}: checkpoints need a "
            f"folder that all ranks see",
        ]
    if rank == 0:
        _tidy(chosen.writes, token)
        _report(chosen, found, speeds, lines, time.monotonic() - began)
    elif lines and os.environ.get("LOCAL_RANK") == "0":
        print("preflight: " + "; ".join(lines), file=sys.stderr, flush=True)
    return 1 if lines else 0


def _leave_token(folder: Path | None) -> str | None:
    if folder is None:
        return None
    name = f".preflight-{secrets.token_hex(8)}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    except OSError:
        return None  # the facts say so
    return name


def _does_not_see(folder: Path | None, token: str | None) -> bool:
    # Listed, which NFS asks its server for; whether one file is there it may remember.
    return folder is not None and token is not None and not (folder.is_dir() and token in os.listdir(folder))


def _tidy(folder: Path | None, token: str | None) -> None:
    if folder is not None and token is not None:
        (folder / token).unlink(missing_ok=True)


def _report(
    chosen: argparse.Namespace,
    found: list[Facts],
    speeds: network.Speeds | None,
    lines: list[str],
    took: float,
) -> None:
    hosts = list(dict.fromkeys(one.host for one in found))
    print(
        f"preflight: {len(found)} ranks on {len(hosts)} hosts, {found[0].same['device']}, code "
        f"{found[0].same['code']}, torch {found[0].same['version of torch']}: "
        f"{'ok' if not lines else f'{len(lines)} problems'} in {took:.1f} s, {network.COLLECTIVES} collectives"
    )
    if speeds is not None:
        busy = 2 * (len(found) - 1) / len(found) * speeds.bytes / speeds.all_reduce_seconds
        print(
            f"preflight: an all-reduce of {speeds.bytes / 1e6:.0f} MB takes {speeds.all_reduce_seconds * 1e3:.1f} ms "
            f"({busy / 1e6:,.0f} MB/s sent by a rank); to the next rank arrive {min(speeds.links) / 1e6:,.0f} to "
            f"{max(speeds.links) / 1e6:,.0f} MB/s"
        )
    sys.stdout.flush()
    for line in lines:
        print(f"preflight: {line}", file=sys.stderr, flush=True)
    if chosen.json:
        network_found = None if speeds is None else asdict(speeds)
        whole = {"ranks": [asdict(one) for one in found], "network": network_found, "problems": lines}
        chosen.json.write_text(json.dumps(whole, indent=1) + "\n")
