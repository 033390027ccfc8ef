"""`parallel: zero2` and `ddp+zero1`: BERT under ShardedLamb."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from sharded_lamb import checkpoint, faults
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.model import Entered, Losses, compile_layers, parameters_to_train
from sharded_lamb.checkpoint import Checkpoints
from sharded_lamb.telemetry import LayerNorms

STAGES: dict[str, Literal[1, 2]] = {"ddp+zero1": 1, "zero2": 2}


class OptimizerBackend:
    """The part of a `TrainBackend` that every sharding with `ShardedLamb` shares."""

    def __init__(self, losses: Losses, optimizer: Any) -> None:
        self.bert, self.losses = losses.module, losses
        self._optimizer = optimizer

    def step(self, lr: float) -> None:
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def restart_steps(self) -> None:
        restart_steps(self._optimizer)

    def grad_norm(self) -> float | None:
        norm = self._optimizer.grad_norm
        return None if norm is None else float(norm)

    def layer_norms(self) -> dict[str, LayerNorms]:
        norms: dict[str, LayerNorms] = self._optimizer.layer_norms()
        return norms

    def save(self, checkpoints: Checkpoints, step: int, extra: dict[str, Any]) -> None:
        checkpoints.save(step, self.bert, self._optimizer, extra)

    def load(self, path: Path, *, options: bool) -> dict[str, Any]:
        return checkpoint.load(path, self.bert, self._optimizer, options=options)

    def close(self) -> None:
        pass


class ShardedBackend(OptimizerBackend):
    """A `TrainBackend`. Stage 1: DDP averages gradients; stage 2: the optimizer does."""

    def __init__(self, config: RunConfig, losses: Losses) -> None:
        self._wrapped: Any = losses  # in DDP, in stage 1
        if config.speed.compile:
            compile_layers(losses.module)
        stage = STAGES[config.parallel]
        if stage == 1:
            self._wrapped = torch.nn.parallel.DistributedDataParallel(losses)
        super().__init__(losses, build_optimizer(config, losses.module, stage))
        self._unsynchronized = self._optimizer.no_sync if stage == 2 else self._wrapped.no_sync

    def accumulate(self, batch: MicroBatch, scale: Tensor, *, last: bool, entered: Entered) -> Tensor:
        context: AbstractContextManager[Any] = nullcontext() if last else self._unsynchronized()
        with context:
            out: Tensor = self._wrapped(batch)
            loss: Tensor = (out[:2] * scale).sum()
            entered("backward")
            faults.point("backward")
            loss.backward()  # type: ignore[no-untyped-call]
        return out.detach()

    def weights(self) -> dict[str, Tensor] | None:
        if torch.distributed.get_rank() != 0:
            return None
        # Copies: parameters are views of flat buckets, and writing a view writes its whole bucket.
        return {name: p.detach().cpu().clone().contiguous() for name, p in self.bert.named_parameters()}


def build_optimizer(config: RunConfig, bert: Any, stage: Literal[1, 2]) -> Any:
    """ShardedLamb over the model's parameters, with the model's names."""
    from sharded_lamb import ShardedLamb

    return ShardedLamb(
        parameters_to_train(bert),
        lr=0.0,  # the schedule sets it before every step
        stage=stage,
        bucket_mb=config.optimizer.bucket_mb,
        **config.optimizer.keywords(),
    )


def set_lr(optimizer: Any, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def restart_steps(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["step"].zero_()
