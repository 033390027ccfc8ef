"""The two passes over a rank's memory, and what every backend of them implements.

A backend is functions over memory that know neither parameters' shapes nor ranks, first of all::

    pass 1   moments_and_norms   m, v ← g;  Σw², Σu² per parameter     (writes m and v, nothing else)
    pass 2   apply               u again from m and v;  w ← w - step_size[parameter] u;  model dtype written

then how gradients come into flat memory, and the sum of squares that clipping and the search for non-finite ones need.
The memory is one flat run of whole blocks (our own buckets: `FlatShard`) or scattered runs (what another framework
partitioned: `ScatteredShard`); masters are tensors of their own, or `remainders` of bfloat16 weights. `reference`
("torch") is the pure backend, the rule on chunks that fit the cache; `native` ("cpp") and `triton_kernel` have the same
bits, `fused` is equal but for rounding; `choice` takes the fastest that works.
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
