"""timm's LAMB, a peer to compare with, loaded without the rest of timm.

`import timm` pulls in torchvision, which would replace torch. `timm/optim/lamb.py` needs torch and two
neighbours only, so timm's folder of optimizers is imported as a package of its own, under a private name.
"""

import functools
import importlib
import importlib.metadata
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

_PACKAGE = "_timm_optim_without_timm"


@functools.cache
def load_timm_lamb() -> type[torch.optim.Optimizer]:
    """timm's `Lamb` class; the test is skipped, with the reason, where timm is not installed."""
    try:
        distribution = importlib.metadata.distribution("timm")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("timm is not installed (pip install --no-deps timm)")
    folder = Path(str(distribution.locate_file("timm/optim")))
    package = ModuleType(_PACKAGE)
    package.__path__ = [str(folder)]
    sys.modules[_PACKAGE] = package
    module = importlib.import_module(f"{_PACKAGE}.lamb")
    return module.Lamb
