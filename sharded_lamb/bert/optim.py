"""`parallel: zero2` and `ddp+zero1`: BERT under ShardedLamb."""

from __future__ import annotations

from typing import Any, Literal

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.model import Losses, compile_layers, parameters_to_train
from sharded_lamb.recipes.training.sharded_backend import ShardedBackend

STAGES: dict[str, Literal[1, 2]] = {"ddp+zero1": 1, "zero2": 2}


def sharded_backend(config: RunConfig, losses: Losses) -> ShardedBackend:
    """A `TrainBackend` of the configured stage. Compiles layers, if configured."""
    if config.speed.compile:
        compile_layers(losses.module)
    stage, bert = STAGES[config.parallel], losses.module
    return ShardedBackend(bert, losses, stage, lambda: build_optimizer(config, bert, stage))


def build_optimizer(config: RunConfig, bert: Any, stage: Literal[1, 2]) -> Any:
    """ShardedLamb over the model's parameters, with the model's names."""
    import torch

    from sharded_lamb import ShardedLamb

    settings = config.optimizer
    return ShardedLamb(
        parameters_to_train(bert),
        lr=0.0,  # the schedule sets it before every step
        stage=stage,
        bucket_mb=settings.bucket_mb,
        state_dtype=getattr(torch, settings.state_dtype),
        store_param_remainders=settings.store_param_remainders,
        gather_dtype=settings.gather_dtype and getattr(torch, settings.gather_dtype),
        reduce_dtype=settings.reduce_dtype and getattr(torch, settings.reduce_dtype),
        ema_decay=settings.ema_decay,
        **settings.keywords(),
    )
