"""Gradients into flat shards, with stock torch operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.kernels.shard import FlatShard, LocalContribution, ReceivedShards, Shard


def segment_view(segment: Segment, grad: Tensor) -> Tensor:
    """[segment.length] view of the segment in a gradient without gaps in memory, in memory order."""
    return grad.as_strided((segment.length,), (1,), grad.storage_offset() + segment.start)


class StockIncoming:
    """`Kernel.average` for backends that do not implement it."""

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """See `Kernel`."""
        raise NotImplementedError

    def average(
        self,
        shard: FlatShard,
        segments: Sequence[Segment],
        received: ReceivedShards,
        sums: Tensor,
        *,
        add: bool,
    ) -> None:
        """grad ← average, or grad + average; then Σg²."""
        first, *others = with_local_contribution(received.parts, segments, received.own, shard.compute)
        total = first.to(shard.compute, copy=True)
        for part in others:
            total += part
        if received.divisor != 1:
            total /= received.divisor
        if add:
            shard.grad.add_(total)
        else:
            shard.grad.copy_(total)
        self.square_sums([shard], sums)


def with_local_contribution(
    parts: Tensor, segments: Sequence[Segment], own: LocalContribution | None, dtype: torch.dtype
) -> list[Tensor]:
    """All parts in rank order; this rank's own, which no message carried, as a copy in ``dtype``."""
    rows = list(parts)
    if own is not None:
        row = torch.zeros(parts.shape[1], dtype=dtype, device=parts.device)
        fill(row, segments, own.grads)
        rows.insert(own.row, row)
    return rows


def fill(flat: Tensor, segments: Sequence[Segment], grads: Sequence[Tensor | None]) -> None:
    """Copy segments of ``grads`` to their position in a shard's flat memory; None: zeros. Few launches on a GPU."""
    targets, sources, zeros = [], [], []
    for segment, grad in zip(segments, grads, strict=True):
        target = flat[segment.shard_start : segment.shard_start + segment.length]
        if grad is None:
            zeros.append(target)
        else:
            targets.append(target)
            sources.append(segment_view(segment, grad))
    if zeros:
        torch._foreach_zero_(zeros)
    if targets:
        torch._foreach_copy_(targets, sources)
