"""Where gradients come from: one protocol for averaged ones, for those reduced here, and for both together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from sharded_lamb.gradients.summary import GradientSummary
from sharded_lamb.sharding.buckets import FlatBucket
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.placements import Replicas


@dataclass(frozen=True, slots=True)
class Registration:
    """Parameters that join an optimizer after those that it holds, and what is then known of all of them."""

    names: Sequence[str]  # of the new parameters
    params: Sequence[Tensor]  # [new P]
    members: frozenset[
        int
    ]  # indices among all parameters: those of the new ones whose gradients are wanted here
    buckets: Sequence[FlatBucket]  # of the new plain parameters
    dtensors: DTensorShards  # of all parameters
    replicas: Replicas  # of all parameters
    owner_mask: Tensor  # [P] fp64, of all parameters

    def of_plain(self) -> "Registration":
        """For a source of the plain parameters' gradients alone."""
        return replace(self, members=self.members - self.dtensors.local.keys())

    def of_dtensors(self) -> "Registration":
        """For a source of the DTensors' gradients alone."""
        return replace(self, members=self.members & self.dtensors.local.keys(), buckets=())


class GradientSource(Protocol):
    """The gradients of one optimizer, in its buckets' gradient shards and its DTensors' local shards.

    In a step: `ready`, then, once the gradients are used, `stepped`. Between steps: `zero`. All but `unscale_factor`
    and `staging_bytes` may be collective, in the same order on every rank.
    """

    enabled: bool
    """Whether backward may reduce gradients: False inside ``no_sync()``."""

    def extend(self, added: Registration) -> None:
        """Add parameters. `settle` comes before."""

    def settle(self) -> None:
        """Finish what is under way."""

    def ready(self, found_inf: Tensor | None, *, may_wait: bool = False) -> GradientSummary:
        """Gradients into their shards, and the summary of them; all-reduce (a), unless it is known and unchanged.

        Args:
            found_inf: GradScaler's, if one is in use.
            may_wait: nothing is decided by the summary before norms are summed: it may be this rank's own
                (`GradientSummary.agreed`), to be summed with them.

        Raises:
            ValueError, TypeError, RuntimeError: gradients that cannot be used; the sources say which.
        """

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """Bool scalar on the device: a gradient is on some ranks only where it must be on all or none."""

    def unscale_factor(self) -> Tensor | None:
        """The factor of ``GradScaler.unscale_`` that the shards do not have yet: fp64 scalar or [P]; None: none."""

    def stepped(self) -> None:
        """A step has used the gradients."""

    def zero(self) -> None:
        """Forget gradients that are held here; ``.grad`` is the caller's."""

    def staging_bytes(self) -> int:
        """Memory that gradients travel through, so far."""
