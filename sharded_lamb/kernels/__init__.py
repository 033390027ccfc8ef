"""The two passes over a shard, and what every backend of them implements.

A backend is two functions over flat memory that know neither parameters' shapes nor ranks::

    pass 1   moments_and_norms   m, v ← g;  Σw², Σu² per parameter     (writes m and v, nothing else)
    pass 2   apply               u again from m and v;  w ← w - step_size[parameter] u;  model dtype written

The memory is one flat run of whole blocks (our own buckets: `FlatShard`) or pieces that lie anywhere (what another
framework partitioned: `PieceShard`). `reference` is the pure backend: the rule on chunks that fit the cache.
"""

from typing import Protocol

from torch import Tensor

from sharded_lamb.kernels.reference import ReferenceKernel
from sharded_lamb.kernels.shard import FlatShard, PieceShard, Shard


class Kernel(Protocol):
    """What a backend provides. ``table``: `sharded_lamb.rule.table`, [P, COLUMNS], compute dtype."""

    name: str

    def square_sums(self, shard: Shard, sums: Tensor) -> None:
        """Σg² of the blocks of each parameter, added to ``sums`` [P] fp64."""

    def moments_and_norms(self, shard: Shard, table: Tensor, sums: Tensor) -> None:
        """Pass 1. Σw² and Σu² are added to ``sums`` [2, P] fp64; first, weights that were written from
        outside since the last step replace their masters."""

    def apply(self, shard: Shard, table: Tensor, step_sizes: Tensor) -> None:
        """Pass 2. ``step_sizes``: [P] compute dtype, η r; 0 leaves a weight's bits as they are."""


__all__ = ["FlatShard", "Kernel", "PieceShard", "ReferenceKernel", "Shard"]
