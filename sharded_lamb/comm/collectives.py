"""The collectives of a step, counted, on dedicated process groups.

Dedicated groups separate the order of these operations from the user's: gloo matches operations by their order
alone. The implementation depends on the backend (measured on gloo 2.13): gloo's reduce_scatter_tensor is 2.3 times
slower than an all_reduce and its all_gather copies everything twice, so on gloo shards are sent and received point to
point, in place, and this rank sums the received parts in fp32 and in rank order.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.comm.groups import OwnedGroup, Tag, has_backend
from sharded_lamb.comm.pending import Pending
from sharded_lamb.comm.stalls import Entered, Stalls, explained
from sharded_lamb.comm.topology import Topology
from sharded_lamb.timeline import COMPUTE, Flight, Timeline

T = TypeVar("T")


@dataclass
class Traffic:
    """Communication since construction: calls by name, and bytes that this rank sent.

    ``timeline``: records when, and the computation meanwhile; None: no recording.
    """

    calls: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    timeline: Timeline | None = field(default=None, repr=False, compare=False)

    def add(self, name: str, sent: int) -> None:
        self.calls[name] += 1
        self.bytes[name] += sent

    def blocking(self, name: str, sent: int) -> AbstractContextManager[None]:
        """Context of a blocking collective."""
        self.add(name, sent)
        return nullcontext() if self.timeline is None else self.timeline.blocking(name, sent)

    def launched(self, name: str, sent: int) -> Flight | None:
        """Count an asynchronous collective before its start."""
        self.add(name, sent)
        return None if self.timeline is None else self.timeline.launched(name, sent)

    def computing(self, name: str) -> AbstractContextManager[None]:
        """Context of a computation, recorded in the timeline."""
        return nullcontext() if self.timeline is None else self.timeline.span(name, COMPUTE)

    def computing_each(self, name: str, computed: Iterator[T]) -> Iterator[T]:
        """``computed``, with one recorded span per item; the loop's body is in none of them."""
        return computed if self.timeline is None else self.timeline.each(name, COMPUTE, computed)


