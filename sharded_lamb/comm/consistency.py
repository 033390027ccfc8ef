"""Consistency check: all ranks must describe the same optimizer, else all raise within seconds.

It uses the rendezvous store, before any collective: ranks that disagree on names, shapes or options would hang in a
collective or exchange mismatched bytes. Per optimizer: O(ranks) store operations.
"""

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from sharded_lamb import faults
from sharded_lamb.comm.groups import next_meeting
from sharded_lamb.comm.stalls import Entered, meeting
from sharded_lamb.comm.topology import Topology

TIMEOUT_S = 60.0
"""Seconds that a rank constructing an optimizer waits for the other ranks."""

_RESTART = (
    "Constructions are counted since init_process_group: after a restart, ranks that live on must call "
    "destroy_process_group() and init_process_group() again, with a new store or prefix, as the new ranks do"
)
Description = list[tuple[str, Any]]


def check_consistency(
    topology: Topology,
    description: Description,
    timeout_s: float | None = None,
    *,
    subject: str = "what they optimize",
    remedy: str = "Construct the same model and optimizer on every rank",
) -> None:
    """Compare ``description`` over ``topology.everyone``; returns on all ranks or raises on all ranks.

    Args:
        description: (label, value) pairs, JSON-serializable, e.g. ("parameter 0", ["fc.weight", [3, 4], …]).
        subject, remedy: for the message if ranks disagree.

    Raises:
        RuntimeError: ranks did not call this within ``timeout_s`` seconds, have raised, or wait for this one elsewhere;
            the message names them.
        ValueError: ranks disagree; the message gives each rank's first difference.
    """
    faults.point("construction")
    if len(topology.everyone) == 1:
        return
    timeout_s = TIMEOUT_S if timeout_s is None else timeout_s
    prefix = f"sharded_lamb/{next_meeting(topology.everyone)}"
    store = PrefixStore(prefix, dist.distributed_c10d._get_default_store())
    entered = meeting(topology.global_rank, topology.everyone)
    agreement = _Agreement(store, topology, timeout_s, entered, f"ranks disagree on {subject}:", remedy)
    text = json.dumps(description)
    if topology.rank == 0:
        agreement.lead(text)
    else:
        agreement.follow(text)


