"""The import of timm, which is optional."""

from __future__ import annotations

import importlib
from typing import Any


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
