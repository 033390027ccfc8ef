"""LAMB whose state is sharded over ranks (ZeRO) and whose trust ratios are exact."""

from sharded_lamb.core.hyperparams import VARIANTS
from sharded_lamb.optim.lamb import Lamb
from sharded_lamb.optim.sharded import ShardedLamb

__version__ = "0.1.0"
__all__ = ["VARIANTS", "Lamb", "ShardedLamb", "__version__"]
