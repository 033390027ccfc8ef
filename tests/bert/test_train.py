"""The loop: the same numbers however a step is split, saved, moved to other ranks or cut off."""

import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sharded_lamb.bert.config import build_config
from sharded_lamb.bert.train import run
from sharded_lamb.checkpoint import problem_with, read_contents
from sharded_lamb.recipes.training import picture
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.training.sharded_backend import ShardedBackend
from sharded_lamb.recipes.training.step_clock import SECTIONS
from tests.harness import run_ranks, run_ranks_expecting_errors

OFTEN = "checkpoint.every_steps=2"
Rows = list[dict[str, Any]]
Ended = tuple[Rows, dict[str, torch.Tensor]]
"""(rows of metrics.jsonl, the weights at the end)"""


def train(
    rank: int, tree: dict[str, Any], run_dir: str, overrides: list[str], resume: str | None = None
) -> None:
    """A run that draws no picture."""
    torch.set_num_threads(1)
    with mock.patch.object(picture, "draw_run"):  # drawing takes as long as training
        run(build_config(tree, [f"run_dir={run_dir}", *overrides]), resume, Ranks.start())


def trained(
    world: int, tree: dict[str, Any], run_dir: Path, *overrides: str, resume: str | None = None
) -> tuple[Rows, dict[str, torch.Tensor]]:
    """(rows of metrics.jsonl, the weights at the end)."""
    run_ranks(world, train, tree, str(run_dir), list(overrides), resume)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((run_dir / "checkpoints").glob("step-*"))
    return rows, read_contents(last).weights


