"""The checkpoint from which a run's ranks resume, also those that torchrun has restarted."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sharded_lamb.checkpoint import Checkpoints
from sharded_lamb.recipes.training import checkpoint
from sharded_lamb.recipes.training.ranks import Ranks
from tests.harness import run_ranks


def chosen(rank: int, folder: str) -> None:
    """A launch that begins from another run's step 1, beside an earlier run's steps 5 and 6."""
    model = torch.nn.Linear(2, 2)
    root, named = Path(folder, "run", "checkpoints"), Checkpoints(Path(folder, "other")).save(1, model)
    earlier = Checkpoints(root)
    earlier.save(5, model)
    earlier.save(6, model)
    config: Any = SimpleNamespace(run_dir=str(root.parent))
    ranks = Ranks.start()

    def choose(attempt: int, resume: str) -> list[str]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("TORCHELASTIC_RESTART_COUNT", str(attempt))
            return [path.name for path in checkpoint.choose(config, resume, ranks)]

    assert choose(0, str(named)) == ["step-00000001"]
    assert choose(1, str(named)) == ["step-00000001"]
    Checkpoints(root, resumed=True).save(3, model)
    assert choose(2, str(named)) == ["step-00000003"]
    Checkpoints(root, resumed=True).save(4, model)
    assert choose(3, str(named)) == ["step-00000004", "step-00000003"]
    assert choose(0, str(named)) == ["step-00000001"]  # a new launch
    assert choose(1, str(named)) == ["step-00000001"]
    Checkpoints(root, resumed=True).save(4, model)  # again
    assert choose(2, str(named)) == ["step-00000004", "step-00000003"]
    assert choose(2, "auto") == ["step-00000004", "step-00000003"]


def test_restarted_ranks_resume_from_the_newest_checkpoint_that_their_launch_has_saved(
    tmp_path: Path,
) -> None:
    """Also with --resume FOLDER, which names where the launch began."""
    run_ranks(1, chosen, str(tmp_path))
