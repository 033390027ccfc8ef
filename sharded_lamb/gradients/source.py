"""Sources of gradients: one protocol for averaged gradients, for reduced ones, and for both together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

from torch import Tensor

from sharded_lamb.comm.consistency import Description
from sharded_lamb.core.layers import Layers
from sharded_lamb.gradients.handles import Mark
from sharded_lamb.gradients.summary import GradientSummary
from sharded_lamb.kernels import Shard
from sharded_lamb.sharding.buckets import FlatBucket
from sharded_lamb.sharding.local_shards import DTensorShards
from sharded_lamb.sharding.placements import Replicas

Identity: TypeAlias = tuple[Mark | Tensor, int]
"""An object that stays while the gradient is that of the same backwards, and the number of its changes in place."""


@dataclass(frozen=True, slots=True)
class Registration:
    """New parameters of an optimizer, and the DTensors, replicas and owner mask of all its parameters."""

    names: Sequence[str]  # of the new parameters
    params: Sequence[Tensor]  # [new P]
    members: frozenset[int]  # indices, among all parameters, of the new ones that this source reads
    buckets: Sequence[FlatBucket]  # of the new plain parameters
    dtensors: DTensorShards  # of all parameters
    replicas: Replicas  # of all parameters
    layers: Layers  # of all parameters
    owner_mask: Tensor  # [L] fp64, of all parameters
    steps: Tensor  # [P] fp64, of all parameters; steps add to it in place

    def of_plain(self) -> "Registration":
        """For a source that reads plain parameters' gradients only."""
        return replace(self, members=self.members - self.dtensors.local.keys())

    def of_dtensors(self) -> "Registration":
        """For a source that reads DTensors' gradients only."""
        return replace(self, members=self.members & self.dtensors.local.keys(), buckets=())


class GradientSource(Protocol):
    """The gradients of one optimizer: reduced into its buckets' gradient shards, or in ``.grad``.

    A step calls `ready`, and `stepped` once it has used the gradients; `zero` follows between steps. All methods except
    `identities`, `shards`, `units`, `unscale_factor`, `edits`, `described_edits`, `close` and `staging_bytes` may be
    collective, in one order on every rank.
    """

    enabled: bool
    """Whether backward may reduce gradients: False inside ``no_sync()``."""

    def identities(self) -> Sequence[Identity | None]:
        """[P] which gradient each parameter has now, and None without one. Not collective."""

    def extend(self, added: Registration) -> None:
        """Add parameters, after `settle`."""

    def settle(self) -> None:
        """Finish reductions in flight, also those of other ranks that this rank has not started."""

    def ready(
        self, found_inf: Tensor | None, *, may_defer: bool = False, keep: bool = False
    ) -> GradientSummary:
        """Put gradients into their shards and return their summary; all-reduce (a), unless the last one is still valid.

        Args:
            found_inf: GradScaler's, if one is in use.
            may_defer: no decision needs the summary before norms are summed: it may be this rank's own
                (`GradientSummary.agreed`), to be summed with the norms.
            keep: a later call returns the same summary if gradients did not change in between; a step needs none.

        Raises:
            ValueError, TypeError, RuntimeError: unusable gradients; see the implementations.
        """

    def shards(self) -> Sequence[Shard]:
        """The kernels' shards with this step's gradients, once `ready` has read them. Not collective."""

    def units(self) -> Sequence[Sequence[Shard]]:
        """`shards` as pass 2 takes them where it reads gradients: those of each bucket, in order, then each DTensors'.

        Without pieces that have no gradient, which pass 2 leaves as they are.
        """

    def is_partial(self, summary: GradientSummary) -> Tensor:
        """Bool scalar on the device: some ranks lack a gradient that must be on all ranks or on none."""

    def unscale_factor(self) -> Tensor | None:
        """The factor of ``GradScaler.unscale_``, or by which users scaled gradients, that is not in the shards yet.

        fp64 scalar or [P]; None: no factor.
        """

    def edits(self) -> Tensor | None:
        """An integer below 2³¹ (fp64 scalar), equal on all ranks if users edited gradients alike; None: no edits."""

    def described_edits(self) -> Description:
        """The edits of `edits`, by parameter, for messages."""

    def stepped(self) -> None:
        """Mark the gradients as used by a step."""

    def zero(self, *, set_to_none: bool) -> None:
        """Drop the gradients in this source, or zero them; the caller does the same to ``.grad``."""

    def close(self) -> None:
        """Drop the gradients in this source, and remove its hooks. Not collective."""

    def staging_bytes(self) -> int:
        """Bytes of the staging memory allocated so far."""
