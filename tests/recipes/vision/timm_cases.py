"""The real timm with a torchvision of names only: timm's own layers, models, mixing and schedules need no more."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

MODULES = (
    "ops",
    "ops.misc",
    "transforms",
    "transforms.functional",
    "datasets",
    "models",
    "models.feature_extraction",
)


class _Name(type):
    """A class with any attribute, as InterpolationMode has."""

    def __getattr__(cls, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return name


class _Names(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Name(name, (), {})


def _is_ours(name: str) -> bool:
    return name.partition(".")[0] in ("timm", "torchvision")


@contextmanager
def timm_with_names() -> Iterator[Any]:
    """timm, forgotten at the end."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed: pip install --no-deps timm")
    importlib.import_module("datasets")  # it looks for torchvision when it is imported
    before = {name: sys.modules.pop(name) for name in list(sys.modules) if _is_ours(name)}
    try:
        for name in ("torchvision", *(f"torchvision.{module}" for module in MODULES)):
            sys.modules[name] = _Names(name)
            sys.modules[name].__path__ = []
            sys.modules[name].__spec__ = ModuleSpec(name, None)
            parent, _, own = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], own, sys.modules[name])
        yield importlib.import_module("timm")
    finally:
        for name in [name for name in sys.modules if _is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(before)
