"""The import of timm, which is optional, and trials of what it makes of settings."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def timm_for(what: str, module: str) -> Any:
    """The module `timm.…`, which the setting ``what`` needs.

    Raises:
        ValueError: timm, or torchvision, which it imports, is not installed or does not fit torch.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another torch
        raise ValueError(
            f"{what} needs timm and a torchvision that fits torch ({error}): pip install 'sharded-lamb[vision]'"
        ) from None


def tried(setting: str, trial: Callable[[], T]) -> T:
    """The result of ``trial``, which uses what timm made of ``setting``: it checks much of it no earlier.

    Raises:
        ValueError: the trial raised anything.
    """
    try:
        return trial()
    except Exception as error:
        raise ValueError(f"{setting}: {type(error).__name__}: {error}") from error