class Collectives:
    """The process groups of one optimizer and its operations on them, in one fixed order on every rank.

    Construction is collective over ``topology.everyone`` (one new group per role with several ranks).

    Raises:
        RuntimeError: at construction; the backend for ``device`` cannot send its memory.
    """

    def __init__(self, topology: Topology, device: torch.device) -> None:
        if len(topology.everyone) > 1:
            _refuse_gloo_on_devices(device)
        self.topology = topology
        self.device = device
        self.traffic = Traffic()
        self.everyone = self._group(topology.everyone, device)
        two_level = len(topology.replica_ranks) > 1
        self._shard = self._group(topology.shard_ranks, device) if two_level else self.everyone
        self._replica = self._group(topology.replica_ranks, device) if two_level else None
        self.uses_p2p = self._shard is not None and _backend(self._shard.pg, device) == "gloo"
        """Whether `exchange` and local sums replace `reduce_scatter`: on gloo."""
        self._stalls: Stalls | None = None
        if self.everyone is not None and _backend(self.everyone.pg, device) == "gloo":
            self._stalls = Stalls(self.everyone.name, topology.global_rank, self._abandon)

    @staticmethod
    def _group(ranks: tuple[int, ...], device: torch.device) -> OwnedGroup | None:
        return OwnedGroup.on(device, ranks) if len(ranks) > 1 else None

    @property
    def has_peers(self) -> bool:
        """Whether reductions and gathers have a group; one rank needs none."""
        return bool(self._groups())

    @property
    def is_alive(self) -> bool:
        """Whether all groups exist; True if one rank needs none."""
        return all(group.is_alive for group in self._groups())

    def close(self) -> None:
        """End the groups on this rank; a later collective raises RuntimeError. Not collective."""
        for group in self._groups():
            group.end()

    def _abandon(self) -> None:
        for group in self._groups():
            group.abandon()

    def _groups(self) -> list[OwnedGroup]:
        return [group for group in (self.everyone, self._shard, self._replica) if group is not None]

    @property
    def world_size(self) -> int:
        return len(self.topology.everyone)

    @property
    def shard_count(self) -> int:
        return len(self.topology.shard_ranks)

    def _entered(self, collective: str, ranks: Sequence[int]) -> Entered | None:
        return None if self._stalls is None else self._stalls.entered(collective, ranks)

    @contextmanager
    def _on_wire(self, tensor: Tensor) -> Iterator[Tensor]:
        """The tensor; if it is not on the groups' device (CPU offload), a copy that is written back."""
        wire = tensor if tensor.device.type == self.device.type else tensor.to(self.device)
        yield wire
        if wire is not tensor:
            tensor.copy_(wire)

    def all_reduce_small(self, vector: Tensor) -> None:
        """All-reduce (sum) a packed vector over everyone, in place."""
        faults.point("all-reduce")
        if self.everyone is not None:
            with self.traffic.blocking("all_reduce_small", vector.nbytes), self._on_wire(vector) as wire:
                start = partial(dist.all_reduce, wire, group=self.everyone.pg)
                self._finish("all-reduce of step or clip_grad_norm_, number", start)

    def sum_to_first(self, tensor: Tensor) -> None:
        """Reduce (sum) over everyone into the first rank's tensor; the other ranks' tensors become undefined."""
        if self.everyone is not None:
            with self.traffic.blocking("sum_to_first", tensor.nbytes), self._on_wire(tensor) as wire:
                start = partial(dist.reduce, wire, self.topology.everyone[0], group=self.everyone.pg)
                self._finish("sum of whole state, number", start)

    def broadcast(self, tensor: Tensor, source: int = 0) -> None:
        """Broadcast from the rank of index ``source`` of everyone, in place."""
        if self.everyone is not None:
            with self.traffic.blocking("broadcast", tensor.nbytes), self._on_wire(tensor) as wire:
                start = partial(dist.broadcast, wire, self.topology.everyone[source], group=self.everyone.pg)
                self._finish("broadcast of parameters, number", start)

    def _finish(self, collective: str, start: Callable[..., "dist.Work | None"]) -> None:
        """Start an operation over everyone and wait for it; raises as `Entered.wait`."""
        entered = self._entered(collective, self.topology.everyone)
        with explained(entered):
            work = start(async_op=entered is not None)
            if entered is not None:
                assert work is not None
                entered.wait(lambda seconds: _completes(work, seconds))

    def reduce_scatter(self, full: Tensor, received: Tensor) -> Pending:
        """Start a reduce-scatter over the shard group; afterwards `parts_of_sum` returns the result.

        Args:
            full: [shard_count x n] this rank's gradients of a bucket, wire dtype.
            received: [n].
        """
        if self._shard is None:
            return Pending([])
        faults.point("reduce-scatter")
        others = full.nbytes // self.shard_count * (self.shard_count - 1)
        flight = self.traffic.launched("reduce_scatter", others)
        op = dist.ReduceOp.AVG if self._averages(full.dtype) else dist.ReduceOp.SUM
        pending = Pending([_reduce_scatter(received, full, self._shard.pg, op)], flight)
        faults.point("mid-reduce-scatter")
        return pending

    def exchange(
        self, outgoing: Sequence[tuple[int, Tensor]], incoming: Sequence[tuple[int, Tensor]]
    ) -> Pending:
        """The point-to-point `reduce_scatter`: messages within the shard group, in one order between any two ranks.

        Args:
            outgoing, incoming: (rank in the group, contiguous tensor).
        """
        if self._shard is None:
            return Pending([])
        faults.point("reduce-scatter")
        flight = self.traffic.launched("reduce_scatter", sum(tensor.nbytes for _, tensor in outgoing))
        group, tag = self._shard.pg, Tag.GRADIENTS
        if not self.uses_p2p:  # NCCL makes one operation of the batch
            batch = [dist.P2POp(dist.irecv, x, group=group, tag=tag, group_peer=rank) for rank, x in incoming]
            batch += [
                dist.P2POp(dist.isend, x, group=group, tag=tag, group_peer=rank) for rank, x in outgoing
            ]
            faults.point("mid-reduce-scatter")
            return Pending(dist.batch_isend_irecv(batch), flight, memory=outgoing)
        entered = self._entered("reduce-scatter of backward, number", self.topology.shard_ranks)
        with explained(entered):
            works = [dist.irecv(tensor, group=group, tag=tag, group_src=rank) for rank, tensor in incoming]
            faults.point("mid-reduce-scatter")
            works += [dist.isend(tensor, group=group, tag=tag, group_dst=rank) for rank, tensor in outgoing]
        peers = [rank for rank, _ in [*incoming, *outgoing]]
        return Pending(works, flight, messages=(self._shard, peers), memory=outgoing, entered=entered)

    def received_numel(self, full_numel: int) -> int:
        """The number of elements of ``received`` for a `reduce_scatter` of ``full_numel`` elements."""
        if self._shard is None:
            return 0
        shard_numel = full_numel // self.shard_count
        return full_numel - shard_numel if self.uses_p2p else shard_numel

    def _averages(self, dtype: torch.dtype) -> bool:
        """Whether `reduce_scatter` averages: it sums in ``dtype``, and a sum of float16 would overflow."""
        return self._shard is not None and not self.uses_p2p and dtype.itemsize == 2

    def divisor(self, dtype: torch.dtype) -> int:
        """What the sum of `parts_of_sum`, exchanged in ``dtype``, is divided by for the average over all ranks."""
        return self.world_size // self.shard_count if self._averages(dtype) else self.world_size

    @property
    def has_replicas(self) -> bool:
        return self._replica is not None

    def parts_of_sum(self, full: Tensor, received: Tensor) -> Tensor:
        """[k, n] wire dtype: parts whose sum, in order, is the sum over the ranks of the shard group, or its average.

        With point-to-point messages, one part from every other rank; this rank's own part is not among them.
        """
        if self._shard is None:
            return full.view(1, -1)
        return received.view(self.shard_count - 1 if self.uses_p2p else 1, -1)

    def sum_over_replicas(self, parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Pending]:
        """Start to all-reduce the sum of ``parts``, in order, over replicas: [1, n] ``dtype``, once it has arrived."""
        assert self._replica is not None
        total = parts[0].to(dtype, copy=True)
        for part in parts[1:]:
            total += part
        flight = self.traffic.launched("all_reduce_replicas", total.nbytes)
        entered = self._entered("sum over replicas, number", self.topology.replica_ranks)
        with explained(entered):
            work: dist.Work | None = dist.all_reduce(total, group=self._replica.pg, async_op=True)
        return total.view(1, -1), Pending([work], flight, entered=entered)

    def all_gather(self, flat: Tensor) -> Pending:
        """Start an in-place all-gather of ``flat``: rank r's shard is the r-th equal part."""
        if self._shard is None:
            return Pending([])
        faults.point("all-gather")
        size, rank = flat.numel() // self.shard_count, self.topology.shard_rank
        flight = self.traffic.launched("all_gather", size * flat.element_size() * (self.shard_count - 1))
        if not self.uses_p2p:
            work = _all_gather(flat, flat[rank * size : (rank + 1) * size], self._shard.pg)
            faults.point("mid-all-gather")
            return Pending([work], flight)
        shard = flat[rank * size : (rank + 1) * size]
        # Receives first: a "ready to receive" queued behind data serializes two ranks (half the speed). Ranks pair up
        # by distance, so that no rank is the first peer of all others.
        works: list[dist.Work | None] = []
        group, tag = self._shard.pg, Tag.PARAMETERS
        sources = [(rank - distance) % self.shard_count for distance in range(1, self.shard_count)]
        targets = sources[::-1]
        entered = self._entered("all-gather of parameters, number", self.topology.shard_ranks)
        with explained(entered):
            for source in sources:
                part = flat[source * size : (source + 1) * size]
                works.append(dist.irecv(part, group=group, tag=tag, group_src=source))
            faults.point("mid-all-gather")
            works += [dist.isend(shard, group=group, tag=tag, group_dst=target) for target in targets]
        return Pending(works, flight, messages=(self._shard, [*sources, *targets]), entered=entered)

    def gather_to(self, shard: Tensor, to: int) -> list[Tensor] | None:
        """Gather all shards of a bucket to the CPU of the ``to``-th rank of everyone; None on the other ranks.

        Transfers one rank's part at a time, so that the receiver never holds two on its device.
        """
        everyone, here = self.topology.everyone, self.topology.global_rank
        receiver, gathered = everyone[to], []
        entered = self._entered("transfer of whole state, number", everyone)
        for owner in everyone[: self.shard_count]:
            if here == receiver == owner:
                gathered.append(shard.cpu())
            elif here == receiver:
                buffer = torch.empty_like(shard)
                self._transfer(dist.irecv, buffer, owner, entered)
                gathered.append(buffer.cpu())
            elif here == owner:
                self._transfer(dist.isend, shard.contiguous(), receiver, entered)
        return gathered if here == receiver else None

    def scatter_from_first(self, shard: Tensor, parts: list[Tensor] | None) -> None:
        """The reverse of `gather_to`: ``parts`` (one per shard rank) on the first rank; replicas get copies."""
        everyone, here = self.topology.everyone, self.topology.global_rank
        entered = self._entered("transfer of whole state, number", everyone)
        for index, owner in enumerate(everyone):
            if here == everyone[0]:
                assert parts is not None
                part = parts[index % self.shard_count]
                if here == owner:
                    shard.copy_(part)
                else:
                    self._transfer(dist.isend, torch.empty_like(shard).copy_(part), owner, entered)
            elif here == owner:
                self._transfer(dist.irecv, shard, everyone[0], entered)

    def _transfer(
        self, start: Callable[..., "dist.Work | None"], tensor: Tensor, peer: int, entered: Entered | None
    ) -> None:
        """Send ``tensor`` to or receive it from the global rank ``peer``, and wait for it.

        As a batch of one: outside of batches NCCL makes a communicator for every pair of ranks.
        """
        assert self.everyone is not None
        with explained(entered):  # the connection may be closed already
            works = dist.batch_isend_irecv([dist.P2POp(start, tensor, peer, self.everyone.pg, Tag.STATE)])
        messages = self.everyone, [self.topology.everyone.index(peer)]
        Pending(works, messages=messages, memory=tensor, entered=entered).wait()


