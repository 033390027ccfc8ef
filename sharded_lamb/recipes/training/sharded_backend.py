"""What a training loop does with a model and its optimizer; a model under ShardedLamb, stage 1 or 2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sharded_lamb import checkpoint, faults
from sharded_lamb.checkpoint import Checkpoints
from sharded_lamb.telemetry import LayerNorms

Entered = Callable[[str], None]
"""Called with the name of a section of the step as it begins: `StepClock.enter`."""


class TrainBackend(Protocol):
    """A sharded model with its optimizer. Every method is collective: all ranks call it, in the same order.

    Whether a method communicates depends on the backend.
    """

    model: Any  # without wrappers; its parameters may be empty or sharded
    losses: Any  # the module for evaluation; all ranks call it equally often

    def accumulate(self, batch: Any, scale: Tensor, *, last: bool, entered: Entered) -> Tensor:
        """Forward and backward of one micro-batch. The step's ``last`` one averages gradients over ranks.

        Args:
            scale: [n] factors of the first n elements of what ``losses`` returns, whose sum is the loss.
            entered: called with "backward" as backward begins.

        Returns:
            What ``losses`` returned, detached: sums over the micro-batch.
        """

    def step(self, lr: float) -> None:
        """Update the weights and clear the gradients."""

    def restart_steps(self) -> None:
        """Begin a phase as BERT's phase 2 does: moments stay, step counts (and bias corrections) restart."""

    def grad_norm(self) -> float | None:
        """Norm of the last step's averaged gradients, before clipping."""

    def layer_norms(self) -> dict[str, LayerNorms]:
        """{the model's own name: norms and ratio} of the last step."""

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


class OptimizerBackend:
    """What every sharding with `ShardedLamb` shares.

    ``losses``: a module around the ``model`` whose forward takes a batch and returns a vector: sums of losses first.
    """

    def __init__(self, model: Any, losses: Any, optimizer: Any) -> None:
        self.model, self.losses = model, losses
        self.optimizer = optimizer

    def step(self, lr: float) -> None:
        set_lr(self.optimizer, lr)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def restart_steps(self) -> None:
        restart_steps(self.optimizer)

    def grad_norm(self) -> float | None:
        norm = self.optimizer.grad_norm
        return None if norm is None else float(norm)

    def layer_norms(self) -> dict[str, LayerNorms]:
        norms: dict[str, LayerNorms] = self.optimizer.layer_norms()
        return norms

    def averaged(self) -> AbstractContextManager[None]:
        """Inside, parameters hold the averages of their values, if the optimizer keeps them. Collective."""
        if self.optimizer.ema_decay is None:
            return nullcontext()
        context: AbstractContextManager[None] = self.optimizer.averaged(self.losses)
        return context

    def save(self, checkpoints: Checkpoints, step: int, extra: dict[str, Any]) -> None:
        checkpoints.save(step, self.model, self.optimizer, extra)

    def load(self, path: Path, *, options: bool) -> dict[str, Any]:
        return checkpoint.load(path, self.model, self.optimizer, options=options)

    def close(self) -> None:
        pass


class ShardedBackend(OptimizerBackend):
    """Stage 1: DDP averages gradients; stage 2: the optimizer does. ``build`` makes the optimizer, after DDP."""

    def __init__(self, model: Any, losses: Any, stage: Literal[1, 2], build: Callable[[], Any]) -> None:
        self._wrapped: Any = losses  # in DDP, in stage 1
        if stage == 1:
            self._wrapped = torch.nn.parallel.DistributedDataParallel(losses)
        super().__init__(model, losses, build())
        self._unsynchronized = self.optimizer.no_sync if stage == 2 else self._wrapped.no_sync

    def accumulate(self, batch: Any, scale: Tensor, *, last: bool, entered: Entered) -> Tensor:
        context: AbstractContextManager[Any] = nullcontext() if last else self._unsynchronized()
        with context:
            out: Tensor = self._wrapped(batch)
            loss: Tensor = (out[: len(scale)] * scale).sum()
            entered("backward")
            faults.point("backward")
            loss.backward()  # type: ignore[no-untyped-call]
        return out.detach()

    def weights(self) -> dict[str, Tensor] | None:
        if torch.distributed.get_rank() != 0:
            return None
        # Copies: parameters are views of flat buckets, and writing a view writes its whole bucket.
        return {name: p.detach().cpu().clone().contiguous() for name, p in self.model.named_parameters()}


def set_lr(optimizer: Any, lr: float) -> None:
    """Sets the rate of every group: ``lr``, times its ``lr_scale`` where layer decay has given it one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def restart_steps(optimizer: Any) -> None:
    for state in optimizer.state.values():
        state["step"].zero_()
