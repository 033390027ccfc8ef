"""Every variant reaches the optimizer as it is, however the recipe shards, and settings that are left out stay out."""

import importlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from sharded_lamb.bert.config import build_config, load_config
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.model import build_bert
from sharded_lamb.bert.train import run
from sharded_lamb.bert.train_backend import build_backend
from sharded_lamb.core.hyperparams import GROUP_OPTIONS
from sharded_lamb.recipes.training import picture
from sharded_lamb.recipes.training.config_io import dump_config, read_yaml
from sharded_lamb.recipes.training.ranks import Ranks
from tests.harness import run_ranks
from tests.oracle import VARIANT_FACTS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
TWINS = sorted(CONFIGS.glob("*-adamw.yaml"))
WAYS = ("zero2", "ddp+zero1", "fsdp2", "deepspeed")
SMALL = [
    "model={hidden_size: 16, layers: 1, heads: 2, intermediate_size: 32, max_positions: 512}",
    "speed.precision=fp32",
    "speed.compile=false",
]
DECAY_PATTERNS = (r"bias$", r"LayerNorm")
ADAPTATION = {None: (), "decay patterns": None, "everything": ("all",)}


def expected(variant: str, **explicit: Any) -> dict[str, Any]:
    """What the variant's source does, and BERT's own values."""
    facts = dict(VARIANT_FACTS[variant])
    excluded = ADAPTATION[facts.pop("adaptation_excludes")]
    return {
        **facts,
        "exclude_from_layer_adaptation": excluded,
        "exclude_from_weight_decay": DECAY_PATTERNS,
        "max_grad_norm": 1.0,
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "weight_decay": 0.01,
        **explicit,
    }


# name -> (settings beside the quickstart's, what must reach the optimizer)
CASES: dict[str, tuple[list[str], dict[str, Any]]] = {
    **{name: ([f"optimizer.variant={name}"], expected(name)) for name in VARIANT_FACTS},
    "adamw, with a ratio on all but the head": (
        ["optimizer.variant=adamw", "optimizer.exclude_from_layer_adaptation=['^cls']"],
        expected("adamw", exclude_from_layer_adaptation=("^cls",)),
    ),
    "adamw, with every ratio": (
        ["optimizer.variant=adamw", "optimizer.exclude_from_layer_adaptation=[]"],
        expected("adamw", exclude_from_layer_adaptation=()),
    ),
    "lamb, ratios as decay": (
        ["optimizer.exclude_from_layer_adaptation=null"],
        expected("lamb", exclude_from_layer_adaptation=None),
    ),
    "tfa, with every ratio": (
        ["optimizer.variant=tfa", "optimizer.exclude_from_layer_adaptation=[]"],
        expected("tfa", exclude_from_layer_adaptation=()),
    ),
    "apex, otherwise": (
        [
            "optimizer={variant: apex, betas: [0.8, 0.9], eps: 1e-5, weight_decay: 0.2, max_grad_norm: null, "
            "exclude_from_weight_decay: ['bias$'], adapt_without_decay: true, bias_correction: false}"
        ],
        expected(
            "apex",
            betas=(0.8, 0.9),
            eps=1e-5,
            weight_decay=0.2,
            max_grad_norm=None,
            exclude_from_weight_decay=("bias$",),
            adapt_without_decay=True,
            bias_correction=False,
        ),
    ),
}


def micro_batch() -> MicroBatch:
    rows = np.random.default_rng(1).integers(2, 64, (2, 8))
    rows[:, 0] = 1
    chosen = np.zeros_like(rows, dtype=bool)
    chosen.ravel()[[3, 5, 11]] = True
    return MicroBatch.of(rows, chosen, rows, None, np.array([0, 1]), pad=0, cls=1)


