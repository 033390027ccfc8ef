from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharded_lamb.bert.batch import BatchPlan
from sharded_lamb.bert.config_io import build_config
from sharded_lamb.bert.data import BatchSource, MicroBatch
from sharded_lamb.bert.masking import Masker
from sharded_lamb.bert.model import Losses, build_bert, model_size
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.shards import PackedSamples
from sharded_lamb.bert.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from tests.bert.conftest import LENGTH


def source_of(
    tree: dict[str, Any], *, nsp: bool = False, key: int = 5
) -> tuple[BatchSource, Vocabulary, Path]:
    config = build_config({**tree, "data": {**tree["data"], "nsp": nsp}})
    folder = prepare(config, LENGTH)
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    masker = Masker(vocabulary, 0.15, config.max_predictions(config.phases[0]), False, key)
    return BatchSource(PackedSamples(folder, "train"), vocabulary, masker, key), vocabulary, folder


def same(a: MicroBatch, b: MicroBatch) -> bool:
    pairs = zip(vars(a).values(), vars(b).values(), strict=True)
    return all((x is None and y is None) or torch.equal(x, y) for x, y in pairs)


def test_every_epoch_sees_every_sample_once_in_an_order_of_its_own(tree: dict[str, Any]) -> None:
    source, _, _ = source_of(tree)
    total = len(source.samples)
    epochs = [source.sample_numbers(np.arange(total) + epoch * total) for epoch in range(3)]
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(total))
    assert not np.array_equal(epochs[0], epochs[1])
    across = source.sample_numbers(np.arange(total - 5, total + 5))
    assert np.array_equal(across, np.concatenate([epochs[0][-5:], epochs[1][:5]]))


@pytest.mark.parametrize("nsp", [False, True])
def test_batches_do_not_depend_on_world_size_accumulation_or_where_a_run_began(
    tree: dict[str, Any], nsp: bool
) -> None:
    source, _, _ = source_of(tree, nsp=nsp)
    expected: list[torch.Tensor] = []
    for world, micro, begin in ((1, 12, 0), (2, 4, 0), (3, 4, 2), (2, 5, 3), (1, 1, 5)):
        plan = BatchPlan(6, 12, world, micro, 12, 0)
        ranks = [list(source.steps(plan, begin, rank)) for rank in range(world)]
        tokens = [
            torch.cat([m.tokens for data in datas for m in data.micro_batches])
            for datas in zip(*ranks, strict=True)
        ]
        expected = expected or tokens
        assert len(tokens) == 6 - begin
        assert all(torch.equal(a, b) for a, b in zip(tokens, expected[begin:], strict=True))
        for datas in ranks:
            assert all(d.predicted == sum(len(m.labels) for m in d.micro_batches) for d in datas)
            assert [d.first_sample for d in datas] == [12 * step for step in range(begin, 6)]


def test_another_seed_gives_another_order(tree: dict[str, Any]) -> None:
    one, two = (source_of(tree, key=key)[0].micro_batch(np.arange(12)) for key in (5, 6))
    again = source_of(tree, key=5)[0].micro_batch(np.arange(12))
    assert same(one, again)
    assert not torch.equal(one.tokens, two.tokens)


def test_labels_are_what_stood_at_the_predicted_places(tree: dict[str, Any]) -> None:
    source, vocabulary, _ = source_of(tree)
    numbers = np.arange(40)
    batch = source.micro_batch(numbers)
    rows = torch.from_numpy(source.samples.rows(source.sample_numbers(numbers)))
    assert torch.equal(rows.flatten()[batch.masked_positions], batch.labels)
    untouched = torch.ones(rows.numel(), dtype=torch.bool)
    untouched[batch.masked_positions] = False
    assert torch.equal(rows.flatten()[untouched], batch.tokens.flatten()[untouched])
    assert not torch.isin(batch.labels, torch.tensor(vocabulary.special)).any()


def test_positions_begin_again_in_every_document(tree: dict[str, Any]) -> None:
    source, vocabulary, _ = source_of(tree)
    batch = source.micro_batch(np.arange(40))
    assert batch.documents is not None
    begins = torch.from_numpy(source.samples.rows(source.sample_numbers(np.arange(40)))) == vocabulary.cls
    assert (batch.positions[begins] == 0).all()
    inside = (batch.documents[:, 1:] == batch.documents[:, :-1]) & ~begins[:, 1:]
    assert (batch.positions[:, 1:] == batch.positions[:, :-1] + 1)[inside].all()
    assert batch.documents.max() > 1, "no row holds two documents, so this test shows nothing"


