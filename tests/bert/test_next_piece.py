"""GPT-BERT's objectives: a piece is predicted at the position before it, in masked and in causal samples."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.bert import attention, train
from sharded_lamb.bert.attention import Documents, attend
from sharded_lamb.bert.config import build_config
from sharded_lamb.bert.data import BatchSource, MicroBatch
from sharded_lamb.bert.evaluate import fill_mask
from sharded_lamb.bert.model import Losses, build_bert
from sharded_lamb.bert.padding import PaddedLosses
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.shards import PackedSamples
from sharded_lamb.bert.tokenizer import load_tokenizer
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.stateless_rng import key_of
from tests.bert.conftest import LENGTH
from tests.bert.test_attention import documents_of, qkv
from tests.bert.test_data import source_of, split
from tests.bert.test_train import OFTEN, Ended, distance, losses, trained
from tests.bert.test_train import train as run_to_end
from tests.harness import RankErrors, run_ranks

MIXED = "masking.causal_fraction=0.4"
INDICES = np.arange(24)


def mixed_source(tree: dict[str, Any], fraction: float | None, change: float = 0.0) -> BatchSource:
    source, _, _ = source_of(tree)
    source._masker = replace(source._masker, causal_fraction=fraction, change=change)
    return source


def dense_sums(theirs: Any, source: BatchSource, indices: Any) -> Tensor:
    """[2] masked and causal losses of Hugging Face's model: documents in rows, with a mask that a loop writes."""
    vocabulary, total = source._vocabulary, torch.zeros(2, dtype=torch.float64)
    rows = source.samples.rows(source.sample_numbers(indices))
    masked, chosen = source._masker(rows, indices)
    is_causal = source._masker.is_causal(indices)
    assert is_causal is not None
    for row, inputs, marks, causal in zip(rows, masked, chosen, is_causal, strict=True):
        begins = [i for i, piece in enumerate(row) if piece == vocabulary.cls]
        end = max(i for i, piece in enumerate(row) if piece != vocabulary.pad) + 1
        for first, last in zip(begins, [*begins[1:], end], strict=True):
            n = last - first
            sees = torch.zeros(n, n, dtype=torch.bool)
            for i in range(n):
                for j in range(n):
                    sees[i, j] = j <= i or not causal
            ids = torch.from_numpy((row if causal else inputs)[first:last])[None]
            logits = theirs(input_ids=ids, attention_mask=sees[None, None]).logits[0].float()
            for i in range(n - 1):  # position i predicts piece i + 1
                piece = int(row[first + i + 1])
                if marks[first + i + 1] or (causal and piece not in vocabulary.special):
                    total[int(causal)] += F.cross_entropy(logits[i], torch.tensor(piece)).double()
    return total


@pytest.fixture
def models(tree: dict[str, Any]) -> tuple[Any, Any]:
    """(the recipe's model, Hugging Face's with the same weights), in float64."""
    _, vocabulary, _ = source_of(tree)
    bert = build_bert(build_config(tree, ["model.layers=2"]), vocabulary).double()
    theirs = type(bert)(bert.config).double()
    theirs.load_state_dict(bert.state_dict())
    return bert, theirs.train()


@pytest.mark.parametrize("fraction", [0.0, 0.4, 1.0])
def test_losses_and_gradients_are_those_of_a_loop(
    tree: dict[str, Any], models: tuple[Any, Any], fraction: float
) -> None:
    (bert, theirs), source = models, mixed_source(tree, fraction)
    indices = INDICES[:8]
    batch = source.micro_batch(indices)
    ours, expected = Losses(bert, nsp=False)(batch), dense_sums(theirs, source, indices)
    torch.testing.assert_close(ours[:2].double(), expected, rtol=1e-6, atol=1e-6)
    assert ((expected > 0) == torch.tensor([fraction < 1, fraction > 0])).all()
    padded = PaddedLosses(bert, nsp=False)(batch)
    torch.testing.assert_close(padded, ours, rtol=1e-6, atol=1e-6)
    ours[:2].sum().backward()
    expected.sum().backward()
    for name, p in theirs.named_parameters():
        mine = bert.get_parameter(name).grad
        if p.grad is not None and p.grad.any():
            assert (mine - p.grad).norm() <= 1e-5 * p.grad.norm() + 1e-7, name


