"""Registers the optimizer with DeepSpeed: its type name, and the list of optimizers that ZeRO accepts."""

import base64
import binascii
import os
from collections.abc import Mapping
from typing import Any

import deepspeed
import hjson
import torch
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

from sharded_lamb.deepspeed.engine_probe import name_parameters
from sharded_lamb.deepspeed.optimizer import DeepSpeedLamb

NAME = "ShardedLamb"
"""The type in a ds_config.json: ``"optimizer": {"type": "ShardedLamb"}``."""


def register() -> None:
    """Make DeepSpeed resolve the type "ShardedLamb" and accept it under ZeRO. Importing the package calls it.

    DeepSpeed looks up unknown types as attributes of ``torch.optim``: this adds one and replaces nothing.

    Raises:
        RuntimeError: ``torch.optim.ShardedLamb`` is another object.
    """
    existing = getattr(torch.optim, NAME, DeepSpeedLamb)
    if existing is not DeepSpeedLamb:
        raise RuntimeError(
            f"torch.optim.{NAME} is {existing!r} already: the name cannot be registered with DeepSpeed"
        )
    setattr(torch.optim, NAME, DeepSpeedLamb)
    if DeepSpeedLamb not in ZERO_SUPPORTED_OPTIMIZERS:
        ZERO_SUPPORTED_OPTIMIZERS.append(DeepSpeedLamb)


def initialize(
    args: Any = None, model: Any = None, *positional: Any, take_over_lamb: bool = False, **keywords: Any
) -> Any:
    """`deepspeed.initialize`, with the model's parameter names registered for the optimizer.

    Args:
        args, model, positional, keywords: as for `deepspeed.initialize`.
        take_over_lamb: replace ``"type": "Lamb"`` in the config by ShardedLamb with ``variant="deepspeed"``: the same
            keys and step size, exact ratios, and any ZeRO stage, bf16 and CPU.

    Returns:
        (engine, optimizer, dataloader, scheduler), as `deepspeed.initialize`.
    """
    register()
    if isinstance(model, torch.nn.Module):
        name_parameters(model)
    if take_over_lamb:
        config = keywords.pop("config", None) or keywords.pop("config_params", None)
        config = config or getattr(args, "deepspeed_config", None)
        if config is None:
            raise ValueError("take_over_lamb=True needs the config: pass config=… (a dict or a path)")
        keywords["config"] = replace_lamb(config)
        if getattr(args, "deepspeed_config", None) is not None:
            args.deepspeed_config = None
    return deepspeed.initialize(args, model, *positional, **keywords)


def replace_lamb(config: str | os.PathLike[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The config with ShardedLamb instead of DeepSpeed's Lamb; keeps any other optimizer."""
    parsed = dict(config) if isinstance(config, Mapping) else _read(os.fspath(config))
    optimizer = parsed.get("optimizer")
    if optimizer is not None and str(optimizer.get("type", "")).lower() == "lamb":
        params = {"variant": "deepspeed", **optimizer.get("params", {})}
        parsed["optimizer"] = {**optimizer, "type": NAME, "params": params}
    return parsed


def _read(config: str) -> dict[str, Any]:
    """Parse a path or base64-encoded JSON, as DeepSpeed does."""
    if os.path.exists(config):
        with open(config, encoding="utf-8") as stream:
            return dict(hjson.load(stream))
    try:
        return dict(hjson.loads(base64.urlsafe_b64decode(config).decode()))
    except (binascii.Error, UnicodeDecodeError, hjson.HjsonDecodeError) as error:
        raise ValueError(
            f"the DeepSpeed config {config!r} is neither a file nor base64-encoded JSON"
        ) from error
