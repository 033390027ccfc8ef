"""LAMB with exact trust ratios under DeepSpeed's ZeRO 0, 1, 2, 3: ``import sharded_lamb.deepspeed`` and, in the config,
``"optimizer": {"type": "ShardedLamb", "params": {"lr": 2e-3, …}}``.

Glossary: a *partition* is a tensor that DeepSpeed steps in place of parameters; a *segment* is the part of a parameter
in a partition; a *row* is a parameter of one call of ``step()``.
"""

try:
    import deepspeed  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "deepspeed":
        raise
    raise ModuleNotFoundError(
        "sharded_lamb.deepspeed needs DeepSpeed: pip install 'sharded-lamb[deepspeed]'", name="deepspeed"
    ) from None

from sharded_lamb.deepspeed.engine_probe import name_parameters
from sharded_lamb.deepspeed.optimizer import DeepSpeedLamb
from sharded_lamb.deepspeed.registration import initialize, register

register()

__all__ = ["DeepSpeedLamb", "initialize", "name_parameters", "register"]
