"""The study: its search for rate and warmup, results that are used again, contestants that are one optimizer."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from sharded_lamb.bert import study as module
from sharded_lamb.bert.config import RunConfig, build_config
from sharded_lamb.bert.study import study_options
from sharded_lamb.optim.skips import DivergedError
from sharded_lamb.recipes.training.loop import Outcome
from sharded_lamb.recipes.training.ranks import Ranks
from tests.harness import run_ranks

BEST = {6: (1e-2, 0.1), 24: (2.5e-3, 0.4)}  # rate and warmup of the least loss at each batch

Trained = tuple[str, int, float, float, int]


def loss_of(trained: Trained, same: bool) -> float:
    """Least at `BEST`, and at lower rates for shorter warmups; a rate four times as large, or larger, diverges.

    ``same``: of every optimizer alike.
    """
    optimizer, batch, lr, warmup, seed = trained
    length = math.log2(warmup / BEST[batch][1])
    rate = (
        math.log2(lr / (BEST[batch][0] * (0.1 if optimizer == "adamw" and not same else 1))) - 0.45 * length
    )
    if rate > 2.5:
        raise DivergedError("10 steps in a row had non-finite gradients")
    if rate > 1.5:
        return math.nan
    offset = 0 if same else sum(map(ord, optimizer)) / 1e5
    return 5 + rate**2 + 0.8 * length**2 + seed / 1000 + offset


def studied(
    rank: int, tree: dict[str, Any], overrides: list[str], optimizers: str, same: bool = False
) -> tuple[list[Trained], str]:
    """(what was trained, the error if there was one) of a study whose runs take no time."""
    trained: list[Trained] = []

    def at_once(config: RunConfig, resume: str | None, ranks: Ranks) -> Outcome:
        (phase,), variant = config.phases, config.optimizer.variant
        assert resume == "auto"
        assert phase.steps * phase.global_batch == 72
        trained.append(
            (variant, phase.global_batch, float(phase.lr), float(phase.warmup_fraction), config.seed)
        )
        loss = loss_of(trained[-1], same)
        return Outcome(
            Path(config.run_dir), {"heldout_loss": loss, "heldout_accuracy": 0.1, "unigram_entropy": 6.0}
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "run", at_once)
        try:
            module.study(build_config(tree, overrides), study_options("24,6", optimizers, 2), Ranks.start())
        except ValueError as error:
            return trained, str(error)
    return trained, ""


def test_rate_and_warmup_are_tuned_at_every_batch_and_trained_with_further_seeds(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    ((trained, error),) = run_ranks(1, studied, tree, [f"run_dir={tmp_path}"], "lamb")
    assert error == ""
    assert trained == [  # the config's seed is 3
        ("lamb", 6, 5e-3, 0.1, 3),
        ("lamb", 6, 1e-2, 0.1, 3),
        ("lamb", 6, 2e-2, 0.1, 3),
        ("lamb", 6, 1e-2, 0.2, 3),
        ("lamb", 6, 1e-2, 0.05, 3),
        ("lamb", 6, 1e-2, 0.1, 4),
        ("lamb", 24, 2e-2, 0.1, 3),  # √(24 / 6) times the rate diverges, and so does the rate
        ("lamb", 24, 1e-2, 0.1, 3),
        ("lamb", 24, 5e-3, 0.1, 3),
        ("lamb", 24, 2.5e-3, 0.1, 3),
        ("lamb", 24, 1.25e-3, 0.1, 3),
        ("lamb", 24, 6.25e-4, 0.1, 3),
        ("lamb", 24, 1.25e-3, 0.2, 3),
        ("lamb", 24, 1.25e-3, 0.4, 3),
        ("lamb", 24, 2.5e-3, 0.4, 3),  # again, since the warmup has changed
        ("lamb", 24, 5e-3, 0.4, 3),
        ("lamb", 24, 2.5e-3, 0.2, 3),
        ("lamb", 24, 2.5e-3, 0.4, 4),
    ]
    chosen = [row for row in json.loads((tmp_path / "study.json").read_text()) if row["chosen"]]
    assert [(row["batch"], row["lr"], row["warmup"], row["seed"]) for row in chosen] == [
        (batch, *best, seed) for batch, best in BEST.items() for seed in (3, 4)
    ]
    assert "| lamb | 24 | 3 | 0.0025 | 0.4 | 5.008 (5.007, 5.008) |" in (tmp_path / "study.md").read_text()


def test_results_in_the_folder_are_used_again_by_runs_of_the_same_configuration(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    settings = [f"run_dir={tmp_path}"]
    alone = [run_ranks(1, studied, tree, settings, optimizer)[0] for optimizer in ("lamb", "adamw")]
    assert [error for _, error in alone] == ["", ""]
    assert run_ranks(1, studied, tree, settings, "lamb,adamw") == [([], "")]
    rows = json.loads((tmp_path / "study.json").read_text())
    key = ("optimizer", "batch", "lr", "warmup", "seed")
    assert sorted(tuple(row[name] for name in key) for row in rows) == sorted(alone[0][0] + alone[1][0])

    changed = [*settings, "optimizer.eps=1e-8"]
    assert run_ranks(1, studied, tree, changed, "lamb") == [alone[0]]
    assert run_ranks(1, studied, tree, settings, "lamb") == [([], "")]


def test_optimizers_with_the_same_result_are_refused_on_every_rank(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    for again in (False, True):  # the second time from the folder
        for trained, error in run_ranks(2, studied, tree, [f"run_dir={tmp_path}"], "lamb,lans", True):
            assert "lamb (batch 6, lr 0.005) and lans (batch 6, lr 0.005)" in error
            assert "same held-out loss to the last digit, 6.003" in error
            assert [run for run in trained if run[0] == "lans"] == (
                [] if again else [("lans", 6, 5e-3, 0.1, 3)]
            )


def test_settings_that_make_both_one_optimizer_are_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    for value in ("[]", "null", "['^cls']"):
        settings = [f"run_dir={tmp_path}", f"optimizer.exclude_from_layer_adaptation={value}"]
        ((trained, error),) = run_ranks(1, studied, tree, settings, "lamb,adamw")
        assert trained == []
        assert "makes lamb and adamw the same optimizer" in error
        assert "optimizer.exclude_from_layer_adaptation=" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("32,", None, None), "--batches '32,': expected whole numbers"),
        (("0,32", None, None), "--batches '0,32': expected whole numbers"),
        ((None, "lamb,sgd", None), "--optimizers 'lamb,sgd': expected some of lamb,lans,adamw,lars"),
        ((None, None, 0), "--seeds 0: expected 1 or more"),
    ],
)
def test_bad_options_are_refused(options: tuple[Any, Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        study_options(*options)
