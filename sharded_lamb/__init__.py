"""ZeRO-sharded LAMB for PyTorch with exact trust ratios."""

from sharded_lamb.core.hyperparams import VARIANTS
from sharded_lamb.optim.lamb import Lamb
from sharded_lamb.optim.sharded import ShardedLamb

__version__ = "0.1.0"
__all__ = ["VARIANTS", "Lamb", "ShardedLamb", "__version__"]
