"""`training.config_io` for `RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.recipes.training import config_io


def build_config(tree: Mapping[str, Any], overrides: Sequence[str] = (), origin: str = "config") -> RunConfig:
    """As `training.config_io.build_config`."""
    return config_io.build_config(RunConfig, tree, overrides, origin)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """As `training.config_io.load_config`."""
    return config_io.load_config(RunConfig, path, overrides)
