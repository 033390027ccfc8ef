"""Process groups that this package makes, and their end.

A gloo group has threads and connections. It ends with the `OwnedGroup` that holds it: when that is closed or deleted,
or at exit. At exit this matters beyond tidiness: a gloo thread that drops the last reference to a tensor of Python's
while the interpreter finalizes aborts the process, so its threads are joined before.
"""

import ctypes
import gc
import hashlib
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from enum import IntEnum
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

_PREFIX = "sharded_lamb/"
_collect_at = 8
"""So many groups of this package trigger a garbage collection: optimizers with a scheduler are reference cycles."""

_meetings: Any = weakref.WeakKeyDictionary()
"""Default process group → how often each set of ranks has met. Ranks that initialize again start again at 0."""


def next_meeting(ranks: Sequence[int]) -> str:
    """A key for the store that all of ``ranks`` compute alike at their n-th meeting since init_process_group."""
    counts: Counter[str] = _meetings.setdefault(dist.group.WORLD, Counter())
    key = hashlib.sha256(",".join(map(str, ranks)).encode()).hexdigest()[:16]
    counts[key] += 1
    return f"{key}/{counts[key]}"


class Tag(IntEnum):
    """Tags of point-to-point messages: gloo matches those between two ranks by tag and order.

    A rank may have sent gradients of a reduction that another has not started when both transfer state.
    """

    GRADIENTS = 0
    PARAMETERS = 1
    STATE = 2
    PROBE = 3  # of messages that are never sent


@dataclass(eq=False)
class Messages:
    """Point-to-point messages that were started together, and the memory that they send.

    gloo drops a message whose work is deleted before the peer receives it, without an error on either side.
    """

    works: list[dist.Work]
    memory: object


class OwnedGroup:
    """A process group of this package's own, in the order of ``ranks``. Construction is collective over ``ranks``.

    Groups with NCCL stay until the default process group is destroyed: their end is collective.

    Attributes:
        in_flight: messages of this group that may be under way. They live as long as the group: until it ends a peer
            receives what was sent to it, and afterwards its receive fails because the connection is closed. Were
            some deleted earlier, as those of a reducer whose step raised, the peer would wait for ever.
    """

    def __init__(
        self, ranks: Sequence[int], *, backend: str | None = None, timeout: timedelta | None = None
    ) -> None:
        """``backend``, ``timeout``: by default those of the default group, and of the backend."""
        _collect_deleted()
        held = [_new_group(list(ranks), backend, timeout)]
        self._held = held  # the only lasting reference, so that `end` destroys the group
        self.in_flight: set[Messages] = set()
        self.end = weakref.finalize(self, _end, held, self.in_flight, os.getpid())
        """End the group on this rank. Not collective; does nothing the second time."""

    @classmethod
    def on(cls, device: torch.device, ranks: Sequence[int]) -> "OwnedGroup":
        """A group that sends memory of ``device``, with the default group's backend and timeout if it has one for it.

        A default group of NCCL alone has none for the CPU, where a model may be until it is moved to a GPU.
        """
        if not has_backend(device):
            return cls(ranks, backend=dist.get_default_backend_for_device(device))
        return cls(ranks, timeout=timeout_of_default(device))

    def check_open(self) -> None:
        """Raises RuntimeError once the group has ended."""
        if not self._held:
            raise RuntimeError(
                "this process group was closed with the optimizer or checkpoint that it served"
            )

    def check_connection(self, peer: int) -> None:
        """Raises gloo's RuntimeError once it has closed the connection to ``peer`` (a rank in the group)."""
        dist.irecv(torch.empty(1, device="cpu"), group=self.pg, group_src=peer, tag=Tag.PROBE)

    @property
    def pg(self) -> dist.ProcessGroup:
        """Raises RuntimeError once the group has ended."""
        self.check_open()
        return self._held[0]

    def abandon(self) -> None:
        """Keep the group until the process ends: its end would wait for an operation that never completes."""
        if self.end.detach() is not None:
            _keep_for_good(self._held, self.in_flight)

    @property
    def name(self) -> str:
        """Equal on all ranks, and of no other group since init_process_group."""
        return str(c10d._world.pg_names[self.pg])

    @property
    def is_alive(self) -> bool:
        """False once this group or the default process group was destroyed."""
        return bool(self._held) and self._held[0] in c10d._world.pg_map


