"""What a backend provides."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.kernels.shard import FlatShard, ReceivedShards, Shard


class Kernel(Protocol):
    """Functions over shards of one compute dtype and one device, at least one of them.

    ``table``: `sharded_lamb.core.rule.table`, [P, COLUMNS], compute dtype. Where its ``grad_scale`` is 0 a parameter's
    gradient is taken for 0, whatever it holds. Results do not depend on how shards are grouped into calls.
    """

    name: str

    def average(
        self,
        shard: FlatShard,
        segments: Sequence[Segment],
        received: ReceivedShards,
        sums: Tensor,
        *,
        add: bool,
    ) -> None:
        """grad ← the average, or with ``add`` grad + that; Σg² per parameter added to ``sums`` [P] fp64.

        Parts are summed in their order in the compute dtype. ``segments``: what lies in the shard, the same object from
        step to step.
        """

    def collect(
        self, shard: FlatShard, segments: Sequence[Segment], grads: Sequence[Tensor | None], sums: Tensor
    ) -> None:
        """grad ← segments of gradients that lie elsewhere; Σg² per parameter added to ``sums`` [P] fp64.

        ``grads``: entry i is what ``segments[i]`` is of, without gaps in memory, any floating-point dtype; None stands
        for zeros.
        """

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Σg² of the blocks of each parameter, added to ``sums`` [P] fp64."""

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """Pass 1. Σw² and Σu² are added to ``sums`` [SUMS, P] fp64; first, weights that were written from
        outside since the last step replace their masters (`remainders` follow them by themselves)."""

    def apply(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """Pass 2. ``step_sizes``: [P] compute dtype, η r; 0 leaves a weight's bits as they are."""
