"""`parallel: deepspeed`: the same configuration, the same curve, and checkpoints that go to and fro."""

import importlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sharded_lamb.bert.config import RunConfig, build_config
from sharded_lamb.bert.dryrun import describe
from sharded_lamb.bert.ds_config import DECIDED, ds_config
from sharded_lamb.checkpoint import read_contents, write_contents
from tests.bert import test_train
from tests.bert.test_train import Ended, Rows, distance, losses
from tests.harness import run_ranks, run_ranks_expecting_errors

pytest.importorskip("deepspeed")

SAME = 1e-6  # relative, of fp32 losses and weights; 1e-7 was seen after 10 steps
# Eight steps that depend on the ratios: large weights, a large rate. 1, 2 and 3 micro-batches a step.
SHARP = ["phases.0.steps=8", "phases.0.lr=0.1", "model.initializer_range=0.1"]
SHARP += ["phases.0.ramp={start: 4, steps: 6}", "batch.max_micro_batch=2"]
LOGGED = {"trust_ratio_steps": 3, "fill_mask": ["the [MASK] of a"]}


def ours(*overrides: str) -> list[str]:
    return ["parallel=zero2", *overrides]


def theirs(stage: int, *overrides: str) -> list[str]:
    return ["parallel=deepspeed", f"deepspeed.zero_stage={stage}", *overrides]


def train(
    rank: int, tree: dict[str, Any], run_dir: str, overrides: list[str], resume: str | None, naive: bool
) -> None:
    import deepspeed
    from deepspeed.utils import groups

    importlib.reload(groups)  # an earlier case of other tests may have left its process groups there
    deepspeed.logger.setLevel("ERROR")
    if os.environ["WORLD_SIZE"] == "1":
        del os.environ["LOCAL_RANK"]  # as without a launcher
    linear = torch.nn.functional.linear
    with pytest.MonkeyPatch.context() as patch:
        if naive:
            _take_ratios_of_partitions(patch)
        try:
            test_train.train(rank, tree, run_dir, overrides, resume)
            torch.distributed.barrier()
            assert torch.nn.functional.linear is linear, "ZeRO 3 left its own linear behind"
        finally:
            importlib.reload(groups)  # it keeps process groups, which the harness destroys


def _take_ratios_of_partitions(patch: pytest.MonkeyPatch) -> None:
    """A LAMB without knowledge of shards: it takes norms of this rank's parts."""
    from sharded_lamb.comm.step_agreement import StepAgreement

    exact = StepAgreement.all_reduce

    def without_sums(self: StepAgreement, parts: Sequence[torch.Tensor], *facts: Any) -> torch.Tensor:
        return exact(self, [part.clone() for part in parts], *facts)

    patch.setattr(StepAgreement, "all_reduce", without_sums)


def trained(
    tree: dict[str, Any],
    run_dir: Path,
    overrides: list[str],
    *,
    world: int = 2,
    resume: str | None = None,
    naive: bool = False,
) -> Ended:
    if (
        "deepspeed.zero_stage=3" in overrides
    ):  # parameters as small as these would be kept whole, or for longer
        kept = dict.fromkeys(("param_persistence_threshold", "max_live_parameters", "max_reuse_distance"), 0)
        sections = {"zero_optimization": {f"stage3_{key}": value for key, value in kept.items()}}
        overrides = [*overrides, written(run_dir.parent, sections)]
    run_ranks(world, train, tree, str(run_dir), overrides, resume, naive)
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    last = max((run_dir / "checkpoints").glob("step-*"))
    return rows, read_contents(last).weights


def assert_alike(rows: Rows, expected: Rows, tolerance: float = SAME) -> None:
    assert losses(rows) == pytest.approx(losses(expected), rel=tolerance)
    for key in ("heldout_loss", "heldout_accuracy"):
        assert rows[-1][key] == pytest.approx(expected[-1][key], rel=tolerance)
    for one, two in zip(rows[:-1], expected[:-1], strict=True):
        assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-5)
        for part in (
            "embeddings",
            "head",
        ):  # a layer's median may fall on key biases, whose ratio is rounding
            ratios = [row.get("trust_ratio_by_layer", {}).get(part) for row in (one, two)]
            assert ratios[0] is ratios[1] is None or ratios[0] == pytest.approx(ratios[1], rel=1e-4)
        assert [one[key] for key in ("step", "lr", "sample")] == [
            two[key] for key in ("step", "lr", "sample")
        ]


