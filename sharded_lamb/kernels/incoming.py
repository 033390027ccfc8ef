"""How gradients come into flat shards, in stock torch operations."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.kernels.shard import FlatShard, LocalContribution, ReceivedShards, Shard

GradientCopy = tuple[FlatShard, Sequence[Segment], Sequence[Tensor | None]]
"""What `Kernel.collect` takes: where to, and segments of which gradients."""


def taken(segment: Segment, grad: Tensor) -> Tensor:
    """[segment.length] its part of a gradient without gaps in memory, in memory's order."""
    run = grad.as_strided((grad.numel(),), (1,))
    return run[segment.start : segment.start + segment.length]


class StockIncoming:
    """`Kernel.average` and `Kernel.collect` for backends that have none of their own."""

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
        """grad ← the average, or grad + that; then Σg²."""
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

    def collect(
        self, shard: FlatShard, segments: Sequence[Segment], grads: Sequence[Tensor | None], sums: Tensor
    ) -> None:
        """grad ← segments of ``grads``; then Σg²."""
        fill(shard.grad, segments, grads)
        self.square_sums([shard], sums)


def with_local_contribution(
    parts: Tensor, segments: Sequence[Segment], own: LocalContribution | None, dtype: torch.dtype
) -> list[Tensor]:
    """All rows in their order; this rank's own, which did not travel, as a copy in ``dtype``."""
    rows = list(parts)
    if own is not None:
        row = torch.zeros(parts.shape[1], dtype=dtype, device=parts.device)
        fill(row, segments, own.grads)
        rows.insert(own.row, row)
    return rows


def fill(flat: Tensor, segments: Sequence[Segment], grads: Sequence[Tensor | None]) -> None:
    """Segments of ``grads`` to where they lie in a shard's flat memory; zeros where there is none."""
    fill_together([(flat, segments, grads)])


def fill_together(fillings: Sequence[tuple[Tensor, Sequence[Segment], Sequence[Tensor | None]]]) -> None:
    """As `fill`, of many: all in a few launches on a GPU."""
    places, found, empty = [], [], []
    for flat, segments, grads in fillings:
        for segment, grad in zip(segments, grads, strict=True):
            place = flat[segment.shard_start : segment.shard_start + segment.length]
            if grad is None:
                empty.append(place)
            else:
                places.append(place)
                found.append(taken(segment, grad))
    if empty:
        torch._foreach_zero_(empty)
    if places:
        torch._foreach_copy_(places, found)
