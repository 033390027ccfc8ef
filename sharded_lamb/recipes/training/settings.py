"""What the settings of every recipe share: constrained types, checks, and the sections on checkpoints and faults."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass

from sharded_lamb.core.names import validate_patterns

STRICT = ConfigDict(extra="forbid")

Positive = Annotated[int, Field(gt=0, description="a positive number")]
PositiveFloat = Annotated[float, Field(gt=0, description="a positive number")]
Fraction = Annotated[float, Field(ge=0, lt=1, description="a number in [0, 1)")]
Seed = Annotated[int, Field(ge=0, lt=2**63, description="a number in [0, 2^63)")]
LocalPath = Annotated[str, AfterValidator(os.path.expanduser)]
Precision = Literal["auto", "fp32", "bf16_autocast", "bf16"]


def require(holds: bool, name: str, value: object, expectation: str, remedy: str = "") -> None:
    if not holds:
        raise ValueError(f"{name}={value!r}: expected {expectation}" + (f"; {remedy}" if remedy else ""))


RatioBlocks = dict[str, Any]
"""``ratio_blocks`` of `ShardedLamb`: {pattern of names: number of blocks, or dim0}; see `check_ratio_blocks`."""


def check_ratio_blocks(name: str, blocks: RatioBlocks | None) -> None:
    """Raises ValueError for a setting that no model can have; the optimizer compares it with the parameters."""
    for pattern, count in (blocks or {}).items():
        is_number = isinstance(count, int) and not isinstance(count, bool) and count >= 1
        expected = "a number of blocks >= 1, or dim0 (one for each index of the first dimension)"
        require(is_number or count == "dim0", f"{name}.{pattern}", count, expected)
    validate_patterns(name, [*(blocks or {})])


@dataclass(frozen=True, config=STRICT)
class CheckpointConfig:
    """The times of checkpoints, and how many are kept (0 keeps all)."""

    every_steps: Positive = 1000
    every_minutes: float | None = None
    keep: Annotated[int, Field(ge=0, description="0 (all) or more")] = 2
    # after SIGTERM or SIGUSR1 and a save: restart the run; 75 is EX_TEMPFAIL
    requeue_exit_code: Annotated[int, Field(gt=0, lt=256, description="1 to 255")] = 75


@dataclass(frozen=True, config=STRICT)
class FaultsConfig:
    """If no rank makes progress, every rank reports which is stuck, then exits, and torchrun restarts them."""

    # seconds in which no rank completes a micro-batch, save or held-out batch; null: no limit
    hang_timeout_s: Annotated[float, Field(gt=0, description="a positive number of seconds")] | None = 600.0


def plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as plain data, as JSON and YAML hold it."""
    tree: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))
    return tree


def digest_of(trained_settings: dict[str, Any]) -> str:
    """Hash of the settings that determine a training's numbers: a resumed run must have the same one."""
    return hashlib.sha256(json.dumps(trained_settings, sort_keys=True).encode()).hexdigest()[:16]
