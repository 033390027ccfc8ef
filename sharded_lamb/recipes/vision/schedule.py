"""The learning rate of timm's `CosineLRScheduler`, which changes from epoch to epoch, as a function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sharded_lamb.recipes.vision.config import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """`lr(step)`: in warmup a line from `warmup_lr` to `lr`, then half a cosine that began at epoch 0."""

    settings: ScheduleConfig
    steps_per_epoch: int

    def lr(self, step: int) -> float:
        own, epoch = self.settings, step // self.steps_per_epoch
        assert 0 <= epoch < own.epochs, f"step {step} outside of {own.epochs} epochs"
        if epoch < own.warmup_epochs:
            return own.warmup_lr + epoch * (own.lr - own.warmup_lr) / own.warmup_epochs
        return own.min_lr + 0.5 * (own.lr - own.min_lr) * (1 + math.cos(math.pi * epoch / own.epochs))