def has_backend(device: torch.device) -> bool:
    """Whether the default group sends memory of ``device``."""
    default: Any = dist.group.WORLD
    return device.type in [each.type for each in default._device_types]


def timeout_of_default(device: torch.device) -> timedelta | None:
    """The timeout passed to init_process_group; new groups would use the backend's default instead."""
    default: Any = dist.group.WORLD
    return getattr(getattr(default._get_backend(device), "options", None), "_timeout", None)


def _collect_deleted() -> None:
    """End the groups of deleted optimizers that the garbage collector has not reached."""
    global _collect_at
    if _count() >= _collect_at:
        gc.collect()
        _collect_at = max(8, 2 * _count())


def _count() -> int:
    return sum(str(name).startswith(_PREFIX) for name in c10d._world.pg_names.values())


def _new_group(ranks: list[int], backend: str | None, timeout: timedelta | None) -> dist.ProcessGroup:
    """As torch's ``new_group``, under a name that depends on meetings of these ranks alone.

    torch numbers groups per process, or hashes ranks and the number of groups, and ranks may delete groups at
    different times; and a name must not return, since the store keeps the addresses of its first group.
    """
    default = c10d._get_default_group()
    if callable(getattr(default, "new_group", None)):  # a custom default group makes subgroups itself
        made: dist.ProcessGroup = dist.new_group(ranks, timeout=timeout, backend=backend, sort_ranks=False)
        return made
    default_backend, store = c10d._world.pg_map[default]
    chosen = c10d.Backend(backend or default_backend)
    name: Any = f"{_PREFIX}{next_meeting(ranks)}"
    pg: dist.ProcessGroup
    with _device_unbound(default) if len(ranks) < default.size() else nullcontext():
        pg, _ = c10d._new_process_group_helper(
            len(ranks),
            ranks.index(default.rank()),
            ranks,
            chosen,
            store,
            name,
            timeout=timeout or c10d._get_default_timeout(chosen),
            device_id=default.bound_device_id,
        )
    c10d._world.pg_group_ranks[pg] = {rank: index for index, rank in enumerate(ranks)}
    if "gloo" in chosen:
        # A rank that ended the group before others have connected would break their construction.
        gloo: Any = pg._get_backend(torch.device("cpu"))
        gloo.barrier().wait()
    return pg


@contextmanager
def _device_unbound(default: dist.ProcessGroup) -> Iterator[None]:
    """``default`` without the device of ``init_process_group(device_id=…)``.

    With one, torch splits NCCL communicators of the default group, which is collective over all its ranks: a subset
    that meets alone would wait for the others.
    """
    bound = default.bound_device_id
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = bound


def _keep_for_good(*objects: object) -> None:
    for each in objects:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(each))


def _end(held: list[dist.ProcessGroup], in_flight: set[Messages], process: int) -> None:
    """Destroy the group in ``held``, whose last reference this drops: that joins its threads.

    A work that is left keeps gloo's connections open. A process that was forked from ``process`` has none of the
    threads, and would wait for them.
    """
    if os.getpid() != process:
        _keep_for_good(held, in_flight)
        return
    while in_flight:
        messages = in_flight.pop()
        messages.works.clear()
        messages.memory = None
    if held and all(backend == "gloo" for backend in _backends(held[0])):
        pg = held.pop()
        if pg in c10d._world.pg_map:
            dist.destroy_process_group(pg)
    held.clear()


def _backends(pg: dist.ProcessGroup) -> list[str]:
    return [pg._get_backend(device).name().lower() for device in pg._device_types]
