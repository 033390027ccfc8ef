"""How DeepSpeed finds the optimizer: its name, and DeepSpeed's list of optimizers that ZeRO accepts."""

import base64
import binascii
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import hjson
import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from sharded_lamb.deepspeed.calling import name_parameters
from sharded_lamb.deepspeed.optimizer import DeepSpeedLamb

NAME = "ShardedLamb"
"""What a ds_config.json says: ``"optimizer": {"type": "ShardedLamb"}``."""


def register() -> None:
    """Make DeepSpeed resolve the type "ShardedLamb" and accept it under ZeRO. Importing the package does it.

    DeepSpeed looks up types that are not its own as attributes of ``torch.optim``: one is added. Nothing is replaced.

    Raises:
        RuntimeError: ``torch.optim.ShardedLamb`` is something else.
    """
    there = getattr(torch.optim, NAME, DeepSpeedLamb)
    if there is not DeepSpeedLamb:
        raise RuntimeError(
            f"torch.optim.{NAME} is {there!r} already: the name cannot be registered with DeepSpeed"
        )
    setattr(torch.optim, NAME, DeepSpeedLamb)
    if DeepSpeedLamb not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(DeepSpeedLamb)


def initialize(
    args: Any = None, model: Any = None, *positional: Any, take_over_lamb: bool = False, **keywords: Any
) -> Any:
    """`deepspeed.initialize` with the names of the model's parameters known to the optimizer.

    Args:
        args, model, positional, keywords: as `deepspeed.initialize` takes them.
        take_over_lamb: a config that says ``"type": "Lamb"`` gets ShardedLamb with ``variant="deepspeed"``: the same
            keys and step size, exact ratios, and any ZeRO stage, bf16 and CPU.

    Returns:
        What `deepspeed.initialize` returns: (engine, optimizer, dataloader, scheduler).
    """
    register()
    if isinstance(model, torch.nn.Module):
        name_parameters(model)
    if take_over_lamb:
        config = keywords.pop("config", None) or keywords.pop("config_params", None)
        config = config or getattr(args, "deepspeed_config", None)
        if config is None:
            raise ValueError("take_over_lamb=True needs the config: pass config=… (a dict or a path)")
        keywords["config"] = taken_over(config)
        if getattr(args, "deepspeed_config", None) is not None:
            args.deepspeed_config = None
    return deepspeed.initialize(args, model, *positional, **keywords)


def taken_over(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The config with ShardedLamb in the place of DeepSpeed's Lamb; any other optimizer stays."""
    read = dict(config) if isinstance(config, Mapping) else _read(os.fspath(config))
    optimizer = read.get("optimizer")
    if optimizer is not None and str(optimizer.get("type", "")).lower() == "lamb":
        params = {"variant": "deepspeed", **optimizer.get("params", {})}
        read["optimizer"] = {**optimizer, "type": NAME, "params": params}
    return read


def _read(config: str) -> dict[str, Any]:
    """A path, or JSON in base64, as DeepSpeed takes them."""
    if os.path.exists(config):
        with open(config) as stream:
            return dict(hjson.load(stream))
    try:
        return dict(hjson.loads(base64.urlsafe_b64decode(config).decode()))
    except (binascii.Error, UnicodeDecodeError, hjson.HjsonDecodeError) as error:
        raise ValueError(f"the DeepSpeed config {config!r} is no file and no JSON in base64") from error
