"""BERT and its optimizer, with the configured sharding over ranks."""

from __future__ import annotations

from typing import Any

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.ds_config import ds_config
from sharded_lamb.bert.model import Losses
from sharded_lamb.recipes.training.sharded_backend import TrainBackend


def check_parallel(config: RunConfig, world_size: int) -> None:
    """Raises: ValueError for settings that `config.parallel` forbids."""
    if config.parallel == "deepspeed":
        ds_config(config, world_size)


def build_backend(config: RunConfig, bert: Any, world_size: int) -> TrainBackend:
    """The configured backend, around an unsharded model on this rank's device.

    Raises:
        ValueError: an optimizer setting out of range, or DeepSpeed is not installed.
    """
    losses = Losses(bert, nsp=config.data.nsp, autocast=config.speed.precision == "bf16_autocast")
    if config.parallel == "deepspeed":
        from sharded_lamb.bert.engine import EngineBackend

        return EngineBackend(config, losses, world_size)
    if config.parallel == "fsdp2":
        from sharded_lamb.bert.fsdp import FsdpBackend

        return FsdpBackend(config, losses)
    from sharded_lamb.bert.optim import sharded_backend

    return sharded_backend(config, losses)
