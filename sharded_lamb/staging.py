"""Memory that gradients of a bucket pass through on their way to other ranks, used again from bucket to bucket."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sharded_lamb.buckets import FlatBucket
from sharded_lamb.collectives import Collectives

GAP_ELEMENTS = 10_000
"""To zero a gap of its own costs about as much as to zero so many elements along the way."""


@dataclass(frozen=True, slots=True)
class _Places:
    """Views of staging memory for one bucket."""

    full: Tensor  # [bucket] wire dtype, what is sent
    received: Tensor  # [Collectives.received_numel]
    params: list[Tensor]  # of each parameter, in its shape
    gaps: list[Tensor]  # what no parameter fills


@dataclass(slots=True)
class Staging:
    """Two byte buffers that hold what is sent and received of any bucket that they are made for."""

    sent: Tensor
    received: Tensor
    _places: dict[int, _Places] = field(default_factory=dict)

    @staticmethod
    def for_any(buckets: Sequence[FlatBucket], collectives: Collectives) -> "Staging":
        """As large as the largest of ``buckets`` needs."""
        sizes = [(bucket.plan.numel, bucket.precision.wire.itemsize) for bucket in buckets]
        device = buckets[0].flat.device
        sent = max(numel * size for numel, size in sizes)
        received = max(collectives.received_numel(numel) * size for numel, size in sizes)
        return Staging(
            torch.empty(sent, dtype=torch.uint8, device=device),
            torch.empty(received, dtype=torch.uint8, device=device),
        )

    @property
    def nbytes(self) -> int:
        return self.sent.nbytes + self.received.nbytes

    def places(self, index: int, bucket: FlatBucket, collectives: Collectives) -> _Places:
        """Where the bucket with number ``index`` goes; the views are made once."""
        if index not in self._places:
            wire, numel = bucket.precision.wire, bucket.plan.numel
            full = self.sent.view(wire)[:numel]
            gaps = bucket.plan.gaps()
            if len(gaps) * GAP_ELEMENTS > numel:
                gaps = ((0, numel),)
            self._places[index] = _Places(
                full,
                self.received.view(wire)[: collectives.received_numel(numel)],
                [bucket.place(position, full) for position in range(len(bucket.params))],
                [full[low:high] for low, high in gaps],
            )
        return self._places[index]