def distance(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    """Relative, over the whole model. Key biases are left out: they shift every score of a softmax alike, so
    their true gradient is 0 and what LAMB makes of it is rounding."""
    assert one.keys() == two.keys()
    names = [name for name in one if not name.endswith("key.bias")]
    a, b = (torch.cat([weights[name].double().flatten() for name in names]) for weights in (one, two))
    return float((a - b).norm() / a.norm())


def losses(rows: Rows) -> list[float]:
    return [row["loss"] for row in rows if "loss" in row]


def test_accumulation_changes_nothing(tree: dict[str, Any], tmp_path: Path) -> None:
    shape = ["phases.0.global_batch=32", "phases.0.steps=4"]
    rows, whole = trained(1, tree, tmp_path / "32", *shape, "batch.max_micro_batch=32")
    for micro in (16, 5):
        again, cut = trained(1, tree, tmp_path / str(micro), *shape, f"batch.max_micro_batch={micro}")
        assert distance(whole, cut) < 1e-5
        assert losses(again) == pytest.approx(losses(rows), rel=1e-5)


@pytest.fixture(scope="module")
def one_rank(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return trained(1, tree, tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize(("parallel", "world"), [("zero2", 3), ("ddp+zero1", 2)])
def test_world_size_changes_nothing(
    tree: dict[str, Any], tmp_path: Path, parallel: str, world: int, one_rank: Ended
) -> None:
    """zero2 on two ranks: test_every_row_says_how_the_run_goes."""
    again = trained(world, tree, tmp_path, f"parallel={parallel}", "batch.max_micro_batch=3")
    assert_same_numbers(again, one_rank)


def assert_same_numbers(run: Ended, expected: Ended) -> None:
    (again, weights), (rows, alone) = run, expected
    assert all(math.isfinite(loss) for loss in losses(rows))
    assert distance(alone, weights) < 1e-5
    assert losses(again) == pytest.approx(losses(rows), rel=1e-5)
    assert again[-1]["heldout_loss"] == pytest.approx(rows[-1]["heldout_loss"], rel=1e-5)
    assert [row["sample"] for row in again[:-1]] == [row["sample"] for row in rows[:-1]]


TWO_PHASES = [
    "phases=[{steps: 5, global_batch: 12, sequence_length: 32, lr: 0.01, warmup_fraction: 0.2, "
    "ramp: {start: 6, steps: 3}}, "
    "{steps: 4, global_batch: 6, sequence_length: 16, lr: 0.01, warmup_fraction: 0.2}]"
]


def test_a_resumed_run_ends_with_the_same_bits_and_moves_to_other_world_sizes(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    overrides = [*TWO_PHASES, "model.dropout=0.1", OFTEN]
    rows, whole = trained(2, tree, tmp_path / "whole", *overrides)
    assert [row["phase"] for row in rows[:-1]] == [0] * 5 + [1] * 4
    assert [row["global_batch"] for row in rows[:-1]] == [6, 6, 6, 12, 12, 6, 6, 6, 6]
    for kept in (2, 5, 6):  # in the first phase's ramp, at its end, in the second phase
        copy = cut_off(tmp_path / "whole", tmp_path / f"after {kept}", kept)
        again, weights = trained(2, tree, copy, *overrides, resume="auto")
        assert all(torch.equal(weights[name], whole[name]) for name in whole)
        assert losses(again) == losses(rows)
        assert [row["step"] for row in again] == [row["step"] for row in rows]


@pytest.fixture(scope="module")
def two_phases(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    folder = tmp_path_factory.mktemp("two phases") / "run"
    return folder, trained(2, tree, folder, *TWO_PHASES, OFTEN)


def test_a_run_resumed_on_1_and_on_3_ranks_goes_on_alike(
    tree: dict[str, Any], tmp_path: Path, two_phases: tuple[Path, Ended]
) -> None:
    folder, (rows, whole) = two_phases
    for world in (1, 3):
        copy = cut_off(folder, tmp_path / f"on {world}", 2)
        again, weights = trained(world, tree, copy, *TWO_PHASES, resume="auto")
        assert distance(whole, weights) < 1e-5
        assert losses(again) == pytest.approx(losses(rows), rel=1e-5)


def cut_off(finished: Path, copy: Path, step: int) -> Path:
    """The run as it stood when `step` was the newest checkpoint and more steps had been logged."""
    shutil.copytree(finished, copy)
    for saved in (copy / "checkpoints").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)
    rows = (copy / "metrics.jsonl").read_text().splitlines()
    (copy / "metrics.jsonl").write_text("\n".join(rows[: step + 1]) + '\n{"step": 4, "lo')
    return copy


def test_a_broken_checkpoint_is_passed_over_by_name(
    tree: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows, whole = trained(1, tree, tmp_path, OFTEN)
    newest = tmp_path / "checkpoints" / "step-00000006"
    for name in ("manifest.json", "shard-00000.safetensors"):
        broken = tmp_path / "checkpoints" / "step-00000006" / name
        content = broken.read_bytes()
        broken.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert f"{name} does not have the hash it was written with" in str(problem_with(newest))
        again, weights = trained(1, tree, tmp_path, resume="auto")
        assert losses(again) == losses(rows)
        assert all(torch.equal(weights[key], whole[key]) for key in whole)
    (newest / "manifest.json").unlink()
    failed = run_ranks_expecting_errors(2, train, tree, str(tmp_path), [], str(newest))
    assert all("step-00000006" in message and "manifest.json" in message for _, message in failed.values())


def test_a_run_is_not_overwritten_or_continued_as_another(tree: dict[str, Any], tmp_path: Path) -> None:
    trained(1, tree, tmp_path)
    for overrides, resume, message in (
        ([], None, "already contains a run: continue it with --resume auto"),
        (
            ["seed=9", "phases.0.lr=0.5"],
            "auto",
            "with other settings.*\n  phases.0.lr: 0.01 there, 0.5 now\n  seed: 3 there, 9 now",
        ),
        (["model.layers=2"], "auto", "with other settings.*\n  model.layers: 1 there, 2 now"),
        (
            ["optimizer.variant=lans"],
            "auto",
            "with other settings.*\n  optimizer.variant: 'lamb' there, 'lans' now",
        ),
        (
            ["optimizer.variant=lars"],
            "auto",
            "with other settings.*\n  optimizer.variant: 'lamb' there, 'lars' now",
        ),
    ):
        failed = run_ranks_expecting_errors(2, train, tree, str(tmp_path), overrides, resume)
        assert all(re.search(message, text, re.DOTALL) for _, text in failed.values()), failed


def test_a_phase_started_from_a_checkpoint_keeps_moments_and_counts_steps_anew(
    tree: dict[str, Any], tmp_path: Path, two_phases: tuple[Path, Ended]
) -> None:
    first = two_phases[0] / "checkpoints" / "step-00000005"
    config = build_config(tree, TWO_PHASES)
    assert config.phases[1].steps == 4
    second = [
        "phases=[{steps: 4, global_batch: 6, sequence_length: 16, lr: 0.01, warmup_fraction: 0.2}]",
        f"start_from={first}",
        "optimizer.weight_decay=0.3",
    ]
    again, _ = trained(2, tree, tmp_path / "second", *second)
    before = read_contents(first)
    after = read_contents(max((tmp_path / "second" / "checkpoints").glob("step-*")))
    assert {float(state["step"]) for state in before.states.values()} == {5.0}
    assert {float(state["step"]) for state in after.states.values()} == {4.0}
    assert [before.groups[0]["options"]["weight_decay"], after.groups[0]["options"]["weight_decay"]] == [
        0.01,
        0.3,
    ]
    untrained, _ = trained(2, tree, tmp_path / "afresh", second[0])
    assert losses(again)[0] != losses(untrained)[0]


def test_only_the_newest_checkpoints_are_kept(tree: dict[str, Any], tmp_path: Path) -> None:
    trained(1, tree, tmp_path, "checkpoint.keep=2", "checkpoint.every_steps=1")
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == [
        "latest",
        "step-00000005",
        "step-00000006",
    ]


SHORT = ["batch.max_micro_batch=3", "phases.0.lr=0.002"]


@pytest.fixture(scope="module")
def plain(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Rows:
    return trained(2, tree, tmp_path_factory.mktemp("plain"), *SHORT)[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["speed.precision=bf16_autocast"],
        ["speed.precision=bf16"],
        ["speed.activation_checkpointing=true"],
        ["data.nsp=true", "masking.whole_word=true"],
        ["optimizer.variant=apex", "optimizer.max_grad_norm=null"],
    ],
    ids=lambda overrides: overrides[0].split("=")[-1],
)
def test_switches_train_to_about_the_same_loss(
    tree: dict[str, Any], tmp_path: Path, overrides: list[str], plain: Rows
) -> None:
    rows, _ = trained(2, tree, tmp_path, *SHORT, *overrides)
    # What is drawn differs with nsp and whole words; precision and recomputation change rounding only.
    tolerance = {"speed.precision": 2e-2, "speed.activation_checkpointing": 1e-5}.get(
        overrides[0].split("=")[0], 0.1
    )
    assert losses(rows) == pytest.approx(losses(plain), rel=tolerance)
    assert all(row["grad_norm"] > 0 for row in rows[:-1])
    if "data.nsp=true" in overrides:
        assert rows[0]["nsp_loss"] == pytest.approx(math.log(2), rel=0.1)
        assert 0 <= rows[-1]["heldout_nsp_accuracy"] <= 1


def test_a_world_size_that_does_not_divide_is_refused_on_every_rank(
    tree: dict[str, Any], tmp_path: Path
) -> None:
    failed = run_ranks_expecting_errors(3, train, tree, str(tmp_path), ["phases.0.global_batch=8"])
    assert len(failed) == 3
    assert all("global_batch=8 can't be split evenly over 3 ranks" in text for _, text in failed.values())


def test_bad_input_found_by_rank_0_is_refused_on_every_rank(tree: dict[str, Any], tmp_path: Path) -> None:
    missing = f"data.source=['{tmp_path}/absent.txt']"
    failed = run_ranks_expecting_errors(2, train, tree, str(tmp_path / "run"), [missing])
    assert all("absent.txt" in text and "no such file" in text for _, text in failed.values())


def observed(
    rank: int, tree: dict[str, Any], run_dir: str, overrides: list[str]
) -> tuple[list[str], list[float]]:
    """(what a run did in turn, the gradient norm after each step)."""
    did: list[str] = []
    norms: list[float] = []
    accumulate, step = ShardedBackend.accumulate, ShardedBackend.step
    grad_norm, save = ShardedBackend.grad_norm, ShardedBackend.save

    def stepped(self: Any, lr: float) -> None:
        step(self, lr)
        did.append("step")
        norms.append(self.optimizer.grad_norm)

    def noted(name: str, call: Any) -> Any:
        return lambda *args, **keywords: [did.append(name), call(*args, **keywords)][1]

    with (
        mock.patch.object(ShardedBackend, "accumulate", noted("backward", accumulate)),
        mock.patch.object(ShardedBackend, "step", stepped),
        mock.patch.object(ShardedBackend, "grad_norm", noted("read", grad_norm)),
        mock.patch.object(ShardedBackend, "save", noted("save", save)),
    ):
        train(rank, tree, run_dir, overrides)
    return did, norms


def test_numbers_are_read_a_step_late_but_before_a_save(tree: dict[str, Any], tmp_path: Path) -> None:
    ((did, norms),) = run_ranks(1, observed, tree, str(tmp_path), ["checkpoint.every_steps=3"])
    begin, later = ["backward", "step"], ["backward", "read", "step"]
    assert did == 2 * [*begin, *later, *later, "read", "save"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()][:-1]
    assert [row["grad_norm"] for row in rows] == norms
    assert len(set(norms)) == 6


class CastsOfWeights(TorchDispatchMode):
    """Counts the casts from fp32 to bf16 by shape."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.Size] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and (kwargs or {}).get("dtype") == torch.bfloat16:
            self.counts[args[0].shape] += 1
        return func(*args, **(kwargs or {}))


def casts(rank: int, tree: dict[str, Any], run_dir: str) -> dict[torch.Size, int]:
    with CastsOfWeights() as mode:
        train(
            rank,
            tree,
            run_dir,
            [
                "speed.precision=bf16_autocast",
                "batch.max_micro_batch=4",
                "phases.0.steps=1",
                "log.heldout_batches=1",
            ],
        )
    return dict(mode.counts)


def test_a_step_casts_its_weights_once_for_all_micro_batches(tree: dict[str, Any], tmp_path: Path) -> None:
    """Three micro-batches, and one forward over the held-out split."""
    (counts,) = run_ranks(1, casts, tree, str(tmp_path))
    assert counts[torch.Size([64, 32])] == counts[torch.Size([32, 64])] == 1 + 1


def check_norms_on_the_board(folder: Path, quantiles: list[float]) -> None:
    """Every parameter's, of every second step; ``quantiles``: of the ratios of step 3."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (board,) = {path.parent for path in folder.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(board)).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("trust_ratio/")]
    ratios = [{each.step: each.value for each in events.Scalars(tag)} for tag in tags]
    assert all([*own] == [1, 3, 5] for own in ratios)
    assert (min(own[3] for own in ratios), max(own[3] for own in ratios)) == pytest.approx(
        (quantiles[0], quantiles[-1])
    )
    assert f"weight_norm/{tags[0].partition('/')[2]}" in events.Tags()["scalars"]


def test_every_row_says_how_the_run_goes(tree: dict[str, Any], tmp_path: Path, one_rank: Ended) -> None:
    rows, weights = trained(2, tree, tmp_path, "log.trust_ratio_steps=2", "log.heldout_steps=3")
    *steps, final = rows
    assert [row["step"] for row in steps if "heldout_loss" in row] == [3, 6]
    assert steps[-1]["heldout_loss"] == final["heldout_loss"] < steps[2]["heldout_loss"]
    assert steps[-1]["heldout_accuracy"] == final["heldout_accuracy"]
    assert_same_numbers((rows, weights), one_rank)  # evaluations leave training as it is
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    expected = {
        "loss",
        "lr",
        "grad_norm",
        "tokens_per_s",
        "mfu",
        "data_wait_share",
        "data_s",
        "forward_s",
        "backward_s",
        "log_s",
        "optimizer_s",
        "peak_memory_bytes",
        "slowest_rank",
    }
    assert all(expected <= row.keys() for row in steps)
    for row in steps:
        assert all(row[f"{name}_s"] > 0 for name in SECTIONS)
        assert max(row[f"{name}_s"] for name in SECTIONS) <= row["step_s"]
    assert [("trust_ratio_quantiles" in row) for row in steps] == [True, False] * 3
    quantiles = steps[2]["trust_ratio_quantiles"]
    assert quantiles == sorted(quantiles)
    assert {"embeddings", "layer 0", "head"} == steps[2]["trust_ratio_by_layer"].keys()
    check_norms_on_the_board(tmp_path, quantiles)
    assert {"heldout_loss", "heldout_accuracy", "unigram_entropy"} <= final.keys()
    assert steps[-1]["tokens"] == final["tokens"] <= 6 * 12 * 32
    picture.draw_run(steps, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
