"""Sends a bucket's gradients to the shards' owners, through staging memory that buckets reuse.

Two exchanges, by backend (`Collectives.uses_p2p`). `FusedReduceScatter` copies all gradients into one flat bucket for
the library's reduce-scatter. `P2PExchange` sends each shard to its owner in messages: a large slice of a gradient
directly from its own memory, and the small slices between two large ones together, through staging memory. On any
backend, `CompressedExchange` sends encoded gradients.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.pending import Pending
from sharded_lamb.core.layers import repeated
from sharded_lamb.core.layout import BLOCK, Segment
from sharded_lamb.gradients.compressed import CompressedExchange
from sharded_lamb.kernels import Kernel, LocalContribution, ReceivedShards
from sharded_lamb.sharding.buckets import FlatBucket, flattened, in_memory_order

GAP_ELEMENTS = 10_000
"""Zeroing one gap separately costs about as much as zeroing this many elements of the whole bucket."""

MESSAGE_BYTES = 1 << 18
"""A slice of at least this size is a message of its own; copying a smaller one costs less than a message."""


class Exchange(Protocol):
    """Sends the gradients of one bucket through one staging memory."""

    reads_gradients: bool
    """Whether gradients are sent, and `own` reads them, where they are: they must not change meanwhile."""

    def start(self, grads: Sequence[Tensor | None], steps: Tensor) -> Pending:
        """Send ``grads``, one per parameter of the bucket; None means zeros. ``steps``: `Registration.steps`."""

    def received(self, grads: Sequence[Tensor | None]) -> ReceivedShards:
        """After the wait: the average of this rank's shard, in parts. ``grads``: as sent, if `reads_gradients`."""


class Staging:
    """Two byte buffers, for the sent and the received data of any of the buckets."""

    def __init__(self, buckets: Sequence[FlatBucket], collectives: Collectives) -> None:
        """Sized for the largest of ``buckets``; on a CPU unwritten pages cost no memory."""
        device = buckets[0].flat.device
        sent, received = zip(*(_staged_bytes(bucket, collectives) for bucket in buckets), strict=True)
        self.sent = torch.empty(max(sent), dtype=torch.uint8, device=device)
        self.received = torch.empty(max(received), dtype=torch.uint8, device=device)
        self._collectives = collectives
        self._exchanges: dict[int, Exchange] = {}

    @property
    def nbytes(self) -> int:
        return self.sent.nbytes + self.received.nbytes

    def has_exchanged(self, index: int) -> bool:
        """Whether bucket ``index`` has used this memory before."""
        return index in self._exchanges

    def exchange(self, index: int, bucket: FlatBucket) -> Exchange:
        """The exchange of bucket ``index``; constructs its views once."""
        if index not in self._exchanges:
            sizes = _staged_bytes(bucket, self._collectives)
            sent, received = self.sent[: sizes[0]], self.received[: sizes[1]]
            self._exchanges[index] = _exchange_of(bucket, sent, received, self._collectives)
        return self._exchanges[index]


def _staged_bytes(bucket: FlatBucket, collectives: Collectives) -> tuple[int, int]:
    """Bytes that are sent and received for one bucket."""
    wire, plan = bucket.precision.widths.wire, bucket.plan
    received = collectives.received_numel(plan.numel)
    if bucket.precision.reduce is not None:
        received = plan.numel - plan.shard_numel
    return int(plan.numel * wire), int(received * wire)


