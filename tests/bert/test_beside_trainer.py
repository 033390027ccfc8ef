"""The comparison with Hugging Face's Trainer: every way computes the same loss, and the report is whole."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sharded_lamb.bert import beside_trainer
from sharded_lamb.bert.config import build_config
from sharded_lamb.bert.model import build_bert, hf_config
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.tokenizer import load_tokenizer, vocabulary_of
from sharded_lamb.recipes.training.ranks import Ranks
from tests.bert.conftest import LENGTH
from tests.bert.test_command import call_main, write_config
from tests.harness import run_ranks
from tests.sharding.test_whole_states import begin_anew

pytest.importorskip("accelerate")
WAYS = ["the recipe", "rows", "every position", "torch", "rows, every position, torch", "Trainer"]
UNPACKED = (
    "data.pack=false"  # a row is a document, so that attention over rows and inside documents are the same
)


def test_every_way_computes_the_loss_of_hugging_faces_model(tree: dict[str, Any], tmp_path: Path) -> None:
    from transformers import BertForMaskedLM

    config = build_config(
        {**tree, "run_dir": str(tmp_path)}, [UNPACKED, "batch.max_micro_batch=5", "phases.0.steps=2"]
    )
    folder = prepare(config, LENGTH)
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    batches = beside_trainer._batches(config, folder, vocabulary, ranks)
    assert len({tuple(step[0].rows.flatten().tolist()) for step in batches}) == 2
    batch = batches[1][0]
    assert 0 < batch.real.sum() == len(batch.tokens) < batch.rows.numel()

    bert = build_bert(config, vocabulary).eval()
    stock: Any = BertForMaskedLM(hf_config(config.model, bert.config.vocab_size, vocabulary.pad)).eval()
    stock.load_state_dict(bert.state_dict())
    said = stock(input_ids=batch.rows, attention_mask=batch.real, labels=batch.row_labels)
    assert said.logits[batch.row_labels != -100].shape[0] == len(batch.labels)
    for in_rows in (True, False):
        for every in (True, False):
            losses = beside_trainer.ReplacedLosses(
                bert, autocast=False, in_rows=in_rows, every_position=every
            )
            torch.testing.assert_close(losses(batch)[0] / len(batch.labels), said.loss)


def run_trainer(rank: int, arguments: list[str]) -> tuple[int, str]:
    begin_anew()
    with mock.patch.object(beside_trainer, "ROUNDS", 2):
        outcome = call_main(rank, arguments)
    begin_anew()
    return outcome


def test_the_report_compares_every_way_and_rounds_agree(tree: dict[str, Any], tmp_path: Path) -> None:
    config = write_config(tree, tmp_path)
    overrides = [UNPACKED, "phases.0.steps=1", "batch.max_micro_batch=2"]
    assert run_ranks(2, run_trainer, ["trainer", "--config", str(config), *overrides]) == [(0, "")] * 2
    result = json.loads((tmp_path / "run" / "trainer.json").read_text())
    assert list(result["summary"]) == list(result["turns_s"]) == WAYS
    assert result["ranks"] == 2
    assert result["optimizer_of_trainer"] == "adamw_torch_fused"
    assert 0 < result["share_of_padding"] < 1
    for name, turns in result["turns_s"].items():
        assert len(turns) == 2
        assert min(turns) > 0
        assert result["summary"][name]["tokens_per_s"]["median"] > 0
    assert result["summary"]["Trainer"]["to_trainer"]["median"] == 1
    assert result["summary"]["the recipe"]["to_recipe"]["median"] == 1
    assert main_says_no_nsp(config)


def main_says_no_nsp(config: Path) -> bool:
    ((code, said),) = run_ranks(1, call_main, ["trainer", "--config", str(config), "data.nsp=true"])
    return code == 1 and "data.nsp=True: expected false" in said


def test_ratios_are_those_of_the_same_round() -> None:
    turns = {"the recipe": [1.0, 2.0, 4.0], "Trainer": [2.0, 6.0, 4.0]}
    summary = beside_trainer.summarize(turns, tokens=12)
    assert summary["the recipe"]["tokens_per_s"]["median"] == 6
    assert summary["the recipe"]["to_trainer"]["median"] == 2
    assert summary["Trainer"]["to_recipe"] == {"median": 0.5, "low": pytest.approx(5 / 12), "high": 0.75}


@pytest.mark.parametrize(("column", "name"), [(2, "bf16"), (3, "fp32"), (4, "fp32-4m")])
def test_the_readme_shows_the_measured_ratios(column: int, name: str) -> None:
    folder = Path(beside_trainer.__file__).parent
    result = json.loads((folder / "results" / f"trainer-{name}.json").read_text())
    table = (folder / "README.md").read_text().split("| | quickstart, bf16", 1)[1].split("\n\n", 1)[0]
    shown = [row.split("|")[column].strip() for row in table.splitlines()[2:]]
    measured = beside_trainer.summarize(result["turns_s"], tokens=1)
    assert shown == [f"{measured[way]['to_trainer']['median']:.2f}x" for way in WAYS[:-1]]
