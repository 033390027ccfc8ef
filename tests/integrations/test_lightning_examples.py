"""The examples for Lightning and Fabric, as torchrun starts them, on two ranks."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import sharded_lamb
from tests.harness import run_ranks
from tests.integrations import cases
from tests.training import assert_same_bits

EXAMPLES = Path(sharded_lamb.__file__).parent / "integrations" / "examples"


def run(rank: int, name: str, folder: Path) -> tuple[int, dict[str, torch.Tensor]]:
    """(steps, weights) after a run of the example."""
    os.environ["TORCHELASTIC_RUN_ID"] = "test"
    os.environ["GROUP_RANK"] = "0"
    space: dict[str, Any] = cases.run_file(EXAMPLES / name, folder)
    if "fabric" in space:
        optimizer, model = space["optimizer"].optimizer, space["net"]
        states = optimizer.local_state_dict()["state"].values()
        return int(next(iter(states))["step"]), cases.values(model)
    trainer = space["trainer"]
    return trainer.global_step, cases.values(trainer.lightning_module.net)


@pytest.mark.parametrize(
    ("name", "steps"),
    [("lightning_ddp.py", 16), ("lightning_stage2.py", 16), ("lightning_fsdp2.py", 16), ("fabric.py", 8)],
)
def test_runs_and_resumes(tmp_path: Path, name: str, steps: int) -> None:
    first, second = run_ranks(2, run, name, tmp_path)
    assert first[0] == steps
    assert_same_bits(first[1], second[1])
    for again, weights in run_ranks(2, run, name, tmp_path):  # nothing is left to train
        assert again == steps
        assert_same_bits(weights, first[1])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 40
