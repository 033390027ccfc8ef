"""`parallel: deepspeed`: BERT in DeepSpeed's engine, whose ZeRO shards and whose optimizer is `DeepSpeedLamb`."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.ds_config import ds_config
from sharded_lamb.bert.model import Losses, parameters_to_train
from sharded_lamb.bert.optim import restart_steps, set_lr


class EngineTrainee:
    """A `Trainee`. Under ZeRO 3 parameters are whole only while the module that holds them runs."""

    def __init__(self, config: RunConfig, losses: Losses, world_size: int) -> None:
        if importlib.util.find_spec("deepspeed") is None:
            raise ValueError(
                "parallel='deepspeed': DeepSpeed is not installed; pip install 'sharded-lamb[deepspeed]'"
            )
        import sharded_lamb.deepspeed

        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists; without a launcher there is one rank
        self.bert, self.losses = losses.module, losses
        # DeepSpeed's master of an fp32 parameter is the parameter itself: not for checkpoints, which have it already.
        self._trained = [(name, p.dtype == torch.float32) for name, p in parameters_to_train(self.bert)]
        self._linear = torch.nn.functional.linear  # ZeRO 3 puts its own in its place, for the whole process
        self._engine: Any = sharded_lamb.deepspeed.initialize(
            model=losses, config=ds_config(config, world_size)
        )[0]
        if config.speed.compile:
            self._engine.compile()
        self._lamb: Any = self._engine.basic_optimizer

    def accumulate(self, batch: MicroBatch, scale: Tensor, *, last: bool) -> Tensor:
        self._engine.set_gradient_accumulation_boundary(last)
        out: Tensor = self._engine(batch)
        # Scaled by the whole global batch already: not again by the number of micro-batches.
        self._engine.backward((out[:2] * scale).sum(), scale_wrt_gas=False)
        return out.detach()

    def step(self, lr: float) -> None:
        set_lr(self._lamb, lr)
        self._engine.step()

    def restart_steps(self) -> None:
        restart_steps(self._lamb)

    def grad_norm(self) -> float | None:
        norm = self._engine.get_global_grad_norm()
        return None if norm is None else float(norm)

    def trust_ratios(self) -> dict[str, float]:
        ratios: dict[str, float] = self._lamb.trust_ratios()
        return ratios

    def weights(self) -> dict[str, Tensor] | None:
        from deepspeed import zero

        first = torch.distributed.get_rank() == 0
        whole = {}
        for name, p in self.bert.named_parameters():
            with zero.GatheredParameters([p]):  # nothing is done to what is whole already
                if first:
                    whole[name] = p.detach().cpu().clone().contiguous()
        return whole if first else None

    def full_state(self) -> dict[str, Any] | None:
        state: dict[str, Any] | None = self._lamb.full_state_dict()
        if state is not None:
            for index, (_, is_master) in enumerate(self._trained):
                if is_master:
                    del state["state"][index]["master"]
        return state

    def load(self, weights: dict[str, Tensor], state: dict[str, Any] | None) -> None:
        if state is not None:
            # Masters are how weights reach DeepSpeed; one that was not saved is the weight itself.
            for index, (name, _) in enumerate(self._trained):
                state["state"][index].setdefault("master", weights[name].float())
        self._lamb.load_full_state_dict(state)

    def close(self) -> None:
        self._engine.destroy()
        torch.nn.functional.linear = self._linear
