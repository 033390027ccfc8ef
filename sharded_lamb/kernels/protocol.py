"""The interface of a kernel backend."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from sharded_lamb.core.layout import Segment
from sharded_lamb.kernels.shard import FlatShard, ReceivedShards, Shard


class Kernel(Protocol):
    """Functions over shards of one compute dtype and one device, at least one of them.

    P counts layers (`sharded_lamb.core.layers`), which are parameters, or the ratio blocks of one.

    D is the number of directions of the update (`sharded_lamb.core.rule`): 1, or 2 with Nesterov's momentum.

    ``table``: `sharded_lamb.core.rule.table`, [P, COLUMNS], compute dtype. Where its ``grad_scale`` is 0, a gradient
    counts as 0 even if it is non-finite. Results do not depend on how shards are grouped into calls.
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
        """grad ← average, or with ``add`` grad + average; adds Σg² per parameter to ``sums`` [P] fp64.

        Sums parts in rank order in the compute dtype. ``segments``: the shard's segments, the same object in every
        step.
        """

    def square_sums(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """Adds Σg² over each parameter's blocks to ``sums`` [P] fp64."""

    def moments_and_norms(self, shards: Sequence[Shard], table: Tensor, sums: Tensor) -> None:
        """Pass 1: updates m and v, and adds Σw² and Σu² of each direction to ``sums`` [1 + D, P] fp64.

        Where ``sums`` is [4, P], it adds `sharded_lamb.core.rule.CAUTION_SUMS`.

        Before that, weights that the user wrote since the last step replace their masters (`remainders` need no such
        resync).
        """

    def weight_norms(self, shards: Sequence[Shard], sums: Tensor) -> None:
        """LARS's pass 1: adds Σw² to ``sums`` [P] fp64, after the resync of `moments_and_norms`."""

    def apply_momentum(self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor) -> None:
        """LARS's pass 2: m ← β1 m + c1 d and w ← w - step_sizes[0] m - step_sizes[1] d, with d = g x scale + l2 w.

        ``step_sizes``: [2, P] compute dtype. Where both are 0, and β1, c1 are 1, 0, m and w keep their bits.
        """

    def apply(
        self, shards: Sequence[Shard], table: Tensor, step_sizes: Tensor, *, caution: bool = False
    ) -> None:
        """Pass 2: updates w. With D = 2, or ``caution``, it reads gradients again.

        ``caution``: pass 1 added `sharded_lamb.core.rule.CAUTION_SUMS`.

        ``step_sizes``: [D, P] compute dtype, `rule.step_sizes`; 0 keeps a weight's bits.
        """
