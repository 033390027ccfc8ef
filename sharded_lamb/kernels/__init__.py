"""Kernel backends: the two passes of a step over a rank's memory, and the interface that every backend implements.

A backend is a set of functions over memory; it knows neither parameters' shapes nor ranks. The two passes are::

    pass 1   moments_and_norms   m, v ← g;  Σw², Σu² per parameter     (writes m, v and resynced masters)
    pass 2   apply               recomputes u from m and v;  w ← w - step_size[parameter] u;  writes the model dtype

The others copy gradients into flat memory, and compute the sums of squares for clipping and the non-finite check.
Memory is one flat range of whole blocks (this package's buckets: `FlatShard`) or scattered pieces (partitions of
another framework: `ScatteredShard`); masters are separate tensors, or `remainders` of bfloat16 weights. `reference`
("torch") is the pure backend, the rule on chunks that fit in cache; `native` ("cpp") and `triton_kernel` have the same
bits; `choice` selects the fastest that works.
"""

from sharded_lamb.kernels.choice import NAMES, available, choose, load
from sharded_lamb.kernels.protocol import Kernel
from sharded_lamb.kernels.reference import ReferenceKernel
from sharded_lamb.kernels.shard import FlatShard, LocalContribution, ReceivedShards, ScatteredShard, Shard

__all__ = [
    "NAMES",
    "FlatShard",
    "Kernel",
    "LocalContribution",
    "ReceivedShards",
    "ReferenceKernel",
    "ScatteredShard",
    "Shard",
    "available",
    "choose",
    "load",
]
