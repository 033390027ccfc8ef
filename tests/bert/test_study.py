"""The study: whose rows are used again, and contestants that are one optimizer."""

import json
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb.bert import study as module
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.config_io import build_config
from sharded_lamb.bert.train import Outcome
from sharded_lamb.recipes.training.ranks import Ranks
from tests.harness import run_ranks

BATCHES = "6,24"


def studied(
    rank: int, tree: dict[str, Any], overrides: list[str], same: bool
) -> tuple[list[tuple[str, int, float]], str]:
    """(what was trained, the error if there was one) of a study whose runs take no time.

    ``same``: both optimizers' losses depend on the batch and the rate alone.
    """
    trained = []

    def at_once(config: RunConfig, resume: str | None, ranks: Ranks) -> Outcome:
        (phase,), variant = config.phases, config.optimizer.variant
        assert resume == "auto"
        lr = float(phase.lr)
        trained.append((variant, phase.global_batch, lr))
        loss = (
            5 + (lr - 3e-3) ** 2 + phase.global_batch / 1000 + (0 if same else sum(map(ord, variant)) / 1e5)
        )
        metrics = {"heldout_loss": loss, "heldout_accuracy": 0.1, "unigram_entropy": 6.0}
        return Outcome(Path(config.run_dir), metrics)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", at_once)
        try:
            module.study(build_config(tree, overrides), BATCHES, Ranks.start())
        except ValueError as error:
            return trained, str(error)
    return trained, ""


def test_optimizers_with_the_same_result_are_refused_on_every_rank(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    for again in (False, True):  # the second time from study.json
        for trained, error in run_ranks(2, studied, tree, [f"run_dir={tmp_path}"], True):
            assert "lamb (batch 6, lr 0.002) and adamw (batch 6, lr 0.002)" in error
            assert "same held-out loss to the last digit, 5.0" in error
            assert ("adamw", 6, 2e-3) not in trained if again else ("adamw", 6, 2e-3) in trained
            assert ("adamw", 6, 4e-3) not in trained


def test_a_row_is_used_again_if_its_configuration_is_the_same(tree: dict[str, Any], tmp_path: Path) -> None:
    settings = [f"run_dir={tmp_path}"]
    ((first, error),) = run_ranks(1, studied, tree, settings, False)
    assert error == ""
    assert len(first) == len(set(first)) == 20
    file = tmp_path / "study.json"
    rows = json.loads(file.read_text())
    assert run_ranks(1, studied, tree, settings, False) == [([], "")]
    assert json.loads(file.read_text()) == rows

    # Those of before rows had a digest; one of another optimizer with the same loss must not matter either.
    old = [{key: value for key, value in row.items() if key != "config_digest"} for row in rows]
    for row in old:
        row["heldout_loss"] = next(
            r["heldout_loss"] for r in rows if (r["batch"], r["optimizer"]) == (row["batch"], "lamb")
        )
    file.write_text(json.dumps(old))
    assert run_ranks(1, studied, tree, settings, False) == [(first, "")]
    assert json.loads(file.read_text()) == rows

    # Those of other settings: each run stands there once.
    assert run_ranks(1, studied, tree, [*settings, "optimizer.eps=1e-8"], False) == [(first, "")]
    changed = json.loads(file.read_text())
    assert len(changed) == len(rows)
    assert not {row["config_digest"] for row in changed} & {row["config_digest"] for row in rows}


def test_settings_that_make_both_one_optimizer_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    for value in ("[]", "null", "['^cls']"):
        settings = [f"run_dir={tmp_path}", f"optimizer.exclude_from_layer_adaptation={value}"]
        ((trained, error),) = run_ranks(1, studied, tree, settings, False)
        assert trained == []
        assert "makes lamb and adamw the same optimizer" in error
        assert "optimizer.exclude_from_layer_adaptation=" in error
