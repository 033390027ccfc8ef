"""The examples of Hugging Face's frameworks, as their users run them: twice, of which the second run resumes."""

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb import integrations
from tests.harness import run_ranks
from tests.sharding.test_whole_states import begin_anew

EXAMPLES = Path(integrations.__file__).parent / "examples"


def run(rank: int, name: str, folder: str) -> dict[str, Any]:
    begin_anew()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, folder])
        return runpy.run_path(str(EXAMPLES / name), run_name="__main__")


def run_trainer(rank: int, folder: str) -> tuple[int, dict[str, float]]:
    trainer = run(rank, "trainer.py", folder)["trainer"]
    return trainer.state.global_step, trainer.optimizer.optimizer.trust_ratios()


def test_the_trainers_example_runs_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    first, _ = run_ranks(2, run_trainer, str(tmp_path))
    assert first[0] == 8
    assert "bert.embeddings.LayerNorm.bias" in first[1]
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["global_step"] == 4
    (tmp_path / "checkpoint-8").rename(tmp_path / "another")
    again, _ = run_ranks(2, run_trainer, str(tmp_path))
    assert again == first


def run_accelerate(rank: int, folder: str) -> tuple[float, list[str]]:
    found = run(rank, "accelerate_ddp.py", folder)
    (step,) = {float(state["step"]) for state in found["optimizer"].optimizer.state.values()}
    return step, list(found["optimizer"].optimizer.trust_ratios())


def test_accelerates_example_runs_and_resumes(tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    for steps in (4, 8):
        for found, names in run_ranks(2, run_accelerate, str(tmp_path / "saved")):
            assert found == steps
            assert names[0] == "0.weight"


def test_examples_are_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert len(path.read_text().splitlines()) <= 40, path.name
