"""Stage 2 beside DTensors: reduces plain parameters' gradients and reads DTensors' from ``.grad``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.comm.consistency import Description
from sharded_lamb.core.host_values import to_device
from sharded_lamb.gradients.averaged import AveragedGradients
from sharded_lamb.gradients.reducer import BackwardReducer
from sharded_lamb.gradients.source import Identity, Registration
from sharded_lamb.gradients.summary import GradientSummary
from sharded_lamb.kernels import Shard


class MixedGradients:
    """Two `GradientSource`s as one. Each computes its own summary: with both, all-reduce (a) runs twice.

    The reducer computes its summary at the end of backward, when FSDP may not have written ``.grad`` yet.
    """

    def __init__(self, reducer: BackwardReducer, averaged: AveragedGradients) -> None:
        self.reducer, self.averaged = reducer, averaged

    @property
    def enabled(self) -> bool:
        return self.reducer.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.reducer.enabled = value
        self.reducer.may_lag |= not value  # backward may accumulate on some ranks only

    def identities(self) -> list[Identity | None]:
        """See `GradientSource`: without marks, a DTensor's gradient is ``.grad`` in both."""
        return self.reducer.identities()

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
            self.reducer.catch_up()
            self.reducer.settle()

    def ready(
        self, found_inf: Tensor | None, *, may_defer: bool = False, keep: bool = False
    ) -> GradientSummary:
        """See `GradientSource`."""
        if not self._has_dtensors:
            return self.reducer.ready(found_inf)
        if not self.reducer.buckets:
            return self.averaged.ready(found_inf, may_defer=may_defer, keep=keep)
        reduced = self.reducer.ready(found_inf)
        return reduced.joined(self.averaged.ready(found_inf, keep=keep))

    def shards(self) -> list[Shard]:
        """See `GradientSource`."""
        of_buckets = (shard for bucket in self.reducer.buckets for shard in bucket.kernel_shards)
        return [*of_buckets, *self.averaged.shards()]

    def units(self) -> list[Sequence[Shard]]:
        """See `GradientSource`."""
        return [*(bucket.kernel_shards for bucket in self.reducer.buckets), *self.averaged.units()]

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """See `GradientSource`. The reducer counts a gradient that some ranks lack as zero."""
        return (self.averaged if self._has_dtensors else self.reducer).is_partial(summary)

    def unscale_factor(self) -> Tensor | None:
        """Scalar, [P] or None: ``GradScaler.unscale_`` writes DTensors' ``.grad``, not reduced shards."""
        factor = self.reducer.unscale_factor()
        if factor is None or not self._has_dtensors:
            return factor
        is_dtensor = to_device(self.averaged.is_member, None, factor.device)
        return torch.where(is_dtensor, torch.ones_like(factor), factor)

    def edits(self) -> Tensor | None:
        """See `GradientSource`."""
        return self.reducer.edits()

    def described_edits(self) -> Description:
        """See `GradientSource`."""
        return self.reducer.attached.described_edits()

    def stepped(self) -> None:
        """See `GradientSource`."""
        if self.reducer.buckets:
            self.reducer.stepped()
        self.averaged.stepped()

    def zero(self, *, set_to_none: bool) -> None:
        """See `GradientSource`."""
        if self.reducer.buckets:
            self.reducer.zero(set_to_none=set_to_none)
        self.averaged.forget()

    def close(self) -> None:
        """See `GradientSource`."""
        self.reducer.close()
        self.averaged.close()

    def staging_bytes(self) -> int:
        """See `GradientSource`."""
        return self.reducer.staging_bytes()
