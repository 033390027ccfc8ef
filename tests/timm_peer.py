"""timm's LAMB and LARS, peers to compare with."""

import importlib
import sys

import pytest
import torch

from sharded_lamb.bench import peers


def load_timm_lamb() -> type[torch.optim.Optimizer]:
    """timm's `Lamb` class; skips the test with the reason if timm is not installed."""
    try:
        return peers.timm_lamb()
    except ImportError as error:
        pytest.skip(str(error))


def load_timm_lars() -> type[torch.optim.Optimizer]:
    """timm's `Lars` class; likewise."""
    module = sys.modules[load_timm_lamb().__module__]
    lars: type[torch.optim.Optimizer] = importlib.import_module(f"{module.__package__}.lars").Lars
    return lars