def stepped(config: Any) -> tuple[dict[str, Any], dict[str, float]]:
    """(options in the optimizer, its trust ratios) after a step of a small BERT."""
    vocabulary: Any = SimpleNamespace(size=64, pad=0)
    backend: Any = build_backend(config, build_bert(config, vocabulary), 1)
    backend.accumulate(micro_batch(), torch.tensor([1 / 3, 1 / 2]), last=True, entered=lambda _: None)
    backend.step(0.01)
    optimizer = backend._lamb if config.parallel == "deepspeed" else backend.optimizer
    (group,) = optimizer.param_groups
    options = {name: group[name] for name in (*GROUP_OPTIONS, "betas", "eps", "weight_decay")}
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    options["max_grad_norm"] = optimizer.max_grad_norm
    ratios = {name: own.ratio for name, own in backend.layer_norms().items()}
    backend.close()
    return options, ratios


def steps_of(
    rank: int, way: str, cases: dict[str, tuple[str, list[str]]]
) -> dict[str, tuple[dict[str, Any], dict[str, float]]]:
    torch.set_num_threads(1)
    groups = None
    if way == "deepspeed":
        import deepspeed
        from deepspeed.utils import groups

        deepspeed.logger.setLevel("ERROR")
        importlib.reload(groups)  # an earlier case of other tests may have left its process groups there
    results = {}
    for name, (file, settings) in cases.items():
        torch.manual_seed(1)
        results[name] = stepped(load_config(file, [*SMALL, f"parallel={way}", *settings]))
    if groups is not None:
        importlib.reload(groups)
    return results


@pytest.mark.parametrize("way", WAYS)
def test_a_variant_is_the_same_however_it_is_sharded(way: str) -> None:
    if way == "deepspeed":
        pytest.importorskip("deepspeed")
    quickstart = str(CONFIGS / "bert-quickstart.yaml")
    cases = {name: (quickstart, settings) for name, (settings, _) in CASES.items()}
    twins = {path.stem: (str(path), []) for path in TWINS}
    assert len(twins) == 5
    (results,) = run_ranks(1, steps_of, way, {**cases, **twins}, timeout=300)
    for name, (_, options) in CASES.items():
        assert results[name][0] == options, name
    for name in twins:
        assert results[name][0] == expected("adamw"), name
        assert set(results[name][1].values()) == {1.0}, name
    assert set(results["adamw"][1].values()) == {1.0}
    for name in ("lamb", "adamw, with every ratio"):
        assert 1.0 not in {r for n, r in results[name][1].items() if n.endswith("weight")}, name
    undecayed = {r for n, r in results["tfa"][1].items() if n.endswith("bias") or "LayerNorm" in n}
    assert undecayed == {1.0}
    assert len(set(results["tfa"][1].values())) > len(undecayed)


def train(rank: int, tree: dict[str, Any], overrides: list[str]) -> None:
    torch.set_num_threads(1)
    groups = None
    if "parallel=deepspeed" in overrides:
        import deepspeed
        from deepspeed.utils import groups

        deepspeed.logger.setLevel("ERROR")
        importlib.reload(groups)
    with mock.patch.object(picture, "draw_run"):  # drawing takes as long as training
        run(build_config(tree, overrides), None, Ranks.start())
    torch.distributed.barrier()
    if groups is not None:
        importlib.reload(groups)


@pytest.mark.parametrize("way", WAYS)
def test_the_twin_of_the_quickstart_trains_without_ratios(
    tree: dict[str, Any], tmp_path: Path, way: str
) -> None:
    if way == "deepspeed":
        pytest.importorskip("deepspeed")
    twin = {
        **read_yaml(CONFIGS / "bert-quickstart-adamw.yaml"),
        **{name: tree[name] for name in ("model", "tokenizer", "data", "phases")},
        "run_dir": str(tmp_path),
        "log": {"trust_ratio_steps": 1},
    }
    overrides = [f"parallel={way}", "phases.0.steps=2", "checkpoint.every_steps=9"]
    run_ranks(2, train, twin, overrides, timeout=300)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    steps = [row for row in rows if "trust_ratio_quantiles" in row]
    assert len(steps) == 2
    for row in steps:
        assert set(row["trust_ratio_quantiles"]) == {1.0}
        assert set(row["trust_ratio_by_layer"].values()) == {1.0}