def test_attention_stays_inside_each_document(tree: dict[str, Any]) -> None:
    source, vocabulary, _ = source_of(tree)
    bert = build_bert(build_config(tree), vocabulary).eval()
    losses = Losses(bert, nsp=False)
    batch = source.micro_batch(np.arange(40))
    assert batch.documents is not None
    row = int((batch.documents == 2).any(1).nonzero()[0])

    def loss_of_second(tokens: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
        """The loss of everything in the second document of that row."""
        locations = (batch.documents[row] == 2).nonzero()[:, 0]
        labels = torch.full_like(locations, 77)
        positions = batch.positions[row : row + 1]
        with torch.no_grad():
            return losses(MicroBatch(tokens, None, positions, documents, locations, labels, None))[0]

    tokens, documents = batch.tokens[row : row + 1], batch.documents[row : row + 1]
    changed = torch.where(documents == 1, 99, tokens)
    assert torch.equal(loss_of_second(tokens, documents), loss_of_second(changed, documents))
    one = torch.ones_like(documents)
    assert not torch.equal(loss_of_second(tokens, one), loss_of_second(changed, one))


def test_next_sentences_are_replaced_half_of_the_time(tree: dict[str, Any]) -> None:
    source, vocabulary, _ = source_of(tree, nsp=True)
    count = min(2000, 8 * len(source.samples))
    indices = np.arange(count)
    batch = source.micro_batch(indices)
    own = torch.from_numpy(source.samples.rows(source.sample_numbers(indices)))
    assert batch.follows is not None
    assert batch.segments is not None
    assert abs(batch.follows.double().mean() - 0.5) < 5 * 0.5 / count**0.5
    rebuilt = batch.tokens.clone().flatten()
    rebuilt[batch.masked_positions] = batch.labels
    rebuilt = rebuilt.view_as(own)
    differs = (rebuilt != own).any(1)
    assert not differs[batch.follows == 0].any()
    assert differs[batch.follows == 1].double().mean() > 0.95
    assert ((rebuilt == vocabulary.sep).sum(1) == 2).all()
    real = rebuilt != vocabulary.pad
    a_side = (batch.segments == 0) & real
    assert torch.equal(rebuilt[a_side], own[a_side])
    assert (batch.segments[~real] == 0).all()
    assert (real.long().diff(dim=1) <= 0).all(), "padding is at the end only"


def test_an_empty_split_is_refused(tree: dict[str, Any]) -> None:
    config = build_config({**tree, "data": {**tree["data"], "heldout_fraction": 0.0}})
    folder = prepare(config, LENGTH)
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    with pytest.raises(ValueError, match="the heldout split holds no sample"):
        BatchSource(PackedSamples(folder, "heldout"), vocabulary, Masker(vocabulary, 0.15, 5, False, 1), 1)


@pytest.mark.parametrize("nsp", [False, True])
def test_the_loss_is_transformers_own_on_the_masked_places(tree: dict[str, Any], nsp: bool) -> None:
    source, vocabulary, _ = source_of(tree, nsp=nsp)
    config = build_config({**tree, "data": {**tree["data"], "nsp": nsp}})
    bert = build_bert(config, vocabulary).eval()
    batch = source.micro_batch(np.arange(8))
    labels = torch.full(batch.tokens.shape, -100).flatten()
    labels[batch.masked_positions] = batch.labels
    documents = batch.documents
    extra: dict[str, Any] = {"next_sentence_label": batch.follows} if nsp else {}
    mask = None if documents is None else documents[:, None, :, None] == documents[:, None, None, :]
    with torch.no_grad():
        ours = Losses(bert, nsp=nsp)(batch)
        theirs = bert(
            input_ids=batch.tokens,
            attention_mask=mask,
            token_type_ids=batch.segments,
            position_ids=batch.positions,
            labels=labels.view_as(batch.tokens),
            **extra,
        ).loss
    expected = ours[0] / len(batch.labels) + ours[1] / len(batch.tokens)
    assert torch.allclose(expected, theirs, rtol=1e-5)


def test_the_prediction_bias_starts_at_the_corpus_frequencies(tree: dict[str, Any]) -> None:
    source, vocabulary, folder = source_of(tree)
    config = build_config(tree, ["model.unigram_bias=true"])
    bert = build_bert(config, vocabulary, folder / "unigram.npy").eval()
    batch = source.micro_batch(np.arange(64))
    with torch.no_grad():
        loss = Losses(bert, nsp=False)(batch)[0] / len(batch.labels)
    entropy = source.samples.manifest.unigram_entropy
    assert abs(loss - entropy) < 0.25
    assert entropy < np.log(vocabulary.size) - 0.5


def test_the_flop_formula_counts_the_weights_that_are_multiplied(tree: dict[str, Any]) -> None:
    _, vocabulary, _ = source_of(tree)
    bert = build_bert(build_config(tree), vocabulary)
    size = model_size(bert)
    matrices = [p.numel() for n, p in bert.named_parameters() if p.ndim == 2 and "embeddings" not in n]
    body = sum(matrices) - size.hidden**2  # the head's own transform sees predicted places only
    assert size.flops(1, 0, 0) == 6 * body
    assert size.flops(0, 1, 0) == 6 * (size.hidden**2 + size.hidden * size.vocabulary)
    assert size.flops(1, 0, 10) - size.flops(1, 0, 0) == 12 * size.layers * 10 * size.hidden
