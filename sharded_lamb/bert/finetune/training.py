"""One fine-tuning: a loop over epochs of any problem. One process, fp32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.bert.config import OptimizerConfig
from sharded_lamb.bert.finetune.encoder import Encoder
from sharded_lamb.bert.model import parameters_to_train
from sharded_lamb.bert.schedule import Schedule
from sharded_lamb.comm.progress import with_progress
from sharded_lamb.recipes.training.sharded_backend import set_lr
from sharded_lamb.recipes.training.stateless_rng import I64, Permutation, key_of


@dataclass(frozen=True)
class Settings:
    """The settings of a fine-tuning that all rates and seeds share."""

    optimizer: str  # a variant of ShardedLamb
    epochs: int
    batch: int
    warmup: float  # share of the steps


class Problem(Protocol):
    """What a model is fine-tuned on: examples to train by number, and scores on dev."""

    count: int  # examples to train
    metrics: tuple[str, ...]  # of which the first chooses a rate
    about: dict[str, Any]  # name, metrics, train and dev (counts of examples), settings; for the JSON

    def model(self, encoder: Encoder, seed: int) -> nn.Module:
        """The encoder under a head of random weights."""

    def loss(self, model: nn.Module, numbers: I64, device: torch.device) -> Tensor:
        """[], the mean over the examples to train ``numbers``: [B] in [0, count)."""

    def scores(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        """{metric: value on dev}, nan if an output is not finite."""

    def baselines(self) -> dict[str, dict[str, Any]]:
        """{name: {metric: value on dev}} of ways without a network."""


def finetune(
    encoder: Encoder, problem: Problem, settings: Settings, lr: float, seed: int, device: torch.device
) -> dict[str, float]:
    """Trains all weights; returns {metric: value on dev, "loss": mean of the last epoch}.

    Order, dropout and new weights are functions of ``seed``: on one device and number of threads, so are all bits.
    """
    model = problem.model(encoder, seed).to(device).train()
    keywords = OptimizerConfig(variant=settings.optimizer).keywords()
    optimizer = ShardedLamb(parameters_to_train(model), lr=0.0, **keywords)
    in_epoch = -(-problem.count // settings.batch)
    steps = settings.epochs * in_epoch
    schedule = Schedule(lr, steps, round(settings.warmup * steps), 1.0, "command")
    losses = torch.zeros((), dtype=torch.float64, device=device)
    title = f"lr {lr:g}, seed {seed}"
    for step in with_progress(range(steps), title, lambda step: f"epoch {step // in_epoch + 1}"):
        epoch, turn = divmod(step, in_epoch)
        if turn == 0:
            losses.zero_()
        places = np.arange(turn * settings.batch, min(problem.count, (turn + 1) * settings.batch))
        numbers = Permutation(problem.count, key_of(seed, "order", epoch))(places)
        torch.manual_seed(key_of(seed, "dropout", step) >> 1)
        loss = problem.loss(model, numbers, device)
        loss.backward()  # type: ignore[no-untyped-call]
        set_lr(optimizer, schedule.lr(step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.detach().double() * len(numbers)
    optimizer.close()
    return {**problem.scores(model.eval(), device), "loss": float(losses) / problem.count}