def test_a_later_token_changes_no_output_of_a_causal_document(
    tree: dict[str, Any], models: tuple[Any, Any]
) -> None:
    batch = mixed_source(tree, 0.4).micro_batch(INDICES)
    documents, bert = batch.documents, models[0].eval()
    assert documents.count > documents.causal_count > 0
    offsets = documents.offsets.tolist()
    changes = []
    for number in (
        documents.count - documents.causal_count - 1,
        documents.count - 1,
    ):  # the last of each kind
        begin, end = offsets[number : number + 2]
        tokens = batch.tokens.clone()
        tokens[end - 2] += 1 if tokens[end - 2] < 100 else -1
        with torch.no_grad():
            before, after = (
                Losses(bert, nsp=False)._hidden(each) for each in (batch, replace(batch, tokens=tokens))
            )
        same = (before == after).all(1)
        assert same[:begin].all()
        assert same[end:].all()
        changes.append(same[begin:end].tolist())
    assert not any(changes[0]), "a bidirectional document is causal"
    assert changes[1] == [True] * (len(changes[1]) - 2) + [False] * 2


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("lengths", [(16, 16, 16), (4, 9, 4, 9, 11)])
def test_parts_of_a_mixture_take_the_kernels_of_their_kind(
    lengths: tuple[int, ...], varlen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def flash(q: Tensor, k: Tensor, v: Tensor, documents: Documents, dropout: float) -> Tensor:
        taken.append((documents.is_causal, documents.offsets.tolist()))
        return v

    monkeypatch.setattr(attention, "varlen", flash)
    documents = Documents.of(np.array(lengths), 16, causal=len(lengths) - 2)
    documents = replace(documents, parts=tuple(replace(p, has_varlen=varlen) for p in documents.parts))
    tensors = qkv(documents, torch.bfloat16 if varlen else torch.float32)
    out = attend(*tensors, documents, 0.0)
    if varlen and not documents.are_full:
        assert taken == [(False, [0, 4, 13]), (True, [0, 4, 13, 24])]
        return
    assert not taken
    first = 0
    for number, length in enumerate(lengths):
        q, k, v = (x[first : first + length].transpose(0, 1) for x in tensors)
        scores = q @ k.transpose(1, 2) / q.shape[2] ** 0.5
        if number >= 2:
            scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        expected = (scores.softmax(2) @ v).transpose(0, 1)
        torch.testing.assert_close(
            out[first : first + length], expected, rtol=2e-2, atol=2e-2 if varlen else 1e-5
        )
        first += length


def test_the_flash_operator_takes_causal_documents() -> None:
    documents = replace(Documents.of(np.array([3, 5]), 16, causal=2), has_varlen=True)
    on_meta = replace(documents, offsets=documents.offsets.to("meta"))
    assert attend(*qkv(documents, torch.bfloat16, "meta", width=64), on_meta, 0.1).shape == (8, 2, 64)


def test_documents_count_what_attends() -> None:
    documents = Documents.of(np.array([4, 9, 4, 9, 11]), 16, causal=3)
    assert (documents.count, documents.causal_count, documents.tokens) == (5, 3, 37)
    assert documents.pairs == 4**2 + 9**2 + 10 + 45 + 66
    assert documents_of(3, 5).causal_count == 0
    assert Documents.of(np.array([3, 5]), 16, causal=2).pairs == 6 + 15


def kinds(batch: MicroBatch) -> list[tuple[bool, tuple[int, ...]]]:
    """(whether it is causal, its tokens) of every document."""
    first_causal = batch.documents.count - batch.documents.causal_count
    return sorted((n >= first_causal, tuple(d)) for n, d in enumerate(split(batch, batch.tokens)))


def test_draws_do_not_depend_on_ranks_accumulation_or_where_a_run_began(tree: dict[str, Any]) -> None:
    source = mixed_source(tree, 0.4, change=0.05)
    expected: list[Any] = []
    for world, micro, begin in ((1, 12, 0), (2, 4, 0), (3, 4, 2), (1, 1, 5)):
        ranks = [
            list(source.steps(BatchPlan(6, 12, world, micro, 12, 0), begin, rank)) for rank in range(world)
        ]
        steps = [
            sorted(document for data in datas for m in data.micro_batches for document in kinds(m))
            for datas in zip(*ranks, strict=True)
        ]
        expected = expected or steps
        assert steps == expected[begin:]
        samples = [sum(d.causal_samples for d in datas) for datas in zip(*ranks, strict=True)]
        assert sum(samples) == source._masker.is_causal(np.arange(12 * begin, 72)).sum()  # type: ignore[union-attr]
    share = source._masker.is_causal(np.arange(10_000)).mean()  # type: ignore[union-attr]
    assert abs(share - 0.4) < 5 * (0.4 * 0.6 / 10_000) ** 0.5
    for fraction in (0.0, 1.0):
        own = mixed_source(tree, fraction)._masker.is_causal(np.arange(1000))
        assert own is not None
        assert own.mean() == fraction


def test_without_it_masks_are_those_of_before_and_with_it_they_are_shifted(tree: dict[str, Any]) -> None:
    plain, shifted = (mixed_source(tree, fraction).micro_batch(INDICES) for fraction in (None, 0.0))
    assert torch.equal(plain.tokens, shifted.tokens)
    assert torch.equal(plain.labels, shifted.labels)
    assert torch.equal(plain.output_positions, shifted.output_positions + 1)
    assert (plain.causal_labels, shifted.causal_labels, plain.causal_samples) == (0, 0, 0)


def test_the_mask_probability_moves_linearly_over_all_phases(tree: dict[str, Any], tmp_path: Path) -> None:
    phases = "phases=[{steps: 6, global_batch: 4, sequence_length: 32}, {steps: 14, global_batch: 4}]"
    config = build_config(tree, [phases, "model.max_positions=128", "masking.final_probability=0.35"])
    vocabulary = source_of(tree)[1]
    for phase, steps in ((0, (0, 5)), (1, (6, 19))):
        masker = train.masker_of(config, phase, vocabulary, 1)
        assert masker.max_predictions == [12, 45][phase]  # 0.35 of the length, rounded up
        for step in steps:
            own = masker.at(step - steps[0])
            assert own.probability == pytest.approx(0.15 + 0.2 * step / 20)
    rows = source_of(tree)[0].samples.rows(np.arange(50))
    ordinary = ~np.isin(rows, vocabulary.special)
    for step in (0, 13):
        masker = train.masker_of(config, 1, vocabulary, 1).at(step)
        share = 0.15 + 0.01 * (6 + step)
        assert np.array_equal(masker(rows, np.arange(50))[1].sum(1), np.rint(ordinary.sum(1) * share))
    source = mixed_source(tree, None, change=0.05)
    source._masker = replace(source._masker, max_predictions=LENGTH)
    for data in source.steps(BatchPlan(3, 12, 1, 12, 12, 0), 0, 0):
        samples = source.samples.rows(source.sample_numbers(data.first_sample + np.arange(12)))
        share = 0.15 + 0.05 * data.step
        assert data.predicted == np.rint((~np.isin(samples, vocabulary.special)).sum(1) * share).sum()


def test_a_blank_is_filled_at_the_position_before_it(tree: dict[str, Any], models: tuple[Any, Any]) -> None:
    bert, theirs = models
    tokenizer = load_tokenizer(source_of(tree)[2] / "tokenizer")
    text = "the value of [MASK] is a"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    place = ids[0].tolist().index(tokenizer.mask_token_id)
    with torch.no_grad():
        chances = theirs.eval()(input_ids=ids).logits[0, :, : len(tokenizer)].float().softmax(1)
    for next_piece in (False, True):
        [row] = fill_mask(bert, tokenizer, (text,), next_piece=next_piece)
        best = chances[place - next_piece].topk(5)
        assert [guess["piece"] for guess in row["guesses"]] == tokenizer.convert_ids_to_tokens(
            best[1].tolist()
        )


RAMPED = [MIXED, "masking.final_probability=0.3"]


@pytest.fixture(scope="module")
def one_rank(tree: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Ended:
    return trained(1, tree, tmp_path_factory.mktemp("one"), *RAMPED)


@pytest.mark.parametrize("parallel", ["zero2", "ddp+zero1", "fsdp2", "deepspeed"])
def test_world_size_and_sharding_change_nothing(
    tree: dict[str, Any], tmp_path: Path, parallel: str, one_rank: Ended
) -> None:
    if parallel == "deepspeed":
        pytest.importorskip("deepspeed")
    rows, alone = one_rank
    again, weights = trained(2, tree, tmp_path, *RAMPED, f"parallel={parallel}", "batch.max_micro_batch=1")
    assert distance(alone, weights) < 1e-5
    for name in ("loss", "masked_loss", "causal_loss"):
        assert [r[name] for r in again[:-1]] == pytest.approx([r[name] for r in rows[:-1]], rel=1e-5)
    for name in ("heldout_loss", "heldout_causal_loss", "heldout_causal_accuracy"):
        assert again[-1][name] == pytest.approx(rows[-1][name], rel=1e-5)
    assert rows[-1]["heldout_loss"] != pytest.approx(rows[-1]["heldout_causal_loss"], rel=1e-3)


def test_objectives_are_weighted_by_samples_and_evaluated_apart(
    tree: dict[str, Any], tmp_path: Path, one_rank: Ended
) -> None:
    rows, weights = one_rank
    config, vocabulary = build_config(tree, RAMPED), source_of(tree)[1]
    folder = prepare(config, LENGTH)

    def source_with(split: str, *key: str | int, **changed: Any) -> BatchSource:
        own = key_of(config.seed, *key)
        masker = replace(train.masker_of(config, 0, vocabulary, key_of(own, "mask")), **changed)
        return BatchSource(PackedSamples(folder, split), vocabulary, masker, own)

    source, theirs = source_with("train", "train", 0), build_bert(config, vocabulary)
    masked, causal = dense_sums(theirs, source, np.arange(12))
    batch = source.micro_batch(np.arange(12))
    share = batch.causal_samples / 12
    means = masked / (len(batch.labels) - batch.causal_labels), causal / batch.causal_labels
    loss = (1 - share) * means[0] + share * means[1]
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in theirs.parameters() if p.grad is not None]).norm()
    assert 0 < share < 1
    assert rows[0]["masked_loss"] == pytest.approx(means[0].item(), rel=1e-5)
    assert rows[0]["causal_loss"] == pytest.approx(means[1].item(), rel=1e-5)
    assert rows[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert rows[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)

    for name, p in theirs.eval().named_parameters():
        p.data.copy_(weights[name])
    for name, fraction in (("heldout_loss", 0.0), ("heldout_causal_loss", 1.0)):
        changed = {"probability": 0.3, "change": 0.0, "causal_fraction": fraction}
        source = source_with("heldout", "heldout", 0, **changed)
        source.sample_numbers = lambda indices: indices  # type: ignore[method-assign]
        indices = np.arange(len(source.samples))
        with torch.no_grad():
            total = dense_sums(theirs, source, indices).sum()
        count = len(source.micro_batch(indices).labels)
        assert rows[-1][name] == pytest.approx(float(total) / count, rel=1e-5)


def killed(rank: int, tree: dict[str, Any], run_dir: str, overrides: list[str]) -> None:
    os.environ[faults.VARIABLE] = "kill@mid-backward:rank=1:step=3"
    faults.injector.cache_clear()  # an earlier case of this process may have read it
    run_to_end(rank, tree, run_dir, overrides)


def test_killed_and_resumed_a_run_ends_with_the_same_bits(tree: dict[str, Any], tmp_path: Path) -> None:
    overrides = [*RAMPED, "model.dropout=0.1", OFTEN]
    rows, whole = trained(2, tree, tmp_path / "whole", *overrides)
    with pytest.raises(RankErrors) as error:
        run_ranks(2, killed, tree, str(tmp_path / "killed"), overrides)
    assert error.value.errors[1].kind == "Died"
    assert [path.name for path in (tmp_path / "killed" / "checkpoints").glob("step-*")] == ["step-00000002"]
    again, weights = trained(2, tree, tmp_path / "killed", *overrides, resume="auto")
    assert all(torch.equal(weights[name], whole[name]) for name in whole)
    assert losses(again) == losses(rows)
    assert again[-1]["heldout_causal_loss"] == rows[-1]["heldout_causal_loss"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            ["masking.causal_fraction=1.5"],
            r"masking\.causal_fraction=1\.5: expected null or a number in \[0, 1\]",
        ),
        (
            ["masking.final_probability=0"],
            r"masking\.final_probability=0: expected null or a number in \(0, 1\)",
        ),
        ([MIXED, "data.nsp=true"], r"masking\.causal_fraction=0\.4: expected null with data\.nsp: true"),
    ],
)
def test_wrong_values_are_named(tree: dict[str, Any], override: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config(tree, override)


def test_runs_without_it_keep_their_digest(tree: dict[str, Any]) -> None:
    plain = build_config(tree, [])
    assert plain.trained_settings()["masking"] == {
        "probability": 0.15,
        "whole_word": False,
        "max_predictions": None,
    }
    for override in (MIXED, "masking.causal_fraction=0", "masking.final_probability=0.3"):
        assert build_config(tree, [override]).digest() != plain.digest()
