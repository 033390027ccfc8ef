"""The checkpoint from which a run's ranks resume, also those that torchrun has restarted."""

import fcntl
import os
import signal
import time
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
    """Beside a process that has the lock: another launch is refused, and restarted ranks of this one are not."""
    holder = os.fork()
    if holder == 0:
        file = os.open(Path(folder, ".lock"), os.O_WRONLY | os.O_CREAT)
        fcntl.lockf(file, fcntl.LOCK_EX)
        Path(folder, "locked").touch()
        time.sleep(60)
        os._exit(0)
    ranks = Ranks.start()
    while not Path(folder, "locked").exists():
        time.sleep(0.01)
    try:
        with (
            pytest.raises(
                ValueError, match=r"another run trains into .* delete .*/\.lock if its host has crashed"
            ),
            checkpoint.claimed(folder, ranks),
        ):
            pass
        checkpoint.launch_store().set(f"claimed/{folder}", "")
        with checkpoint.claimed(folder, ranks):
            pass
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)


def claims_of_one_launch(rank: int, folder: str) -> None:
    ranks = Ranks.start()
    for _ in range(2):
        with checkpoint.claimed(folder, ranks):
            child = os.fork()
            if child == 0:
                file = os.open(Path(folder, ".lock"), os.O_WRONLY)
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    os._exit(7)
                os._exit(1)
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_run_holds_its_folder(tmp_path: Path) -> None:
    run_ranks(1, claims_of_one_launch, str(tmp_path))


def test_one_run_at_a_time_trains_into_a_folder(tmp_path: Path) -> None:
    run_ranks(1, claims, str(tmp_path))


def test_restarted_ranks_resume_from_the_newest_checkpoint_that_their_launch_has_saved(
    tmp_path: Path,
) -> None:
    """Also with --resume FOLDER, which names where the launch began."""
    run_ranks(1, chosen, str(tmp_path))
