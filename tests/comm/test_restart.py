"""Restarts in process: a rank lives on, its peer is a new process, and both initialize torch.distributed again."""

import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from sharded_lamb import ShardedLamb
from sharded_lamb.comm import consistency
from tests.forked import forked


def member(rank: int, port: int, generations: list[int], one_store: bool) -> None:
    """Train in each generation; rank 0 makes one optimizer more before its peer is lost."""
    consistency.TIMEOUT_S = 20.0
    model, shared = nn.Linear(8, 8), None
    opt: ShardedLamb | None = None
    for generation in generations:
        if shared is None or not one_store:
            # one store for all generations, or one for each
            shared = dist.TCPStore(
                "127.0.0.1", port + (0 if one_store else generation), None, False, timedelta(seconds=60)
            )
        store = dist.PrefixStore(f"generation {generation}", shared)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=30))
        for number in range(1 + generation):
            if opt is not None and number > 0:
                opt.close()  # the first takes over from the optimizer of a group that was destroyed
            opt = ShardedLamb(model.named_parameters(), stage=2)
            model(torch.ones(4, 8)).sum().backward()
            opt.step()
        print(f"stepped in generation {generation}", flush=True)
        dist.destroy_process_group()


def free_ports(count: int) -> int:
    """The first of ``count`` free ports in a row."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            first: int = probe.getsockname()[1]
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError):
            continue
        return first


def restarted(one_store: bool) -> list[str]:
    port = free_ports(2)
    stores = [dist.TCPStore("127.0.0.1", port + i, None, True, wait_for_workers=False) for i in range(2)]
    environment = {"GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    with forked(member, 0, port, [0, 1], one_store, **environment, RANK="0") as survivor:
        with forked(member, 1, port, [0], one_store, **environment, RANK="1") as lost:
            outputs = [lost.ended()]
        with forked(member, 1, port, [1], one_store, **environment, RANK="1") as replacement:
            outputs += [replacement.ended(), survivor.ended()]
    assert len(stores) == 2  # they outlive the members
    return [output for _, output in outputs]


def test_a_rank_that_lives_on_meets_its_new_peer() -> None:
    lost, replacement, survivor = restarted(one_store=False)
    assert "stepped in generation 0" in lost
    assert "stepped in generation 1" in replacement
    assert "stepped in generation 1" in survivor


def test_they_meet_in_one_store_under_new_prefixes() -> None:
    _, replacement, survivor = restarted(one_store=True)
    assert "stepped in generation 1" in replacement
    assert "stepped in generation 1" in survivor
