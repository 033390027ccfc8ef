"""The process group of a run, and its small collectives: agreement, errors, sums."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from sharded_lamb.comm import devices

Result = TypeVar("Result")

# Rank 0 may tokenize a corpus while the others wait.
_CONTROL_TIMEOUT = timedelta(hours=24)
_MEETING_S = 1800.0  # as torch's own rendezvous


class RankZeroError(ValueError):
    """An error of rank 0, raised on the other ranks."""


@dataclass(frozen=True)
class Ranks:
    """This process among the ranks. Host numbers use `control`, a gloo group, so no GPU waits."""

    rank: int
    world_size: int
    device: torch.device
    control: Any

    @staticmethod
    def start() -> Ranks:
        """Join torchrun's group, or the initialized one; without torchrun, create a group of one.

        Returns once every rank has connected to all others: one that ends earlier, after bad input, would break their
        connections, and they would report that instead.
        """
        device = devices.of_this_rank()
        backend, bound = devices.backends(device), None if device.type == "cpu" else device
        if dist.is_initialized():
            pass
        elif "RANK" in os.environ:
            store: Any
            shared, rank, world_size = next(dist.rendezvous("env://"))  # type: ignore[attr-defined]
            store = of_this_attempt(shared, rank, world_size)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, device_id=bound)
        else:
            store = dist.TCPStore("localhost", 0, 1, is_master=True)  # type: ignore[attr-defined]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, device_id=bound)
        control = dist.new_group(backend="gloo", timeout=_CONTROL_TIMEOUT)
        rank, world_size = dist.get_rank(), dist.get_world_size()
        default = dist.distributed_c10d._get_default_store()
        wait_for_all(PrefixStore(f"connected/{control.group_name}", default), rank, world_size)
        return Ranks(rank, world_size, device, control)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def from_first(self, work: Callable[[], Result]) -> Result:
        """Runs `work` on rank 0; returns its result, or raises its error, on every rank."""
        box: list[Any] = [None, None]
        failure: BaseException | None = None
        if self.is_first:
            try:
                box[0] = work()
            except (ValueError, OSError, RuntimeError) as error:
                failure, box[1] = error, f"{type(error).__name__} on rank 0: {error}"
        dist.broadcast_object_list(box, src=0, group=self.control)
        if failure is not None:
            raise failure
        if box[1] is not None:
            raise RankZeroError(box[1])
        result: Result = box[0]
        return result

    def sum(self, numbers: Sequence[float]) -> list[float]:
        """Element-wise sums over ranks (fp64, exact for integers below 2^53)."""
        packed = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        dist.all_reduce(packed, group=self.control)
        return packed.tolist()

    def gather(self, numbers: Sequence[float]) -> Tensor:
        """[world size, numbers] fp64: every rank's numbers, in rank order, on every rank."""
        own = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        rows = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(rows, own, group=self.control)
        return torch.stack(rows)

    def agree(self, what: str, value: str, remedy: str) -> None:
        """Raises: ValueError on every rank, naming the ranks whose value differs from rank 0's."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        mismatched = {rank: v for rank, v in enumerate(values) if v != values[0]}
        if mismatched:
            raise ValueError(
                f"{what} differs between ranks: rank 0 has {values[0]!r}, others {mismatched}; {remedy}"
            )


def launch_store() -> Store:
    """The store below that of the default process group: torchrun's, which it keeps while it restarts ranks."""
    store = dist.distributed_c10d._get_default_store()
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    return store


def threads_per_rank() -> int:
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, len(os.sched_getaffinity(0)) // ranks)


def use_threads(threads: int) -> None:
    """Sets torch's CPU threads; 0: this rank's share of the cores."""
    torch.set_num_threads(threads or threads_per_rank())


def wait_for_all(store: Store, rank: int, world_size: int) -> None:
    """Returns once every rank has called it; on rank 0, which may serve the store, once no other reads it any more."""
    ranks, limit = range(world_size), timedelta(seconds=_MEETING_S)
    store.set(f"here/{rank}", "")
    store.wait([f"here/{other}" for other in ranks], limit)
    if rank:
        store.set(f"left/{rank}", "")
    else:
        store.wait([f"left/{other}" for other in ranks[1:]], limit)


def of_this_attempt(shared: Store, rank: int, world_size: int, timeout_s: float = _MEETING_S) -> PrefixStore:
    """The store with a prefix that rank 0 draws for this attempt.

    torchrun keeps its store over restarts (2.13), and with it the dead ranks' addresses. Its restart count identifies
    an attempt on one node only: a node that joined later counts from 0, and a change of nodes is not counted.

    Raises:
        RuntimeError: a rank did not join; rank 0 lists them.
    """
    token = uuid.uuid4().hex
    if rank:
        shared.set(f"meeting/{rank}", token)  # overwrites a dead rank's token
        shared.wait([f"welcome/{token}"], timedelta(seconds=timeout_s))
        name = shared.get(f"welcome/{token}").decode()
        shared.set(f"thanks/{token} {name}", "")
        return PrefixStore(name, shared)
    absent = dict.fromkeys(range(1, world_size), "")
    deadline = time.monotonic() + timeout_s
    while absent and time.monotonic() < deadline:
        for other, known in list(absent.items()):
            # Thanks for this very welcome: the store still has those of dead ranks.
            if known and shared.check([f"thanks/{known} {token}"]):
                del absent[other]
            elif shared.check([f"meeting/{other}"]):
                absent[other] = shared.get(f"meeting/{other}").decode()
                if absent[other] != known:
                    shared.set(f"welcome/{absent[other]}", token)
        time.sleep(0.01)
    if absent:
        raise RuntimeError(
            f"ranks {sorted(absent)} of {world_size} did not join within {timeout_s:g} s: look for errors in their logs"
        )
    return PrefixStore(token, shared)
