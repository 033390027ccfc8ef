"""Results of steps: kept on the device as the step computed them, and read when someone asks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sharded_lamb.core import rule
from sharded_lamb.core.host_values import HostCopy
from sharded_lamb.core.options import OptionTable


class LayerNorms(NamedTuple):
    """One parameter's norms in a step, over all ranks.

    ``ratio`` is φ(``weight``)/``update``, clipped, where the parameter adapts and both norms are > 0; else 1. With
    ``nesterov`` (LANS), ``update`` and ``ratio`` are those of the first direction, u. LARS computes no ‖u‖: NaN.
    """

    weight: float  # ‖w‖ before the step, of the masters where they exist
    update: float  # ‖u‖
    gradient: float  # ‖g‖, averaged over ranks, unscaled, before clipping; NaN if the step did not compute it
    ratio: float


class ParameterResult(NamedTuple):
    """One parameter's results of a step, on the host."""

    norms: LayerNorms
    updated: bool
    bad: bool  # the gradient is non-finite
    skipped: bool  # the step, for all parameters


@dataclass(frozen=True, slots=True)
class LastStep:
    """Results of one step, on the device. ``table`` describes its P parameters.

    Makes no collective: ``square_sums`` and ``gradient_sums`` are what the step summed over ranks.
    """

    table: OptionTable
    updated: Tensor  # [P] bool
    skipped: Tensor | None = None  # bool scalar; None: False
    gradient_sums: Tensor | None = None  # [P] fp64 Σg² of the stored gradients; None: not computed
    unscale: Tensor | None = None  # fp64 scalar, or [P]: the stored gradients' inverse scale; None: 1
    grad_norm: Tensor | None = None  # fp64 scalar; None: not computed
    square_sums: Tensor | None = None  # [1 + D, P] fp64; None: skipped before pass 1
    ratios: Tensor | None = None  # [D, P] fp64; None likewise

    def columns(self) -> Tensor:
        """[7, P] fp64 on the device: the numbers of `LayerNorms` and `ParameterResult`."""
        is_fp64 = self.table.is_fp64
        unknown = torch.full(is_fp64.shape, torch.nan, dtype=torch.float64, device=is_fp64.device)
        weight = update = ratio = gradient = unknown
        bad = skipped = torch.zeros_like(unknown)
        if self.square_sums is not None and self.ratios is not None:
            weight, *updates = rule.norms(self.square_sums, is_fp64)
            update = updates[0] if updates else unknown
            ratio = self.ratios[0]
        if self.gradient_sums is not None:
            gradient, bad = rule.norms(self.gradient_sums, is_fp64), ~self.gradient_sums.isfinite()
            gradient = gradient if self.unscale is None else gradient * self.unscale.abs()
        if self.skipped is not None:
            skipped = self.skipped.expand_as(unknown)
        columns = [weight, update, gradient, ratio, self.updated, bad, skipped]
        return torch.stack([column.to(torch.float64) for column in columns])


Steps = Sequence[LastStep]
"""One step: a `LastStep` for each device, or call, that updated its own parameters."""


class PendingResults:
    """Results of a step on their way to the host."""

    def __init__(self, steps: Steps) -> None:
        self._parts = [(step.table.names, HostCopy(step.columns())) for step in steps]

    def read(self) -> dict[str, ParameterResult]:
        """{name: result} in the parameters' order. Waits for the device."""
        results: dict[str, ParameterResult] = {}
        for names, copy in self._parts:
            for name, (*norms, updated, bad, skipped) in zip(names, copy.wait().T.tolist(), strict=True):
                result = ParameterResult(LayerNorms(*norms), bool(updated), bool(bad), bool(skipped))
                if result.updated or name not in results:  # every device has all parameters of `Lamb`
                    results[name] = result
        return results


class StepResults:
    """The last step, and those before it that explain a skipped one. The host learns of a skip one step late."""

    __slots__ = ("first_skipped", "last", "updating")

    def __init__(self) -> None:
        self.last: Steps = ()
        self.updating: Steps = ()  # the latest step before ``last`` that was not skipped
        self.first_skipped: Steps = ()  # the first skip in a row before ``last``, if that row has not ended

    def read(self) -> dict[str, ParameterResult]:
        """The results of ``last``. Waits for the device."""
        return PendingResults(self.last).read()

    @property
    def grad_norm(self) -> float | None:
        """The global norm of ``last``, or None. Waits for the device."""
        norms = [step.grad_norm for step in self.last if step.grad_norm is not None]
        return float(norms[0].item()) if norms else None

    def settle(self, *, was_skipped: bool) -> None:
        """Call before the next step: whether ``last`` was skipped."""
        if not was_skipped:
            self.updating, self.first_skipped = self.last, ()
        elif not self.first_skipped:
            self.first_skipped = self.last
