"""ZeRO-sharded LAMB for PyTorch with exact trust ratios."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sharded_lamb.core.hyperparams import VARIANTS
    from sharded_lamb.optim.lamb import Lamb
    from sharded_lamb.optim.sharded import ShardedLamb

__version__ = "0.1.0"
__all__ = ["VARIANTS", "Lamb", "ShardedLamb", "__version__"]

_MODULES = {
    "VARIANTS": "sharded_lamb.core.hyperparams",
    "Lamb": "sharded_lamb.optim.lamb",
    "ShardedLamb": "sharded_lamb.optim.sharded",
}


def __getattr__(name: str) -> Any:
    """Imported on first use: commands say what they do without waiting for torch."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
