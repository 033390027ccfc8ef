"""LAMB whose state is sharded over ranks (ZeRO) and whose trust ratios are exact."""

from sharded_lamb.hyperparams import VARIANTS
from sharded_lamb.lamb import Lamb
from sharded_lamb.sharded import ShardedLamb

__version__ = "0.1.0"
__all__ = ["VARIANTS", "Lamb", "ShardedLamb", "__version__"]
