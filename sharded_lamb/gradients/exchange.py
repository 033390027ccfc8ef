"""Memory that gradients of a bucket pass through on their way to other ranks, used again from bucket to bucket.

Two ways, by backend (`Collectives.by_hand`). A library's reduce-scatter takes the bucket in one piece, so all gradients
are copied into it. By hand a shard travels to its owner in messages: a large slice of a gradient by itself, from where
it lies, and what is between such slices together, by way of staging memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives, Pending
from sharded_lamb.core.layout import Segment
from sharded_lamb.kernels import LocalContribution
from sharded_lamb.sharding.buckets import FlatBucket, flattened

GAP_ELEMENTS = 10_000
"""To zero a gap of its own costs about as much as to zero so many elements along the way."""

ALONE_BYTES = 1 << 18
"""A slice of at least this size is a message of its own; a copy of a smaller one costs less than a message."""


class Exchange(Protocol):
    """How the gradients of one bucket leave through one staging memory."""

    full: Tensor  # [bucket] wire dtype, what is sent; not all of it is written by hand
    received: Tensor  # [Collectives.received_numel]

    def own(self, grads: Sequence[Tensor | None]) -> LocalContribution | None:
        """What ``received`` lacks of what was sent to this rank by itself."""

    def start(self, grads: Sequence[Tensor | None]) -> Pending:
        """Send ``grads``, one a parameter of the bucket; None stands for zeros. Meanwhile they must not change."""


class Staging:
    """Two byte buffers that hold what is sent and received of any bucket that they are made for."""

    def __init__(self, buckets: Sequence[FlatBucket], collectives: Collectives) -> None:
        """As large as the largest of ``buckets`` needs; pages that nothing is written to cost nothing on a CPU."""
        sizes = [(bucket.plan.numel, bucket.precision.wire.itemsize) for bucket in buckets]
        device = buckets[0].flat.device
        sent = max(numel * size for numel, size in sizes)
        received = max(collectives.received_numel(numel) * size for numel, size in sizes)
        self.sent = torch.empty(sent, dtype=torch.uint8, device=device)
        self.received = torch.empty(received, dtype=torch.uint8, device=device)
        self._collectives = collectives
        self._exchanges: dict[int, Exchange] = {}

    @property
    def nbytes(self) -> int:
        return self.sent.nbytes + self.received.nbytes

    def knows(self, index: int) -> bool:
        """Whether the bucket with number ``index`` has gone through it."""
        return index in self._exchanges

    def exchange(self, index: int, bucket: FlatBucket) -> Exchange:
        """Of the bucket with number ``index``; its views are made once."""
        if index not in self._exchanges:
            wire, numel = bucket.precision.wire, bucket.plan.numel
            full = self.sent.view(wire)[:numel]
            received = self.received.view(wire)[: self._collectives.received_numel(numel)]
            kind = P2PExchange if self._collectives.by_hand else FusedReduceScatter
            self._exchanges[index] = kind(bucket, full, received, self._collectives)
        return self._exchanges[index]


class FusedReduceScatter:
    """The whole bucket at once."""

    def __init__(self, bucket: FlatBucket, full: Tensor, received: Tensor, collectives: Collectives) -> None:
        self.full, self.received, self._collectives = full, received, collectives
        self._places = [bucket.param_view(position, full) for position in range(len(bucket.params))]
        gaps = bucket.plan.gaps()
        if len(gaps) * GAP_ELEMENTS > bucket.plan.numel:
            gaps = ((0, bucket.plan.numel),)
        self._gaps = [full[low:high] for low, high in gaps]

    def own(self, grads: Sequence[Tensor | None]) -> None:
        """Nothing: the library has written it."""

    def start(self, grads: Sequence[Tensor | None]) -> Pending:
        """See `Exchange`."""
        missing = [place for place, grad in zip(self._places, grads, strict=True) if grad is None]
        given = [(place, grad) for place, grad in zip(self._places, grads, strict=True) if grad is not None]
        with self._collectives.traffic.computing("copy gradients"):
            _zero([*self._gaps, *missing])
            _copy(given)
        return self._collectives.reduce_scatter(self.full, self.received)


@dataclass(slots=True)
class _Slice:
    """A segment of a gradient and the staging memory that it goes to."""

    position: int  # among the bucket's parameters
    segment: Segment
    place: Tensor  # in the parameter's shape where it is whole, else flat
    whole: bool

    def of(self, grad: Tensor, strides: tuple[int, ...]) -> Tensor:
        if self.whole:
            return grad
        return flattened(grad, strides)[self.segment.start : self.segment.start + self.segment.length]


@dataclass(slots=True)
class _Message:
    peer: int
    place: Tensor  # in staging memory
    alone: _Slice | None  # what fills it, where that is one slice


@dataclass(slots=True)
class _Plan:
    copied: list[_Slice] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    outgoing: list[_Message] = field(default_factory=list)
    incoming: list[tuple[int, Tensor]] = field(default_factory=list)


class P2PExchange:
    """Messages to the shards' owners. This rank's own slices stay where they lie until they are summed."""

    def __init__(self, bucket: FlatBucket, full: Tensor, received: Tensor, collectives: Collectives) -> None:
        self.full, self.received, self._collectives = full, received, collectives
        self._bucket, self._plan = bucket, _Plan()
        self._position = {param: position for position, param in enumerate(bucket.plan.params)}
        numel, ranks, here = bucket.plan.shard_numel, collectives.shard_count, collectives.topology.shard_rank
        self._alone = max(ALONE_BYTES // full.element_size(), 1)
        mine = bucket.plan.runs(here, self._alone)
        for distance in range(1, ranks):  # peers at the same distance at the same time
            source, target = (here - distance) % ranks, (here + distance) % ranks
            row = received.view(ranks - 1, -1)[source - (source > here)]
            self._plan.incoming += [(source, row[run.start : run.stop]) for run in mine]
            self._send(target, full[target * numel : (target + 1) * numel])

    def _slice(self, segment: Segment, shard: Tensor, *, alone: bool = False) -> _Slice:
        position = self._position[segment.param]
        place = shard[segment.shard_start : segment.shard_start + segment.length]
        whole = segment.length == self._bucket.plan.numels[position] and not alone
        if whole:
            p, strides = self._bucket.params[position], self._bucket.strides[position]
            place = place.as_strided(p.shape, strides)
        return _Slice(position, segment, place, whole)

    def _send(self, rank: int, shard: Tensor) -> None:
        """The messages to another rank; ``shard``: its part of what is sent."""
        segments = self._bucket.plan.segments(rank)
        for run in self._bucket.plan.runs(rank, self._alone):
            place, alone = shard[run.start : run.stop], None
            if run.segment is not None:
                alone = self._slice(run.segment, shard, alone=True)
            else:
                inside = [s for s in segments if run.start <= s.shard_start < run.stop]
                self._plan.copied += [self._slice(segment, shard) for segment in inside]
                self._plan.gaps += _between(inside, run.start, run.stop, shard)
            self._plan.outgoing.append(_Message(rank, place, alone))

    def own(self, grads: Sequence[Tensor | None]) -> LocalContribution:
        """This rank's slices where they lie."""
        mine = [grads[self._position[segment.param]] for segment in self._bucket.segments]
        return LocalContribution(self._collectives.topology.shard_rank, self._bucket.in_memory_order(mine))

    def start(self, grads: Sequence[Tensor | None]) -> Pending:
        """See `Exchange`."""
        zeros, copies, outgoing = list(self._plan.gaps), [], []
        for part in self._plan.copied:
            grad = grads[part.position]
            if grad is None:
                zeros.append(part.place)
            else:
                copies.append((part.place, part.of(grad, self._bucket.strides[part.position])))
        for message in self._plan.outgoing:
            alone, sent = message.alone, message.place
            grad = None if alone is None else grads[alone.position]
            if alone is not None and grad is None:
                zeros.append(sent)
            elif alone is not None and grad is not None:
                lies = alone.of(grad, self._bucket.strides[alone.position])
                if lies.dtype == sent.dtype:
                    sent = lies
                else:
                    copies.append((sent, lies))
            outgoing.append((message.peer, sent))
        with self._collectives.traffic.computing("copy gradients"):
            _zero(zeros)
            _copy(copies)
        return self._collectives.exchange(outgoing, self._plan.incoming)


def _between(segments: Sequence[Segment], start: int, stop: int, shard: Tensor) -> list[Tensor]:
    """Views of what of [start, stop) no segment fills."""
    ends = [start, *(segment.shard_start + segment.length for segment in segments)]
    starts = [*(segment.shard_start for segment in segments), stop]
    return [shard[end:begin] for end, begin in zip(ends, starts, strict=True) if end < begin]


def _zero(places: Sequence[Tensor]) -> None:
    if places:
        torch._foreach_zero_(list(places))


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        torch._foreach_copy_([place for place, _ in pairs], [grad for _, grad in pairs])
