"""`parallel: fsdp2`: BERT under `fully_shard`, layer by layer; ShardedLamb reads the shards from the DTensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from sharded_lamb import faults
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.model import Losses, compile_layers
from sharded_lamb.bert.optim import build_optimizer
from sharded_lamb.checkpoint import Checkpoints
from sharded_lamb.recipes.training.sharded_backend import Entered, OptimizerBackend


class FsdpBackend(OptimizerBackend):
    """A `TrainBackend`. FSDP unshards a layer's parameters while it runs, and averages gradients."""

    def __init__(self, config: RunConfig, losses: Losses) -> None:
        if config.speed.compile:
            compile_layers(losses.module)
        for layer in losses.module.bert.encoder.layer:
            fully_shard(layer)
        # The rest as one unit: embeddings and decoder share a weight.
        root = fully_shard(losses)
        assert isinstance(root, FSDPModule)
        self._root = root
        super().__init__(losses.module, losses, build_optimizer(config, losses.module, 1))

    def accumulate(self, batch: MicroBatch, scale: Tensor, *, last: bool, entered: Entered) -> Tensor:
        self._root.set_requires_gradient_sync(last)
        out: Tensor = self.losses(batch)
        loss: Tensor = (out[:2] * scale).sum()
        entered("backward")
        faults.point("backward")
        loss.backward()  # type: ignore[no-untyped-call]
        return out.detach()

    def weights(self) -> dict[str, Tensor] | None:
        first, whole = torch.distributed.get_rank() == 0, {}
        self._root.reshard()  # a forward without a backward leaves the root's parameters unsharded
        for name, p in self.model.named_parameters():
            value = p.detach().full_tensor()
            if first:
                whole[name] = value.cpu().clone().contiguous()
        return whole if first else None

    def save(self, checkpoints: Checkpoints, step: int, extra: dict[str, Any]) -> None:
        self._root.reshard()
        super().save(checkpoints, step, extra)

    def load(self, path: Path, *, options: bool) -> dict[str, Any]:
        self._root.reshard()
        return super().load(path, options=options)
