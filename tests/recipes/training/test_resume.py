"""The checkpoint from which a run's ranks resume, also those that torchrun has restarted."""

import os
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


def claims(rank: int, folder: str) -> None:
    """The other run is a process of its own, which fork gives no lock."""
    ranks = Ranks.start()
    with checkpoint.claimed(folder, ranks):
        child = os.fork()
        if child == 0:
            try:
                with checkpoint.claimed(folder, SimpleNamespace(from_first=lambda work: work())):  # type: ignore[arg-type]
                    os._exit(1)
            except ValueError as error:
                os._exit(7 if "another run trains into" in str(error) else 2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    with checkpoint.claimed(folder, ranks):
        pass


def test_one_run_at_a_time_trains_into_a_folder(tmp_path: Path) -> None:
    run_ranks(1, claims, str(tmp_path / "run"))


def test_restarted_ranks_resume_from_the_newest_checkpoint_that_their_launch_has_saved(
    tmp_path: Path,
) -> None:
    """Also with --resume FOLDER, which names where the launch began."""
    run_ranks(1, chosen, str(tmp_path))
