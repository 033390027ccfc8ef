"""torchtitan's OptimizersContainer with `ShardedLamb` among the names of optimizers."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer

from sharded_lamb import ShardedLamb


class ShardedLambContainer(OptimizersContainer):  # type: ignore[misc,type-arg,unused-ignore]
    """``optimizer=ShardedLambContainer.Config(param_groups=[ParamGroupConfig(optimizer_name="ShardedLamb", ...)])``.

    torchtitan keeps its table of names in a method, which this class extends. ``optimizer_kwargs`` are options of
    groups; those of the whole optimizer (``skip_nonfinite``, ``state_dtype``, ...) belong in
    ``optimizer_factory_kwargs_by_name={"ShardedLamb": {...}}``. ``implementation`` has no effect on `ShardedLamb`.

    Raises:
        ValueError, TypeError: as `ShardedLamb`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):  # type: ignore[misc,unused-ignore]
        """OptimizersContainer.Config, of this class."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        if name == "ShardedLamb":
            return ShardedLamb
        factory: Callable[..., Optimizer] = OptimizersContainer._resolve_optimizer_factory(name)
        return factory

    def state_dict(self) -> dict[str, Any]:
        """As the base class: flat, by parameter names, for torch.distributed.checkpoint, which saves every rank's."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"state_dict\(\) of a ShardedLamb", UserWarning)
            state: dict[str, Any] = super().state_dict()
            return state