def _exchange_of(bucket: FlatBucket, sent: Tensor, received: Tensor, collectives: Collectives) -> Exchange:
    """The exchange of ``bucket`` through bytes of `_staged_bytes`."""
    wire, format = bucket.precision.wire, bucket.precision.reduce
    if format is not None:
        coded = sent.view(format.storage).view(-1, format.row)
        parts = received.view(format.storage).view(-1, bucket.plan.shard_numel // BLOCK, format.row)
        return CompressedExchange(bucket, coded, parts, collectives, format)
    kind = P2PExchange if collectives.uses_p2p else FusedReduceScatter
    return kind(bucket, sent.view(wire), received.view(wire), collectives)


class FreeStaging:
    """Staging memory that no exchange uses, kept for the next ones."""

    def __init__(self, collectives: Collectives, *, at_most: int) -> None:
        self._collectives, self._at_most = collectives, at_most
        self._free: list[Staging] = []

    @property
    def nbytes(self) -> int:
        return sum(staging.nbytes for staging in self._free)

    def resize(self) -> None:
        """Free what is kept: buckets were added, which may be larger."""
        self._free.clear()

    def take(self, index: int, buckets: Sequence[FlatBucket]) -> Staging:
        """Memory for bucket ``index``, if possible some that it used before: its pages are already mapped."""
        if not self._free:
            return Staging(buckets, self._collectives)
        used = (i for i, staging in enumerate(self._free) if staging.has_exchanged(index))
        return self._free.pop(next(used, 0))

    def give_back(self, staging: Staging) -> None:
        if len(self._free) < self._at_most:
            self._free.append(staging)


class FusedReduceScatter:
    """One reduce-scatter of the whole bucket."""

    reads_gradients = False

    def __init__(self, bucket: FlatBucket, full: Tensor, received: Tensor, collectives: Collectives) -> None:
        """``full``: [bucket]; ``received``: [Collectives.received_numel]; of the wire's dtype."""
        self._full, self._received, self._collectives = full, received, collectives
        self._views = [bucket.param_view(position, full) for position in range(len(bucket.params))]
        gaps = bucket.plan.gaps()
        if len(gaps) * GAP_ELEMENTS > bucket.plan.numel:
            gaps = ((0, bucket.plan.numel),)
        self._gaps = [full[low:high] for low, high in gaps]

    def received(self, grads: Sequence[Tensor | None]) -> ReceivedShards:
        """See `Exchange`."""
        parts = self._collectives.parts_of_sum(self._full, self._received)
        return ReceivedShards(parts, self._collectives.divisor(self._full.dtype))

    def start(self, grads: Sequence[Tensor | None], steps: Tensor) -> Pending:
        """See `Exchange`."""
        missing = [view for view, grad in zip(self._views, grads, strict=True) if grad is None]
        present = [(view, grad) for view, grad in zip(self._views, grads, strict=True) if grad is not None]
        with self._collectives.traffic.computing("copy gradients"):
            _zero([*self._gaps, *missing])
            _copy(present)
        return self._collectives.reduce_scatter(self._full, self._received)


@dataclass(slots=True)
class _Slice:
    """A segment of a gradient and the staging memory for it."""

    position: int  # among the bucket's parameters
    segment: Segment
    staged: Tensor  # in the parameter's shape if it is whole, else flat
    whole: bool

    def of(self, grad: Tensor, strides: tuple[int, ...]) -> Tensor:
        """The segment of ``grad``, whose parameter has ``strides``."""
        if self.whole:
            return grad
        return flattened(grad, strides)[self.segment.start : self.segment.start + self.segment.length]


@dataclass(slots=True)
class _Message:
    peer: int
    staged: Tensor  # in staging memory
    single: _Slice | None  # the large slice that it sends; None: several copied slices


@dataclass(slots=True)
class _Plan:
    copied: list[_Slice] = field(default_factory=list)
    gaps: list[Tensor] = field(default_factory=list)
    outgoing: list[_Message] = field(default_factory=list)
    incoming: list[tuple[int, Tensor]] = field(default_factory=list)


class P2PExchange:
    """Messages to the shards' owners. This rank's own slices stay in their gradients until they are summed."""

    reads_gradients = True

    def __init__(self, bucket: FlatBucket, full: Tensor, received: Tensor, collectives: Collectives) -> None:
        """``full``: [bucket], in part unused; ``received``: [Collectives.received_numel]; of the wire's dtype."""
        self._full, self._received, self._collectives = full, received, collectives
        self._bucket, self._plan = bucket, _Plan()
        self._position = {param: position for position, param in enumerate(bucket.plan.params)}
        numel, ranks, here = bucket.plan.shard_numel, collectives.shard_count, collectives.topology.shard_rank
        self._message_numel = max(MESSAGE_BYTES // full.element_size(), 1)
        own_runs = bucket.plan.runs(here, self._message_numel)
        for distance in range(1, ranks):  # all ranks exchange at the same distance at the same time
            source, target = (here - distance) % ranks, (here + distance) % ranks
            row = received.view(ranks - 1, -1)[source - (source > here)]
            self._plan.incoming += [(source, row[run.start : run.stop]) for run in own_runs]
            self._send(target, full[target * numel : (target + 1) * numel])

    def _slice(self, segment: Segment, shard: Tensor, *, single: bool = False) -> _Slice:
        position = self._position[segment.param]
        staged = shard[segment.shard_start : segment.shard_start + segment.length]
        whole = segment.length == self._bucket.plan.numels[position] and not single
        if whole:
            p, strides = self._bucket.params[position], self._bucket.strides[position]
            staged = staged.as_strided(p.shape, strides)
        return _Slice(position, segment, staged, whole)

    def _send(self, rank: int, shard: Tensor) -> None:
        """Plan the messages to ``rank``; ``shard``: its part of the sent buffer."""
        segments = self._bucket.plan.segments(rank)
        for run in self._bucket.plan.runs(rank, self._message_numel):
            staged, single = shard[run.start : run.stop], None
            if run.segment is not None:
                single = self._slice(run.segment, shard, single=True)
            else:
                inside = [s for s in segments if run.start <= s.shard_start < run.stop]
                self._plan.copied += [self._slice(segment, shard) for segment in inside]
                self._plan.gaps += _between(inside, run.start, run.stop, shard)
            self._plan.outgoing.append(_Message(rank, staged, single))

    def received(self, grads: Sequence[Tensor | None]) -> ReceivedShards:
        """See `Exchange`."""
        own = [grads[self._position[segment.param]] for segment in self._bucket.segments]
        in_order = in_memory_order(own, self._bucket.segment_strides)
        pieces = repeated(in_order, self._bucket.layer_sources)
        parts = self._collectives.parts_of_sum(self._full, self._received)
        contribution = LocalContribution(self._collectives.topology.shard_rank, pieces)
        return ReceivedShards(parts, self._collectives.divisor(self._full.dtype), contribution)

    def start(self, grads: Sequence[Tensor | None], steps: Tensor) -> Pending:
        """See `Exchange`."""
        zeros, copies, outgoing = list(self._plan.gaps), [], []
        for part in self._plan.copied:
            grad = grads[part.position]
            if grad is None:
                zeros.append(part.staged)
            else:
                copies.append((part.staged, part.of(grad, self._bucket.strides[part.position])))
        for message in self._plan.outgoing:
            single, sent = message.single, message.staged
            grad = None if single is None else grads[single.position]
            if single is not None and grad is None:
                zeros.append(sent)
            elif single is not None and grad is not None:
                part_of_grad = single.of(grad, self._bucket.strides[single.position])
                if part_of_grad.dtype == sent.dtype:
                    sent = part_of_grad
                else:
                    copies.append((sent, part_of_grad))
            outgoing.append((message.peer, sent))
        with self._collectives.traffic.computing("copy gradients"):
            _zero(zeros)
            _copy(copies)
        return self._collectives.exchange(outgoing, self._plan.incoming)


def _between(segments: Sequence[Segment], start: int, stop: int, shard: Tensor) -> list[Tensor]:
    """Views of the gaps in [start, stop) between segments."""
    ends = [start, *(segment.shard_start + segment.length for segment in segments)]
    starts = [*(segment.shard_start for segment in segments), stop]
    return [shard[end:begin] for end, begin in zip(ends, starts, strict=True) if end < begin]


def _zero(views: Sequence[Tensor]) -> None:
    if views:
        torch._foreach_zero_(list(views))


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    if pairs:
        torch._foreach_copy_([view for view, _ in pairs], [grad for _, grad in pairs])


def average(kernel: Kernel, bucket: FlatBucket, received: ReceivedShards, sums: Tensor, *, add: bool) -> None:
    """grad ← average, and adds Σg² to ``sums`` [L]: in one sweep where layers begin at the shard's blocks."""
    is_flat = bucket.kernel_shards[0] is bucket.shard
    own_sums = sums if is_flat else torch.zeros_like(sums)
    kernel.average(bucket.shard, bucket.layer_segments, received, own_sums, add=add)
    if not is_flat:
        kernel.square_sums(bucket.kernel_shards, sums)
