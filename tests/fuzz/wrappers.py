"""Optimizers as frameworks wrap them."""

import sys
from typing import Any

import torch

from sharded_lamb import ShardedLamb


class _Inherits:
    """As Fabric does: an instance of the optimizer's class too, so that methods run on the wrapper and write there."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.__class__ = type("Wrapped" + type(inner).__name__, (_Inherits, type(inner)), {})

    def step(self, closure: Any = None) -> Any:
        return self._inner.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class _Copies:
    """As older Fabric and Composer do: a copy of the optimizer's attributes."""

    def __init__(self, inner: Any) -> None:
        self.__dict__ = {
            key: value for key, value in inner.__dict__.items() if key not in ("state_dict", "step")
        }
        self.__class__ = type("Wrapped" + type(inner).__name__, (_Copies, type(inner)), {})
        self._inner = inner

    def step(self, closure: Any = None) -> Any:
        return self._inner.step(closure)


def wrapped(optimizer: ShardedLamb, wrapper: str) -> Any:
    if wrapper == "inherits":
        return _Inherits(optimizer)
    if wrapper == "copies":
        return _Copies(optimizer)
    if wrapper == "accelerate":
        from accelerate import Accelerator

        return Accelerator(cpu=True).prepare_optimizer(optimizer)
    return optimizer


def unwrap_all() -> None:
    """Reset Accelerate's per-process state."""
    if "accelerate" in sys.modules:
        from accelerate.state import AcceleratorState, GradientState, PartialState

        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._shared_state.clear()
    torch.set_default_dtype(torch.float32)
