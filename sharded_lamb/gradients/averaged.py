"""Gradients that are already averaged over ranks: whole tensors (stage 1), DTensors' local parts (stage 3)."""

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.comm.consistency import Description
from sharded_lamb.core.host_values import to_device
from sharded_lamb.core.parameters import check_gradients
from sharded_lamb.gradients.source import Identity, Registration
from sharded_lamb.gradients.summary import (
    GradientSummary,
    agree,
    check_alike,
    check_present,
    inject_nan,
    local_summary,
)
from sharded_lamb.kernels import Kernel, ScatteredShard, Shard
from sharded_lamb.kernels.engine import gradient_square_sums
from sharded_lamb.sharding.buckets import FlatBucket, GradientsInPlace
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.placements import Replicas

Stamp = tuple[int, int]
"""The version and the address of a gradient."""

CHECKED_STEPS = 2
"""On so many first steps, ranks that hold the same part of a gradient compare it."""


class AveragedGradients:
    """A `GradientSource` that reads ``.grad`` at the step, where it is, and leaves it unchanged."""

    def __init__(self, collectives: Collectives, kernel: Kernel, dtensors: DTensorShards) -> None:
        self.collectives, self.kernel, self.dtensors = collectives, kernel, dtensors
        self.enabled = True
        self.names: list[str] = []
        self.params: list[Tensor] = []
        self.is_member: list[bool] = []  # [P] whether this source reads the gradient
        self.buckets: list[FlatBucket] = []
        self.replicas = Replicas((), (), ())
        self._owner_mask = torch.zeros(0, dtype=torch.float64, device="cpu")
        self._steps_seen = 0
        self._in_place, self._by_bucket = GradientsInPlace([]), list[GradientsInPlace]()
        self._shards: list[Shard] = []
        self._summary: GradientSummary | None = None
        self._summarized_grads: tuple[list[Tensor | None], list[Stamp] | None] = [], None

    def extend(self, added: Registration) -> None:
        """See `GradientSource`."""
        first = len(self.params)
        self.names.extend(added.names)
        self.params.extend(added.params)
        self.is_member += [index in added.members for index in range(first, len(self.params))]
        self.buckets.extend(added.buckets)
        self._in_place = GradientsInPlace(self.buckets)
        self._by_bucket = []
        self.replicas, self._owner_mask = added.replicas, added.owner_mask
        self._summary = None  # it lacks the new parameters

    def identities(self) -> list[Identity | None]:
        """See `GradientSource`: ``.grad`` and its version."""
        return [None if grad is None else (grad, grad._version) for grad in (p.grad for p in self.params)]

    def settle(self) -> None:
        """Does nothing: no reduction is ever in flight."""

    def ready(
        self, found_inf: Tensor | None, *, may_defer: bool = False, keep: bool = False
    ) -> GradientSummary:
        """See `GradientSource`. With ``may_defer`` and DTensors alone, returns this rank's own summary.

        Raises:
            ValueError: gradients differ over ranks that must hold equal ones, or exist on some ranks only.
            TypeError: a sparse gradient, or a plain gradient of a DTensor.
        """
        # GradScaler's unscaling leaves the version unchanged: clip_grad_norm_ may have read scaled gradients.
        if self._summary is None or found_inf is not None or not self._unchanged():
            grads = self._grads()
            if faults.point("gradient"):
                inject_nan(grads)
            square_sums = self._collect(grads) * self._owner_mask
            self._summarized_grads = grads, self._stamps(grads) if keep else None
            if may_defer and not self.buckets and not self._compares():
                return local_summary(square_sums, [grad is not None for grad in grads])
            self._summary = self._agree(grads, square_sums, found_inf)
        return self._summary

    def _compares(self) -> bool:
        return self.collectives.world_size > 1 and self._steps_seen < CHECKED_STEPS

    def _grads(self) -> list[Tensor | None]:
        if all(self.is_member):
            return [p.grad for p in self.params]
        return [
            p.grad if is_member else None for p, is_member in zip(self.params, self.is_member, strict=True)
        ]

    def _unchanged(self) -> bool:
        """Whether every ``.grad`` is the tensor, at the version and address, that the summary was computed from.

        False with DTensors: in-place changes of them (torch's clip_grad_norm_) leave the version unchanged.
        """
        grads, stamps = self._summarized_grads
        return (
            stamps is not None
            and not self.dtensors.local
            and len(grads) == len(self.params)
            and all(map(operator.is_, self._grads(), grads))
            and stamps == self._stamps(grads)
        )

    def _stamps(self, grads: Sequence[Tensor | None]) -> list[Stamp]:
        """``grad.data = …``, as in ``module.to()``, frees the memory that shards point to, and no version shows it."""
        if self.dtensors.local:
            return []
        return [(0, 0) if grad is None else (grad._version, grad.data_ptr()) for grad in grads]

    def _collect(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Find this rank's parts of gradients. Returns [L] fp64: Σg² of them, replicas included."""
        check_gradients(self.names, grads)
        self.dtensors.read_gradients(self.names, self.collectives.traffic)
        found, missing = self._in_place.shards(grads)
        with_gradients = [*found, *self.dtensors.shards]
        self._shards = [*with_gradients, *missing]
        return gradient_square_sums(
            self.kernel, with_gradients, self._owner_mask.numel(), self.params[0].device
        )

    def _agree(
        self, grads: Sequence[Tensor | None], square_sums: Tensor, found_inf: Tensor | None
    ) -> GradientSummary:
        compared = self._compares()
        totals = self._totals(grads) if compared else None
        present = [grad is not None for grad in grads]
        summary = agree(self.collectives, square_sums, present, [False] * len(present), found_inf, totals)
        if (
            compared or summary.present.device.type == "cpu"
        ):  # elsewhere the host does not wait for the device
            check_present(summary, self.names, self.collectives.world_size, self.dtensors.local)
            check_alike(summary, self.replicas)
        return summary

    def _totals(self, grads: Sequence[Tensor | None]) -> Tensor:
        """[2, kinds] fp64: Σg and Σg² of this rank's parts of replicated gradients."""
        device = self.params[0].device
        totals = torch.zeros(2, len(self.replicas.kinds), dtype=torch.float64, device=device)
        for param, grad in enumerate(grads):
            kind = self.replicas.kind_of[param]
            if grad is not None and kind >= 0:
                part = self.dtensors.grads.get(param, grad)
                totals[0, kind] += part.sum(dtype=torch.float64)
                totals[1, kind] += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return totals

    def shards(self) -> list[Shard]:
        """See `GradientSource`: this rank's parts of the gradients, in their own memory."""
        return self._shards

    def units(self) -> list[list[ScatteredShard]]:
        """See `GradientSource`."""
        grads, _ = self._summarized_grads
        if not self._by_bucket:  # only pass 2 with two directions needs them
            self._by_bucket = [GradientsInPlace([bucket]) for bucket in self.buckets]
        of_buckets = [in_place.shards(grads)[0] for in_place in self._by_bucket]
        return [*of_buckets, *([shard] for shard in self.dtensors.shards)]

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """See `GradientSource`. On a GPU the host does not read it."""
        if not summary.agreed or self.collectives.world_size == 1:
            return torch.zeros((), dtype=torch.bool, device=summary.present.device)
        partial = (summary.present > 0) & (summary.present < self.collectives.world_size)
        if not all(self.is_member):
            partial = partial & to_device(self.is_member, None, partial.device)
        return partial.any()

    def unscale_factor(self) -> Tensor | None:
        """None: ``GradScaler.unscale_`` writes ``.grad`` itself."""
        return None

    def edits(self) -> Tensor | None:
        """None: edits of ``.grad`` are in the gradients themselves."""
        return None

    def described_edits(self) -> Description:
        """See `GradientSource`."""
        return []

    def stepped(self) -> None:
        """See `GradientSource`."""
        self._steps_seen += 1
        self.forget()

    def zero(self, *, set_to_none: bool) -> None:
        """See `GradientSource`."""
        self.forget()

    def forget(self) -> None:
        """Forget the gradients that were read."""
        self._summary, self._summarized_grads, self._shards = None, ([], None), []

    def close(self) -> None:
        """See `GradientSource`."""
        self.forget()

    def staging_bytes(self) -> int:
        """0: gradients need no staging memory."""
        return 0