def test_what_is_left_out_is_no_keyword(tree: dict[str, Any]) -> None:
    settings = build_config(tree).optimizer
    own = {"variant", "betas", "eps", "weight_decay", "max_grad_norm", "exclude_from_weight_decay"}
    assert set(settings.keywords()) == own
    said = ["optimizer.exclude_from_layer_adaptation=null", "optimizer.bias_correction=false"]
    keywords = build_config(tree, said).optimizer.keywords()
    assert keywords["exclude_from_layer_adaptation"] is None
    assert keywords["bias_correction"] is False
    assert "adapt_without_decay" not in keywords


@pytest.mark.parametrize("value", ["variant", "null", "[]", "['^cls']"])
def test_the_resolved_configuration_keeps_what_is_left_out(tree: dict[str, Any], value: str) -> None:
    import yaml

    config = build_config(tree, [f"optimizer.exclude_from_layer_adaptation={value}"])
    assert build_config(yaml.safe_load(dump_config(config))) == config


def test_a_variant_nobody_knows_is_refused_before_training(tree: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"optimizer\.variant='lmb': expected one of adamw, apex, "):
        build_config(tree, ["optimizer.variant=lmb"])
    with pytest.raises(ValueError, match=r"optimizer\.exclude_from_layer_adaptation"):
        build_config(tree, ["optimizer.exclude_from_layer_adaptation=all"])


# Before exclude_from_layer_adaptation could be left out, runs had these digests.
BEFORE = {
    "bert-base": "cf73939de7a494c9",
    "bert-large-64k-paper": "42eec5c42f8dac0e",
    "bert-large-phase1": "3bebdc42dededaec",
    "bert-large-phase2": "1cda977975fe27f3",
    "bert-quickstart": "ff4ab29e7c1d7666",
}
BEFORE_AS_LAMB = {"adamw": "ddb023daa3a10d89", "tfa": "5faeaaed98d3b275"}


@pytest.mark.parametrize("name", BEFORE)
def test_runs_of_other_variants_keep_their_digest(name: str) -> None:
    assert load_config(CONFIGS / f"{name}.yaml").digest() == BEFORE[name]


@pytest.mark.parametrize("variant", BEFORE_AS_LAMB)
def test_what_trained_lamb_under_another_name_has_another_digest(variant: str) -> None:
    named = [f"optimizer.variant={variant}"]
    file = CONFIGS / "bert-quickstart-adamw.yaml"
    assert load_config(file, named).digest() != BEFORE_AS_LAMB[variant]
    as_it_was = [*named, "optimizer.exclude_from_layer_adaptation=[]"]
    assert load_config(file, as_it_was).digest() == BEFORE_AS_LAMB[variant]


def test_such_a_run_is_not_continued(tree: dict[str, Any], tmp_path: Path) -> None:
    named = ["optimizer.variant=adamw", "phases.0.steps=2", f"run_dir={tmp_path}"]
    as_it_was = [*named, "optimizer.exclude_from_layer_adaptation=[]"]
    assert run_ranks(1, resumed, tree, as_it_was, None) == ["trained"]
    (said,) = run_ranks(1, resumed, tree, named, "auto")
    assert "with other settings" in said
    assert said.endswith("\n  optimizer.exclude_from_layer_adaptation: [] there, ('all',) now")
    shutil.rmtree(tmp_path / "checkpoints")


def resumed(rank: int, tree: dict[str, Any], overrides: list[str], resume: str | None) -> str:
    torch.set_num_threads(1)
    try:
        with mock.patch.object(picture, "draw_run"):
            run(build_config(tree, overrides), resume, Ranks.start())
    except ValueError as error:
        return str(error)
    return "trained"
