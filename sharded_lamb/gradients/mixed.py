"""Stage 2 beside DTensors: plain parameters' gradients are reduced here, DTensors' are read where FSDP left them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.gradients.averaged import AveragedGradients
from sharded_lamb.gradients.reducer import BackwardReducer
from sharded_lamb.gradients.summary import GradientSummary
from sharded_lamb.sharding.buckets import FlatBucket
from sharded_lamb.sharding.placements import Replicas


class MixedGradients:
    """Two sources as one, with the interface of each. Each agrees on its own summary: with both, (a) is done twice.

    The reducer agrees at the end of backward, when FSDP may not have put its gradients into ``.grad`` yet.
    """

    def __init__(self, reducer: BackwardReducer, placed: AveragedGradients) -> None:
        self.reducer, self.placed = reducer, placed

    @property
    def enabled(self) -> bool:
        return self.reducer.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.reducer.enabled = value

    @property
    def rounds(self) -> int:
        """That the reducer has made."""
        return self.reducer.rounds

    def extend(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        buckets: Sequence[FlatBucket],
        replicas: Replicas,
    ) -> None:
        """Take on parameters that follow those of before."""
        self.reducer.extend(names, params, buckets, replicas)
        self.placed.extend(names, params, buckets, replicas)

    def ready(self, found_inf: Tensor | None, *, may_wait: bool = False) -> GradientSummary:
        """The summary of both."""
        if not self.placed.pieces.pieces:
            return self.reducer.ready(found_inf)
        if not self.reducer.buckets:
            return self.placed.ready(found_inf, may_wait=may_wait)
        reduced = self.reducer.ready(found_inf)
        return reduced.joined(self.placed.ready(found_inf))

    def settle(self) -> None:
        """End an open round, on every rank alike."""
        if self.reducer.buckets:
            self.reducer.settle()

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """A gradient that some ranks lack counts as zero where it is reduced here."""
        if not self.placed.pieces.pieces:
            return self.reducer.is_partial(summary)
        return self.placed.is_partial(summary)

    def unscale_factor(self) -> Tensor | None:
        """[P] or None: ``GradScaler.unscale_`` has written DTensors' ``.grad`` and cannot reach what is reduced."""
        factor = self.reducer.unscale_factor()
        if factor is None or not self.placed.pieces.pieces:
            return factor
        placed = torch.tensor(self.placed.mine).to(factor.device, non_blocking=True)
        return torch.where(placed, torch.ones_like(factor), factor)

    def stepped(self) -> None:
        """A step has used the gradients."""
        self.reducer.stepped()
        self.placed.stepped()

    def zero(self) -> None:
        """Forget what is known of gradients."""
        if self.reducer.buckets:
            self.reducer.zero()
        self.placed.zero()

    def staging_bytes(self) -> int:
        """Of the reducer."""
        return self.reducer.staging_bytes()
