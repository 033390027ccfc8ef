"""The training loop's view of a model and its optimizer, with any sharding over ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.ds_config import ds_config
from sharded_lamb.bert.model import Losses
from sharded_lamb.checkpoint import Checkpoints
from sharded_lamb.recipes.training.sharded_backend import Entered
from sharded_lamb.telemetry import LayerNorms


class TrainBackend(Protocol):
    """A sharded model with its optimizer. Every method is collective: all ranks call it, in the same order.

    Whether a method communicates depends on the backend.
    """

    model: Any  # the Hugging Face model; its parameters may be empty or sharded
    losses: Any  # the module for evaluation; all ranks call it equally often

    def accumulate(self, batch: MicroBatch, scale: Tensor, *, last: bool, entered: Entered) -> Tensor:
        """Forward and backward of one micro-batch. The step's ``last`` one averages gradients over ranks.

        Args:
            scale: [2] factors of the two losses' sums.
            entered: called with "backward" as backward begins.

        Returns:
            [4] the output of `Losses`, detached.
        """

    def step(self, lr: float) -> None:
        """Update the weights and clear the gradients."""

    def restart_steps(self) -> None:
        """Begin a phase as BERT's phase 2 does: moments stay, step counts (and bias corrections) restart."""

    def grad_norm(self) -> float | None:
        """Norm of the last step's averaged gradients, before clipping."""

    def layer_norms(self) -> dict[str, LayerNorms]:
        """{BERT's own name: norms and ratio} of the last step."""

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, parameters hold the averages of their values, if there are any (`optimizer.ema_decay`)."""

    def weights(self) -> dict[str, Tensor] | None:
        """Copies of the unsharded parameters, in the training dtype, on the first rank's CPU; None elsewhere."""

    def save(self, checkpoints: Checkpoints, step: int, extra: dict[str, Any]) -> None:
        """As `Checkpoints.save`. All backends write one format."""

    def load(self, path: Path, *, options: bool) -> dict[str, Any]:
        """As `sharded_lamb.checkpoint.load`, from a checkpoint of any backend; returns ``extra``."""

    def close(self) -> None:
        """Release process-wide resources."""


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
