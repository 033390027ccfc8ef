"""timm's LAMB, a peer to compare with."""

import pytest
import torch

from sharded_lamb.bench import peers


def load_timm_lamb() -> type[torch.optim.Optimizer]:
    """timm's `Lamb` class; skips the test with the reason if timm is not installed."""
    try:
        return peers.timm_lamb()
    except ImportError as error:
        pytest.skip(str(error))
