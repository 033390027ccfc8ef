"""Strategies of Lightning's Trainer and of Fabric for `ShardedLamb(stage=2)`, which reduces gradients itself.

Both do what their DDPStrategy does (processes, ranks, samplers, devices, checkpoints on rank 0 with the state of all
ranks) without DistributedDataParallel. Stages 1 and 3 need neither: ``strategy="ddp"`` and ``ModelParallelStrategy``.
"""

import itertools
import weakref
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any, Literal

import torch.distributed as dist
from lightning.fabric.strategies.ddp import DDPStrategy as FabricDDPStrategy
from lightning.fabric.strategies.strategy import _BackwardSyncControl
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.distributed.constants import default_pg_timeout
from torch.optim import Optimizer

from sharded_lamb import ShardedLamb

StartMethod = Literal["popen", "spawn", "fork", "forkserver"]


class ShardedLambStrategy(DDPStrategy):
    """``Trainer(strategy=ShardedLambStrategy())``: each rank runs the bare module, `ShardedLamb` reduces gradients.

    Accumulation (``accumulate_grad_batches``, ``toggle_model(sync_grad=False)``) runs under `ShardedLamb.no_sync`. A
    further ``fit`` closes the optimizers of the one before.

    Args:
        process_group_backend, timeout, start_method: as for Lightning's DDPStrategy.

    Collectives besides the optimizer's: setup broadcasts the first rank's parameters and buffers, one call each.

    Raises:
        ValueError (in ``fit``): ``configure_optimizers`` returns another optimizer than ``ShardedLamb(stage=2)``, which
            would train on each rank's own gradients.
    """

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method
        )

    def configure_ddp(self) -> None:
        """Give every rank the first rank's module, as DDP's constructor does. Collective."""
        assert self.model is not None
        _broadcast_states(self.model)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Construct the optimizers. Raises ValueError as the class says."""
        for old in self.optimizers:  # two optimizers over one parameter are an error
            if isinstance(old, ShardedLamb):
                old.close()
        super().setup_optimizers(trainer)
        _check_reduce(self.optimizers, type(self).__name__)

    @contextmanager
    def block_backward_sync(self) -> Generator[None]:
        """Backward inside reduces no gradient."""
        with _no_sync(self.optimizers):
            yield


class ShardedLambFabricStrategy(FabricDDPStrategy):
    """``Fabric(strategy=ShardedLambFabricStrategy())``: as `ShardedLambStrategy`.

    ``fabric.no_backward_sync(model)`` is `ShardedLamb.no_sync` of all optimizers that were set up.

    Args:
        process_group_backend, timeout, start_method: as for Fabric's DDPStrategy.

    Collectives besides the optimizer's: `setup_module` broadcasts the first rank's parameters and buffers, one call
    each.

    Raises:
        ValueError (in ``fabric.setup`` and ``setup_optimizers``): an optimizer is no ``ShardedLamb(stage=2)``.
    """

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: StartMethod = "popen",
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method
        )
        self._sharded: weakref.WeakSet[ShardedLamb] = weakref.WeakSet()
        self._backward_sync_control = _NoSync(self._sharded)

    def setup_module(self, module: nn.Module) -> Any:
        """``module`` itself, with the first rank's parameters and buffers. Collective."""
        _broadcast_states(module)
        return module

    def setup_optimizer(self, optimizer: Optimizer) -> Optimizer:
        """``optimizer`` itself. Raises ValueError as the class says."""
        _check_reduce([optimizer], type(self).__name__)
        assert isinstance(optimizer, ShardedLamb)
        self._sharded.add(optimizer)
        return super().setup_optimizer(optimizer)


class _NoSync(_BackwardSyncControl):
    def __init__(self, optimizers: Iterable[Optimizer]) -> None:
        self.optimizers = optimizers

    def no_backward_sync(self, module: nn.Module, enabled: bool) -> AbstractContextManager[Any]:
        return _no_sync(self.optimizers) if enabled else ExitStack()


def _no_sync(optimizers: Iterable[Optimizer]) -> ExitStack:
    stack = ExitStack()
    for optimizer in optimizers:
        if isinstance(optimizer, ShardedLamb):
            stack.enter_context(optimizer.no_sync())
    return stack


def _broadcast_states(module: nn.Module) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        for tensor in itertools.chain(module.parameters(), module.buffers()):
            dist.broadcast(tensor.detach(), 0)


def _check_reduce(optimizers: Iterable[Optimizer], strategy: str) -> None:
    for optimizer in optimizers:
        if not isinstance(optimizer, ShardedLamb) or "1" in optimizer.stages:
            given = "ShardedLamb(stage=1)" if isinstance(optimizer, ShardedLamb) else type(optimizer).__name__
            raise ValueError(
                f"{strategy} reduces no gradients and got {given}, which would train on each rank's own: use "
                f'ShardedLamb(..., stage=2), or strategy="ddp"'
            )
