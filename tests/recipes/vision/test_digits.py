"""The comparison on digits: what it tunes on, what it reports, what it writes."""

import argparse
import json
from pathlib import Path
from typing import Any
from unittest import mock

from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.vision import command, digits
from tests.harness import run_ranks

SETTINGS: dict[str, Any] = {
    **digits.SETTINGS,
    "model": {"options": {"width": 8, "depth": 1, "heads": 2, "patch": 4}},
    "schedule": {"epochs": 2, "lr": 1e-2, "global_batch": 512, "warmup_epochs": 1},
}


def compare(rank: int, out: str) -> None:
    with mock.patch.object(digits, "TUNED", {"lamb": (1e-4, 5e-2), "adamw": (1e-2, 1e-5)}):
        digits.compare(Path(out), Ranks.start(), SETTINGS, (1, 2))


def test_rates_are_tuned_on_validation_and_reported_on_test(tmp_path: Path) -> None:
    run_ranks(1, compare, str(tmp_path), timeout=240)
    found = json.loads((tmp_path / "digits.json").read_text())
    assert not [key for row in found["tuning"] for key in row if key.startswith("test")]
    for optimizer in ("lamb", "adamw"):
        tried = [row for row in found["tuning"] if row["optimizer"] == optimizer]
        assert len(tried) == 2
        assert {row["seed"] for row in tried} == {0}
        final = [row for row in found["final"] if row["optimizer"] == optimizer]
        assert [row["seed"] for row in final] == [1, 2]
        assert {row["lr"] for row in final} == {min(tried, key=lambda row: row["heldout_loss"])["lr"]}
        assert len({row["test_loss"] for row in final}) == 2
        assert all(0 <= row["test_accuracy"] <= 1 for row in final)
    assert found["about"]["machine"]["cpu"]
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_table_has_the_median_and_the_range_of_seeds() -> None:
    final = [
        {"optimizer": "lamb", "lr": 0.02, "test_accuracy": right, "test_loss": 1 - right}
        for right in (0.9, 0.96, 0.93)
    ]
    lines = digits.table([{"optimizer": "lamb", "lr": 0.01}, {"optimizer": "lamb", "lr": 0.02}], final)
    cells = [cell.strip() for cell in lines.splitlines()[2].split("|")]
    assert cells[1:-1] == ["lamb", "93.0%", "90.0% to 96.0%, 3 seeds", "0.070", "0.02 of 0.01, 0.02"]


def commanded(rank: int, config: str, overrides: list[str]) -> int:
    chosen = argparse.Namespace(task="train", config=config, resume=None, overrides=overrides)
    return command.run(chosen)


def test_the_command_trains_a_configuration(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(json.dumps(SETTINGS))
    assert run_ranks(1, commanded, str(file), [f"run_dir={tmp_path / 'run'}", "seed=4"]) == [0]
    assert "seed: 4" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_the_committed_numbers_are_of_the_committed_settings() -> None:
    """And the table of the README is theirs."""
    results = Path(digits.__file__).parent / "results" / "digits.json"
    found = json.loads(results.read_text())
    assert {(row["optimizer"], row["lr"]) for row in found["tuning"]} == {
        (name, lr) for name, rates in digits.TUNED.items() for lr in rates
    }
    assert {row["seed"] for row in found["final"]} == set(digits.SEEDS)
    assert found["settings"]["schedule"]["epochs"] == digits.SETTINGS["schedule"]["epochs"]
    assert digits.table(found["tuning"], found["final"]) in (results.parents[1] / "README.md").read_text()
