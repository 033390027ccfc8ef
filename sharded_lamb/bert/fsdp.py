"""`parallel: fsdp2`: BERT under `fully_shard`, a layer at a time; ShardedLamb finds the cuts by itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import distribute_tensor

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.model import Losses
from sharded_lamb.bert.optim import build_optimizer, restart_steps, set_lr


class FsdpTrainee:
    """A `Trainee`. Parameters are whole only while the layer that holds them runs; gradients are averaged by FSDP."""

    def __init__(self, config: RunConfig, losses: Losses) -> None:
        self.bert, self.losses = losses.module, losses
        for layer in self.bert.bert.encoder.layer:
            if config.speed.compile:
                layer.compile()
            fully_shard(layer)
        # The rest in one piece: embeddings and decoder share a weight.
        root = fully_shard(losses)
        assert isinstance(root, FSDPModule)
        self._root = root
        self._optimizer = build_optimizer(config, self.bert, 1)

    def accumulate(self, batch: MicroBatch, scale: Tensor, *, last: bool) -> Tensor:
        self._root.set_requires_gradient_sync(last)
        out: Tensor = self.losses(batch)
        loss: Tensor = (out[:2] * scale).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return out.detach()

    def step(self, lr: float) -> None:
        set_lr(self._optimizer, lr)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def restart_steps(self) -> None:
        restart_steps(self._optimizer)

    def grad_norm(self) -> float | None:
        norm = self._optimizer.grad_norm
        return None if norm is None else float(norm)

    def trust_ratios(self) -> dict[str, float]:
        return {name: float(ratio) for name, ratio in self._optimizer.trust_ratios().items()}

    def weights(self) -> dict[str, Tensor] | None:
        first, whole = torch.distributed.get_rank() == 0, {}
        self._root.reshard()  # a forward without a backward leaves the root's parameters whole
        for name, p in self.bert.named_parameters():
            value = p.detach().full_tensor()
            if first:
                whole[name] = value.cpu().clone().contiguous()
        return whole if first else None

    def full_state(self) -> dict[str, Any] | None:
        state: dict[str, Any] | None = self._optimizer.full_state_dict()
        return state

    def load(self, weights: dict[str, Tensor], state: dict[str, Any] | None) -> None:
        with torch.no_grad():
            for name, p in self.bert.named_parameters():
                value = weights[name].to(p.device, p.dtype)
                # Every rank has the whole: each keeps its part, and nothing is sent.
                p.copy_(distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None))
        self._optimizer.load_full_state_dict(state)

    def close(self) -> None:
        pass