@pytest.fixture(scope="module")
def sharp(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    run_dir = tmp_path_factory.mktemp("sharp") / "ours"
    return run_dir, trained({**tree, "log": LOGGED}, run_dir, ours(*SHARP))


def test_a_run_is_the_same_under_zero_1_2_and_3(
    tree: dict[str, Any], tmp_path: Path, sharp: tuple[Path, Ended]
) -> None:
    tree = {**tree, "log": LOGGED}
    folder, (rows, weights) = sharp
    assert [row["global_batch"] for row in rows[:6]] == [4, 4, 4, 8, 8, 8]
    exported = load_file(str(folder / "hf" / "model.safetensors"))
    for stage in (1, 2, 3):
        run_dir = tmp_path / f"zero{stage}"
        again, ends = trained(tree, run_dir, theirs(stage, *SHARP))
        assert_alike(again, rows)
        assert distance(weights, ends) < SAME
        hf = load_file(str(run_dir / "hf" / "model.safetensors"))
        assert distance(exported, hf) < SAME
        guesses = [json.loads((d / "fill_mask.json").read_text()) for d in (folder, run_dir)]
        assert guesses[0][0]["guesses"][0] == guesses[1][0]["guesses"][0]
        assert_same_parts(run_dir, folder, masters=0)


def assert_same_parts(run: Path, expected: Path, masters: int) -> None:
    """Of the newest checkpoints of two runs."""
    results = [read_contents(max((folder / "checkpoints").glob("step-*"))) for folder in (run, expected)]
    one, two = ({name: sorted(state) for name, state in contents.states.items()} for contents in results)
    assert one == two
    assert sum("master" in state for state in results[0].states.values()) == masters
    assert results[0].aliases == results[1].aliases
    assert results[0].weights.keys() == results[1].weights.keys()
    names = [[group["names"] for group in contents.groups] for contents in results]
    assert names[0] == names[1]


def test_ratios_of_partitions_would_show(
    tree: dict[str, Any], tmp_path: Path, sharp: tuple[Path, Ended]
) -> None:
    """In the steps of the test above."""
    rows, weights = sharp[1]
    wrong, ends = trained(tree, tmp_path / "naive", theirs(3, *SHARP), naive=True)
    worst = max(abs(a - b) / b for a, b in zip(losses(wrong), losses(rows), strict=True))
    assert worst > 50 * SAME
    assert distance(weights, ends) > 1000 * SAME


BF16 = ["speed.precision=bf16", "batch.max_micro_batch=2"]
AUTOCAST = ["speed.precision=bf16_autocast", "optimizer.bucket_mb=0.01"]
SWITCHES: dict[str, tuple[int, list[str], float]] = {
    # (ZeRO stage, settings, tolerance): what bf16 rounds differs with the order of sums
    "bf16, stage 3": (3, BF16, 2e-4),
    "autocast, stage 2, small buckets": (2, AUTOCAST, SAME),
    "next sentences, recomputed, dropped out, patterns anchored at BERT's own names": (
        3,
        [
            *("data.nsp=true", "speed.activation_checkpointing=true", "model.dropout=0.1"),
            *("optimizer.exclude_from_weight_decay=['^bert\\.']", "optimizer.weight_decay=0.3"),
        ],
        SAME,
    ),
    "settings that win over the variant": (
        1,
        ["optimizer.variant=deepspeed", "optimizer.bias_correction=true", "optimizer.max_grad_norm=0.3"],
        SAME,
    ),
}


@pytest.mark.parametrize("switch", SWITCHES)
def test_settings_mean_the_same(tree: dict[str, Any], tmp_path: Path, switch: str) -> None:
    stage, settings, tolerance = SWITCHES[switch]
    settings = [*settings, "phases.0.steps=3"]
    rows, weights = trained(tree, tmp_path / "ours", ours(*settings))
    again, ends = trained(tree, tmp_path / "theirs", theirs(stage, *settings))
    assert len(losses(again)) == 3
    assert losses(again) == pytest.approx(losses(rows), rel=tolerance)
    assert [row["grad_norm"] for row in again[:-1]] == pytest.approx(
        [row["grad_norm"] for row in rows[:-1]], rel=10 * tolerance
    )
    assert {w.dtype for w in ends.values()} == {w.dtype for w in weights.values()}
    assert distance(weights, ends) < 10 * tolerance
    if settings[0] == "speed.precision=bf16":
        assert_same_parts(tmp_path / "theirs", tmp_path / "ours", masters=26)


PHASES = (
    "phases=[{steps: 3, global_batch: 12, sequence_length: 32, lr: 0.01, warmup_fraction: 0.2}, "
    "{steps: 3, global_batch: 6, sequence_length: 16, lr: 0.01, warmup_fraction: 0.2}]"
)
MOVES = {  # (up to this step, on so many ranks, how); the first move is of the whole run's checkpoint of step 1 or 2,
    # the second phase begins after step 3
    "fp32": [
        (2, 2, theirs(3)),
        (4, 1, theirs(2)),
        (5, 3, theirs(1)),
        (6, 2, ours()),
    ],
    "bf16": [(4, 2, ours()), (6, 2, theirs(1))],
}


@pytest.mark.parametrize("precision", MOVES)
def test_a_run_moves_between_ways_of_sharding(tree: dict[str, Any], tmp_path: Path, precision: str) -> None:
    shape = [PHASES, f"speed.precision={precision}"]
    begun = 1 if precision == "fp32" else 2
    whole = ours() if precision == "fp32" else theirs(3)
    rows, weights = trained(tree, tmp_path / "whole", [*whole, *shape, f"checkpoint.every_steps={begun}"])
    run_dir = shutil.copytree(tmp_path / "whole", tmp_path / "moved")
    _forget_after(run_dir, begun)
    for stop, world, way in MOVES[precision]:
        settings = [*way, *shape, f"checkpoint.every_steps={stop}"]
        again, ends = trained(tree, run_dir, settings, world=world, resume="auto")
        _forget_after(run_dir, stop)
        kept = run_dir / "checkpoints" / f"step-{stop:08d}"
        contents = read_contents(kept)
        assert contents.optimizer["skipped_steps"] == (0 if stop == MOVES[precision][0][0] else 3)
        write_contents(kept, replace(contents, optimizer={**contents.optimizer, "skipped_steps": 3}))
    tolerance = SAME if precision == "fp32" else 2e-4
    assert losses(again) == pytest.approx(losses(rows), rel=tolerance)
    assert distance(weights, ends) < 10 * tolerance


def _forget_after(run_dir: Path, step: int) -> None:
    for saved in (run_dir / "checkpoints").glob("step-*"):
        if int(saved.name.removeprefix("step-")) > step:
            shutil.rmtree(saved)


def test_a_phase_started_from_a_checkpoint_counts_steps_anew(
    tree: dict[str, Any], tmp_path: Path, sharp: tuple[Path, Ended]
) -> None:
    start = max((sharp[0] / "checkpoints").glob("step-*"))
    rows, weights = trained(tree, tmp_path / "ours", ours(f"start_from={start}"))
    again, ends = trained(tree, tmp_path / "theirs", theirs(2, f"start_from={start}"))
    assert_alike(again, rows)
    saved = read_contents(tmp_path / "theirs" / "checkpoints" / "step-00000006").states
    assert {float(state["step"]) for state in saved.values()} == {6.0}
    assert distance(weights, ends) < SAME


def test_evaluation_goes_together_where_batches_do_not_divide(tree: dict[str, Any], tmp_path: Path) -> None:
    """3 ranks, 4 batches: under ZeRO 3 a rank that stayed out of forward would leave the others waiting."""
    shape = ["phases.0.steps=1", "phases.0.max_micro_batch=4", "log.heldout_batches=4"]
    rows, _ = trained(tree, tmp_path / "alone", ours(*shape), world=1)
    again, _ = trained(tree, tmp_path / "zero3", theirs(3, *shape), world=3)
    for key in ("heldout_loss", "heldout_accuracy"):
        assert again[-1][key] == pytest.approx(rows[-1][key], rel=1e-5)


def written(folder: Path, sections: dict[str, Any]) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "ds_config.json"
    path.write_text(json.dumps(sections))
    return f"deepspeed.config={path}"


def test_sections_of_a_file_are_taken_over(tree: dict[str, Any], tmp_path: Path) -> None:
    sections = {
        "zero_optimization": {"offload_optimizer": {"device": "cpu"}, "round_robin_gradients": True},
        "communication_data_type": "bf16",
    }
    config = build_config(tree, theirs(2, written(tmp_path, sections)))
    merged = ds_config(config, 2)
    assert merged["zero_optimization"] == {
        **ds_config(build_config(tree, theirs(2)), 2)["zero_optimization"],
        **sections["zero_optimization"],
    }
    assert merged["communication_data_type"] == "bf16"
    assert merged["optimizer"]["type"] == "ShardedLamb"
    short = "phases.0.steps=3"
    rows, _ = trained(tree, tmp_path / "fp32 on the wire", theirs(2, short))
    again, _ = trained(tree, tmp_path / "bf16 on the wire", theirs(2, short, written(tmp_path, sections)))
    assert losses(again) == pytest.approx(losses(rows), rel=1e-3)
    assert losses(again) != losses(rows), "communication_data_type had no effect"


def test_the_recipes_settings_reach_deepspeed(tree: dict[str, Any]) -> None:
    def made(*overrides: str) -> dict[str, Any]:
        return ds_config(build_config(tree, theirs(2, *overrides)), 2)

    config = made("optimizer.bucket_mb=1", "batch.max_micro_batch=2", "optimizer.max_grad_norm=0.5")
    assert config["zero_optimization"] == {
        "stage": 2,
        "reduce_bucket_size": 2**18,
        "allgather_bucket_size": 2**18,
    }
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (2, 3)
    assert config["gradient_clipping"] == 0.5
    assert made("optimizer.max_grad_norm=null")["gradient_clipping"] == 0.0
    assert "data_types" not in config
    assert made("speed.precision=bf16")["data_types"] == {"grad_accum_dtype": "fp32"}


@pytest.mark.parametrize("key", DECIDED)
def test_sections_that_the_recipe_decides_are_refused(tree: dict[str, Any], tmp_path: Path, key: str) -> None:
    config = build_config(tree, theirs(2, written(tmp_path, {key: 1})))
    with pytest.raises(ValueError, match=f"ds_config.json'?: '{key}' is the recipe's to decide") as error:
        describe(config, 2)
    named = DECIDED[key].split(":")[0].split(",")[0].split(" and ")[0].replace(".N.", ".0.")
    assert _has_setting(config, named), f"{named} in the remedy is no setting"
    assert DECIDED[key] in str(error.value)


def _has_setting(config: RunConfig, dotted: str) -> bool:
    value: Any = config
    for part in dotted.split("."):
        value = value[int(part)] if part.isdigit() else getattr(value, part, None)
        if value is None:
            return False
    return True


@pytest.mark.parametrize(
    ("sections", "overrides", "message"),
    [
        ({"bf16": {"enabled": True}}, [], r"bf16\.enabled=True beside speed\.precision='fp32'"),
        (
            {"bf16": {"enabled": False}},
            ["speed.precision=bf16"],
            r"bf16\.enabled=False beside speed\.precision='bf16'",
        ),
        ({"fp16": {"enabled": True}}, [], r"fp16\.enabled=True .*set speed\.precision to bf16"),
        ({"zero_optimization": {"stage": 3}}, [], r"stage=3 beside deepspeed\.zero_stage=2"),
        ({"zero_optimization": True}, [], r"zero_optimization=True: expected an object"),
    ],
)
def test_contradictions_are_refused(
    tree: dict[str, Any], tmp_path: Path, sections: dict[str, Any], overrides: list[str], message: str
) -> None:
    config = build_config(tree, theirs(2, written(tmp_path, sections), *overrides))
    with pytest.raises(ValueError, match=message):
        describe(config, 2)


def test_what_agrees_is_no_contradiction(tree: dict[str, Any], tmp_path: Path) -> None:
    sections = {"bf16": {"enabled": True, "check_grad_overflow": True}, "zero_optimization": {"stage": 2}}
    config = build_config(tree, theirs(2, written(tmp_path, sections), "speed.precision=bf16"))
    assert ds_config(config, 2)["bf16"] == sections["bf16"]


def test_a_file_that_is_none_is_refused(tree: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "list.json").write_text("[]")
    for name, message in (
        ("absent.json", "No such file"),
        ("broken.json", "not valid JSON"),
        ("list.json", "expected an object of sections, found list"),
    ):
        config = build_config(tree, theirs(2, f"deepspeed.config={tmp_path / name}"))
        with pytest.raises(ValueError, match=rf"deepspeed\.config='.*{name}': {message}"):
            describe(config, 2)


def test_refusals_reach_every_rank(tree: dict[str, Any], tmp_path: Path) -> None:
    for overrides, message in (
        ([written(tmp_path, {"scheduler": {}})], "phases.N.lr, phases.N.warmup_fraction"),
        (["optimizer.variant=lmb"], "optimizer.variant='lmb': expected one of"),
    ):
        failed = run_ranks_expecting_errors(
            2, train, tree, str(tmp_path / "run"), theirs(2, *overrides), None, False
        )
        assert all(kind == "ValueError" and message in text for kind, text in failed.values()), failed


def test_dry_run_counts_what_is_cut(tree: dict[str, Any]) -> None:
    def bytes_of(*overrides: str) -> int:
        line = next(
            line for line in describe(build_config(tree, overrides), 4).splitlines() if "memory" in line
        )
        return int(line.split(" MiB")[0].split()[-1].replace(",", ""))

    large = ["model.hidden_size=256", "model.layers=4"]
    sizes = [bytes_of(*theirs(stage, *large)) for stage in (1, 2, 3)]
    assert sizes[0] > sizes[1] > sizes[2]


def test_the_way_of_sharding_is_no_part_of_what_is_trained(tree: dict[str, Any]) -> None:
    digests = {
        build_config(tree, way).digest() for way in (ours(), theirs(1), theirs(3, "deepspeed.config=x"))
    }
    assert len(digests) == 1
