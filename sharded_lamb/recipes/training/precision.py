"""The precision that fits the hardware."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch

from sharded_lamb.recipes.training.settings import Precision


@overload
def resolve_precision(
    precision: Literal["auto", "fp32", "bf16_autocast"],
) -> Literal["fp32", "bf16_autocast"]: ...
@overload
def resolve_precision(precision: Precision) -> Precision: ...
def resolve_precision(precision: Precision) -> Precision:
    """Resolves `auto`: mixed precision where the hardware multiplies bf16 (otherwise it is emulated), else fp32."""
    if precision != "auto":
        return precision
    cpu = torch.cpu.get_capabilities()
    fast = torch.cuda.is_available() or cpu.get("avx512_bf16", False) or cpu.get("amx_bf16", False)
    return "bf16_autocast" if fast else "fp32"


def resolved(config: Any) -> Any:
    """A recipe's settings with `resolve_precision` of theirs."""
    return replace(config, speed=replace(config.speed, precision=resolve_precision(config.speed.precision)))
