"""Stage 2 beside DTensors: plain parameters' gradients are reduced here, DTensors' are read where FSDP left them."""

import torch
from torch import Tensor

from sharded_lamb.gradients.averaged import AveragedGradients
from sharded_lamb.gradients.reducer import BackwardReducer
from sharded_lamb.gradients.source import Registration
from sharded_lamb.gradients.summary import GradientSummary


class MixedGradients:
    """Two `GradientSource`s as one. Each makes a summary of its own: with both, all-reduce (a) is made twice.

    The reducer makes its summary at the end of backward, when FSDP may not have put its gradients into ``.grad`` yet.
    """

    def __init__(self, reducer: BackwardReducer, averaged: AveragedGradients) -> None:
        self.reducer, self.averaged = reducer, averaged

    @property
    def enabled(self) -> bool:
        return self.reducer.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.reducer.enabled = value

    @property
    def rounds(self) -> int:
        """Rounds that the reducer has finished."""
        return self.reducer.rounds

    @property
    def _has_dtensors(self) -> bool:
        return bool(self.averaged.dtensors.local)

    def extend(self, added: Registration) -> None:
        """See `GradientSource`."""
        self.reducer.extend(added.of_plain())
        self.averaged.extend(added.of_dtensors())

    def settle(self) -> None:
        """See `GradientSource`."""
        if self.reducer.buckets:
            self.reducer.settle()

    def ready(self, found_inf: Tensor | None, *, may_wait: bool = False) -> GradientSummary:
        """See `GradientSource`."""
        if not self._has_dtensors:
            return self.reducer.ready(found_inf)
        if not self.reducer.buckets:
            return self.averaged.ready(found_inf, may_wait=may_wait)
        reduced = self.reducer.ready(found_inf)
        return reduced.joined(self.averaged.ready(found_inf))

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """See `GradientSource`. A gradient that some ranks lack counts as zero where it is reduced here."""
        return (self.averaged if self._has_dtensors else self.reducer).is_partial(summary)

    def unscale_factor(self) -> Tensor | None:
        """[P] or None: ``GradScaler.unscale_`` writes DTensors' ``.grad`` and cannot reach reduced shards."""
        factor = self.reducer.unscale_factor()
        if factor is None or not self._has_dtensors:
            return factor
        is_dtensor = torch.tensor(self.averaged.is_member).to(factor.device, non_blocking=True)
        return torch.where(is_dtensor, torch.ones_like(factor), factor)

    def stepped(self) -> None:
        """See `GradientSource`."""
        if self.reducer.buckets:
            self.reducer.stepped()
        self.averaged.stepped()

    def zero(self) -> None:
        """See `GradientSource`."""
        if self.reducer.buckets:
            self.reducer.zero()
        self.averaged.zero()

    def staging_bytes(self) -> int:
        """See `GradientSource`."""
        return self.reducer.staging_bytes()
