"""Gradients that are averaged over ranks already: this rank takes its slices of whole ones (stage 1), and DTensors'
local parts as they are (stage 3)."""

import operator
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.comm.collectives import Collectives
from sharded_lamb.core.parameters import check_gradients
from sharded_lamb.gradients.summary import (
    GradientSummary,
    agree,
    check_alike,
    check_present,
    local_summary,
    spoil_on_purpose,
)
from sharded_lamb.kernels import Kernel
from sharded_lamb.kernels.engine import collect_gradients, gradient_square_sums
from sharded_lamb.sharding.buckets import FlatBucket
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.placements import Replicas

CHECKED_STEPS = 2
"""Gradients of which ranks hold the same part are compared over them on this many first steps."""


class AveragedGradients:
    """Reads ``.grad`` at the step and leaves it as it is. Same interface as `BackwardReducer`.

    ``dtensors_only``: plain parameters' gradients come from elsewhere, and DTensors' alone are read here.
    """

    def __init__(
        self,
        collectives: Collectives,
        kernel: Kernel,
        mask_replicas: Callable[[Tensor], Tensor],
        pieces: DTensorShards,
        *,
        dtensors_only: bool = False,
    ) -> None:
        self.collectives, self.kernel, self.mask_replicas = collectives, kernel, mask_replicas
        self.pieces, self.dtensors_only = pieces, dtensors_only
        self.params: list[Tensor] = []
        self.names: list[str] = []
        self.mine: list[bool] = []
        self.buckets: list[FlatBucket] = []
        self.replicas = Replicas((), (), ())
        self.enabled = True
        self._steps_seen = 0
        self._known: GradientSummary | None = None
        self._used: tuple[list[Tensor | None], list[int]] = [], []  # gradients, and their versions

    def extend(
        self,
        names: Sequence[str],
        params: Sequence[Tensor],
        buckets: Sequence[FlatBucket],
        replicas: Replicas,
    ) -> None:
        """Take on parameters that follow those of before: in buckets of their own, or among the pieces."""
        self.mine += [
            not self.dtensors_only or index in self.pieces.pieces
            for index in range(len(self.params), len(self.params) + len(params))
        ]
        self.names.extend(names)
        self.params.extend(params)
        self.replicas = replicas
        if not self.dtensors_only:
            self.buckets.extend(buckets)
        self._known = None  # of fewer parameters

    def ready(self, found_inf: Tensor | None, *, may_wait: bool = False) -> GradientSummary:
        """The summary of the gradients of now; collective (a), unless they are known and unchanged.

        ``may_wait``: nobody decides anything by them before the norms are summed; with DTensors alone, they then may
        be this rank's own.

        Raises:
            ValueError: gradients differ over ranks that must hold the same, or are on some ranks only.
            TypeError: a sparse gradient, or one that is no DTensor where the parameter is.
        """
        # GradScaler's unscaling counts no version: what clip_grad_norm_ saw may have been scaled.
        if self._known is None or found_inf is not None or not self._unchanged():
            grads = self._grads()
            if faults.point("gradient"):
                spoil_on_purpose(grads)
            self._used = grads, [0 if grad is None else grad._version for grad in grads]
            square_sums = self.mask_replicas(self._take(grads))
            if may_wait and not self.buckets and not self._compares():
                return local_summary(square_sums, [grad is not None for grad in grads])
            self._known = self._agree(grads, square_sums, found_inf)
        return self._known

    def _compares(self) -> bool:
        return self.collectives.world_size > 1 and self._steps_seen < CHECKED_STEPS

    def _grads(self) -> list[Tensor | None]:
        if not self.dtensors_only:
            return [p.grad for p in self.params]
        return [p.grad if mine else None for p, mine in zip(self.params, self.mine, strict=True)]

    def _unchanged(self) -> bool:
        """Whether every ``.grad`` is the tensor, at the version, that the summary was made of.

        False with DTensors: what is done to them in place (torch's clip_grad_norm_) counts no version.
        """
        grads, versions = self._used
        return (
            not self.pieces.pieces
            and len(grads) == len(self.params)
            and all(map(operator.is_, self._grads(), grads))
            and versions == [0 if grad is None else grad._version for grad in grads]
        )

    def _take(self, grads: Sequence[Tensor | None]) -> Tensor:
        """[P] fp64: Σg² of what this rank holds."""
        check_gradients(self.names, grads)
        self.pieces.read_gradients(self.names, self.collectives.traffic)
        sums = gradient_square_sums(self.kernel, self.pieces.shards, len(grads), self.params[0].device)
        collect_gradients(self.kernel, [bucket.own_gradients(grads) for bucket in self.buckets], sums)
        return sums

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
            check_present(summary, self.names, self.collectives.world_size, self.pieces.pieces)
            check_alike(summary, self.replicas)
        return summary

    def _totals(self, grads: Sequence[Tensor | None]) -> Tensor:
        """[2, kinds] fp64: Σg and Σg² of this rank's parts of the gradients that other ranks hold too."""
        device = self.params[0].device
        totals = torch.zeros(2, len(self.replicas.kinds), dtype=torch.float64, device=device)
        for param, grad in enumerate(grads):
            kind = self.replicas.kind_of[param]
            if grad is not None and kind >= 0:
                part = self.pieces.grads.get(param, grad)
                totals[0, kind] += part.sum(dtype=torch.float64)
                totals[1, kind] += torch.linalg.vector_norm(part, dtype=torch.float64).square()
        return totals

    def settle(self) -> None:
        """Nothing is ever under way."""

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """Bool, on the device: a gradient is on some ranks only, which the host has not seen on a GPU."""
        if not summary.agreed or self.collectives.world_size == 1:
            return torch.zeros((), dtype=torch.bool, device=summary.present.device)
        partial = (summary.present > 0) & (summary.present < self.collectives.world_size)
        if self.dtensors_only:
            partial = partial & torch.tensor(self.mine).to(partial.device, non_blocking=True)
        return partial.any()

    def unscale_factor(self) -> Tensor | None:
        """None: ``.grad`` itself is what ``GradScaler.unscale_`` wrote."""
        return None

    def stepped(self) -> None:
        """A step has used the gradients."""
        self._steps_seen += 1
        self.zero()

    def zero(self) -> None:
        """Gradients are about to be zeroed, or have been used: forget what is known of them."""
        self._known, self._used = None, ([], [])

    def staging_bytes(self) -> int:
        """No memory beside the gradient shards."""
        return 0