def _completes(work: "dist.Work", seconds: float) -> bool:
    """Whether ``work`` completes within ``seconds``; raises its error."""
    try:
        work.wait(timedelta(seconds=seconds))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # the error may be that of the time, after which the work has completed
    return True


def _backend(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend of ``group`` for ``device``: one group may have several ("cpu:gloo,cuda:nccl")."""
    return group._get_backend(device).name().lower()


def _refuse_gloo_on_devices(device: torch.device) -> None:
    default: Any = dist.group.WORLD
    if device.type != "cpu" and has_backend(device) and _backend(default, device) == "gloo":
        raise RuntimeError(
            f"the parameters are on {device} and the process group's backend for {device.type} is gloo, which sends "
            f"memory of the CPU only: use init_process_group('cpu:gloo,cuda:nccl') or ('nccl'), or move the model to "
            f"the CPU"
        )


def _reduce_scatter(
    output: Tensor, full: Tensor, group: dist.ProcessGroup, op: "dist.ReduceOp.RedOpType"
) -> "dist.Work | None":
    single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    work: dist.Work | None = single(output, full, op=op, group=group, async_op=True)
    return work


def _all_gather(flat: Tensor, shard: Tensor, group: dist.ProcessGroup) -> "dist.Work | None":
    single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    work: dist.Work | None = single(flat, shard, group=group, async_op=True)
    return work
