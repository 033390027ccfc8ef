"""What the training loop trains: a model and its optimizer, whichever way they are sharded over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.ds_config import ds_config
from sharded_lamb.bert.model import Losses
from sharded_lamb.checkpoint import Checkpoints


class Trainee(Protocol):
    """Every method is for all ranks to call, in the same order: which of them communicate differs."""

    bert: Any  # the Hugging Face model; its parameters may be empty, cut over ranks
    losses: Any  # what evaluation calls, on all ranks equally often

    def accumulate(self, batch: MicroBatch, scale: Tensor, *, last: bool) -> Tensor:
        """Forward and backward of one micro-batch. Gradients are averaged over ranks with the step's ``last`` one.

        Args:
            scale: [2] what the sums of the two losses are multiplied by.

        Returns:
            [4] what `Losses` gives, detached.
        """

    def step(self, lr: float) -> None:
        """Update the weights and drop the gradients."""

    def restart_steps(self) -> None:
        """Begin a phase as BERT's phase 2 does: moments stay, step counts (so bias corrections) start over."""

    def grad_norm(self) -> float | None:
        """Of the last step's averaged gradients, before clipping."""

    def trust_ratios(self) -> dict[str, float]:
        """{BERT's own name: ratio} of the last step."""

    def weights(self) -> dict[str, Tensor] | None:
        """Copies of the whole parameters, in the training dtype, on the first rank's CPU; None elsewhere."""

    def save(self, checkpoints: Checkpoints, step: int, extra: dict[str, Any]) -> None:
        """As `Checkpoints.save`: one format, whichever trainee wrote it."""

    def load(self, path: Path, *, options: bool) -> dict[str, Any]:
        """As `sharded_lamb.checkpoint.load`, what any trainee saved; returns ``extra``."""

    def close(self) -> None:
        """Let go of what would outlive this object."""


def check_parallel(config: RunConfig, world_size: int) -> None:
    """Raises: ValueError for settings that the way of sharding forbids."""
    if config.parallel == "deepspeed":
        ds_config(config, world_size)


def build_trainee(config: RunConfig, bert: Any, world_size: int) -> Trainee:
    """The configured one, around a model that is whole on this rank's device.

    Raises:
        ValueError: an optimizer setting out of range, or DeepSpeed is not installed.
    """
    losses = Losses(bert, nsp=config.data.nsp, autocast=config.speed.precision == "bf16_autocast")
    if config.parallel == "deepspeed":
        from sharded_lamb.bert.engine import EngineTrainee

        return EngineTrainee(config, losses, world_size)
    if config.parallel == "fsdp2":
        from sharded_lamb.bert.fsdp import FsdpTrainee

        return FsdpTrainee(config, losses)
    from sharded_lamb.bert.optim import ShardedTrainee

    return ShardedTrainee(config, losses)