class _Agreement:
    """Exchanges digests; only if they differ, the first rank's description and the other ranks' differences."""

    def __init__(
        self,
        store: Store,
        topology: Topology,
        timeout_s: float,
        entered: Entered,
        disagreement: str,
        remedy: str,
    ) -> None:
        self.entered, self.disagreement, self.remedy = entered, disagreement, remedy
        self.store, self.everyone, self.rank = store, topology.everyone, topology.rank
        self.timeout_s = timeout_s

    def lead(self, text: str) -> None:
        """The first rank: collect digests, publish the verdict."""
        others = range(1, len(self.everyone))
        absent = self._await([f"digest/{rank}" for rank in others])
        if absent:
            names = ", ".join(str(self.everyone[rank]) for rank in others if f"digest/{rank}" in absent)
            self._conclude(
                f"rank {names} did not construct its ShardedLamb within {self.timeout_s:g} s of rank "
                f"{self.everyone[0]}: every rank must construct it, in the same order as other optimizers. "
                f"Look for an earlier error there. {_RESTART}"
            )
            return
        digest = hashlib.sha256(text.encode()).hexdigest()
        unlike = [rank for rank in others if self.store.get(f"digest/{rank}").decode() != digest]
        if not unlike:
            self.store.set("verdict", "agreed")
            return
        self.store.set("description", text)
        self.store.set("verdict", json.dumps(unlike))
        answered = [f"difference/{rank}" for rank in unlike]
        absent = self._await(answered)
        lines = [self.store.get(key).decode() for key in answered if key not in absent]
        self._conclude("\n".join([self.disagreement, *lines]))

    def follow(self, text: str) -> None:
        """Any other rank: publish the digest, wait for the verdict."""
        self.store.set(f"digest/{self.rank}", hashlib.sha256(text.encode()).hexdigest())
        # The first rank may wait for a slower rank, then for its difference: twice its timeout.
        if self._await(["verdict"], 2 * self.timeout_s + 5):
            raise RuntimeError(
                f"rank {self.everyone[0]} did not construct its ShardedLamb within {2 * self.timeout_s + 5:g} s of "
                f"rank {self.everyone[self.rank]}: every rank must construct it. Look for an earlier error there. "
                f"{_RESTART}"
            )
        verdict = self.store.get("verdict").decode()
        if verdict == "agreed":
            return
        if verdict != "absent" and self.rank in json.loads(verdict):
            first = json.loads(self.store.get("description").decode())
            self.store.set(f"difference/{self.rank}", self._difference(first, json.loads(text)))
        self._await(["conclusion"], 2 * self.timeout_s + 5)
        self._raise(self.store.get("conclusion").decode())

    def _difference(self, first: Description, own: Description) -> str:
        """The first entry in which this rank's description differs from the first rank's."""
        a, b = f"rank {self.everyone[0]}", f"rank {self.everyone[self.rank]}"
        for (label, value), (own_label, own_value) in zip(first, own, strict=False):
            if (label, value) != (own_label, own_value):
                remedy = _kernel_remedy({value: a, own_value: b}) if label == own_label == "kernel" else ""
                return f"  {label}: {a} has {value!r}, {b} has {own_label}: {own_value!r}{remedy}"
        longer, rest = (a, first[len(own) :]) if len(first) > len(own) else (b, own[len(first) :])
        return (
            f"  only {longer} has {rest[0][0]}: {rest[0][1]!r} ({a}: {len(first)} entries, {b}: {len(own)})"
        )

    def _conclude(self, message: str) -> None:
        self.store.set("conclusion", message)
        if not self.store.check(["verdict"]):
            self.store.set("verdict", "absent")
        self._raise(message)

    def _raise(self, message: str) -> None:
        if message.startswith("ranks disagree"):
            raise ValueError(f"{message}\n{self.remedy}")
        raise RuntimeError(message)

    def _await(self, keys: Sequence[str], timeout_s: float | None = None) -> set[str]:
        """Wait for all ``keys``; returns those that are missing after ``timeout_s``. Raises as `Entered.wait`."""
        deadline = time.monotonic() + (self.timeout_s if timeout_s is None else timeout_s)
        missing = [*keys]

        def arrive(seconds: float) -> bool:
            end = min(time.monotonic() + seconds, deadline)
            while missing:
                left = max(end - time.monotonic(), 0.01)
                try:
                    self.store.wait(missing[:1], timedelta(seconds=left))
                except (dist.DistStoreError, RuntimeError):
                    return time.monotonic() >= deadline
                missing.pop(0)
            return True

        self.entered.wait(arrive)
        return {key for key in missing if not self.store.check([key])}


def _kernel_remedy(ranks: Mapping[str, str]) -> str:
    """``ranks``: {kernel: a rank that has it}. With kernel="auto", the cause is a host without a compiler."""
    if "torch" not in ranks:
        return ". Choose one that every rank has by kernel=… or SHARDED_LAMB_KERNEL"
    compiler = "Choose"
    if "cpp" in ranks:
        compiler = f"Install a C++ compiler, or the wheel, on the host of {ranks['torch']}, or choose"
    return f". {compiler} kernel='torch' or SHARDED_LAMB_KERNEL=torch on every rank"


@contextmanager
def propagate_errors(
    topology: Topology,
    *,
    always: bool = False,
    what: str = "construction",
    timeout_s: float | None = None,
) -> Iterator[Description]:
    """Raise a local error on every rank, so that none waits for a timeout.

    Args:
        always: make the consistency check here, also without an error, of the description that this yields and the
            body may extend; otherwise the caller makes one afterwards.
        what: the action, in messages.
        timeout_s: seconds to wait for the other ranks.
    """
    description: Description = [(what, "ok")]
    try:
        yield description
    except Exception as error:
        failed = [(what, f"failed: {type(error).__name__}: {error}")]
        with suppress(ValueError, RuntimeError):
            check_consistency(topology, failed, timeout_s)
        raise
    if always:
        check_consistency(topology, description, timeout_s)


def describe_groups(groups: Sequence[Mapping[str, Any]]) -> Description:
    """The groups' options, one entry each. Reads a learning rate that is a tensor."""
    described: Description = []
    for index, group in enumerate(groups):
        options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        options["lr"] = float(options["lr"]) if isinstance(options["lr"], Tensor) else options["lr"]
        described += [(f"options of group {index}: {key}", repr(value)) for key, value in options.items()]
    return described
