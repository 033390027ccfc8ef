"""Stage 1: gradients that are averaged over ranks already; this rank takes its slices of them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sharded_lamb.buckets import FlatBucket
from sharded_lamb.collectives import Collectives
from sharded_lamb.facts import GradientFacts, SquareSums, agree, check_averaged, check_gradient

CHECKED_STEPS = 2
"""Whole gradients are compared over ranks on this many first steps."""


class AveragedGradients:
    """Reads ``.grad`` at the step and leaves it as it is. Same interface as `BackwardReducer`."""

    def __init__(self, collectives: Collectives, square_sums: SquareSums) -> None:
        self.collectives, self.square_sums = collectives, square_sums
        self.params: list[Tensor] = []
        self.names: list[str] = []
        self.buckets: list[FlatBucket] = []
        self.enabled = True
        self._steps_seen = 0
        self._known: GradientFacts | None = None
        self._used: list[tuple[Tensor | None, int | None]] = []

    def extend(self, names: Sequence[str], params: Sequence[Tensor], buckets: Sequence[FlatBucket]) -> None:
        """Take on parameters that follow those of before, in buckets of their own."""
        self.names.extend(names)
        self.params.extend(params)
        self.buckets.extend(buckets)

    def ready(self, found_inf: Tensor | None) -> GradientFacts:
        """The facts of the gradients of now; collective (a), unless they are known and unchanged.

        Raises:
            ValueError: gradients differ over ranks, or are on some ranks only (see `check_averaged`).
            TypeError: a sparse gradient.
        """
        # GradScaler's unscaling counts no version: what clip_grad_norm_ saw may have been scaled.
        if self._known is None or found_inf is not None or not self._unchanged():
            self._used = [(p.grad, None if p.grad is None else p.grad._version) for p in self.params]
            self._known = self._collect(found_inf)
        return self._known

    def _unchanged(self) -> bool:
        """Whether every ``.grad`` is the tensor, at the version, that the facts were made of."""
        return len(self._used) == len(self.params) and all(
            p.grad is grad and (grad is None or grad._version == version)
            for p, (grad, version) in zip(self.params, self._used, strict=True)
        )

    def _collect(self, found_inf: Tensor | None) -> GradientFacts:
        grads = [p.grad for p in self.params]
        for name, grad in zip(self.names, grads, strict=True):
            if grad is not None:
                check_gradient(name, grad)
        for bucket in self.buckets:
            bucket.take_own_gradients()
        compared = self.collectives.world_size > 1 and self._steps_seen < CHECKED_STEPS
        totals = self._totals() if compared else None
        present = [grad is not None for grad in grads]
        facts = agree(
            self.collectives, self.square_sums(), present, [False] * len(present), found_inf, totals
        )
        if compared or facts.present.device.type == "cpu":  # elsewhere the host does not wait for the device
            check_averaged(facts, self.names, self.collectives.world_size)
        return facts

    def _totals(self) -> Tensor:
        """[2] fp64: Σg and Σg² of this rank's whole gradients."""
        totals = torch.zeros(2, dtype=torch.float64, device=self.params[0].device)
        for p in self.params:
            if p.grad is not None:
                totals[0] += p.grad.sum(dtype=torch.float64)
                totals[1] += torch.linalg.vector_norm(p.grad, dtype=torch.float64).square()
        return totals

    def settle(self) -> None:
        """Nothing is ever under way."""

    def is_partial(self, facts: GradientFacts) -> Tensor:
        """Bool, on the device: a gradient is on some ranks only, which the host has not seen on a GPU."""
        return ((facts.present > 0) & (facts.present < self.collectives.world_size)).any()

    def unscale_factor(self) -> Tensor | None:
        """None: ``.grad`` itself is what ``GradScaler.unscale_`` wrote."""
        return None

    def stepped(self) -> None:
        """A step has used the gradients."""
        self._steps_seen += 1
        self.zero()

    def zero(self) -> None:
        """Gradients are about to be zeroed, or have been used: forget what is known of them."""
        self._known, self._used = None, []

    def staging_bytes(self) -> int:
        """No memory beside the gradient shards."""
        return 0
