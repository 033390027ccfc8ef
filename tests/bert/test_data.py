from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sharded_lamb.bert.config import build_config
from sharded_lamb.bert.data import BatchSource, MicroBatch
from sharded_lamb.bert.masking import Masker
from sharded_lamb.bert.model import Losses, build_bert, model_size
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.shards import PackedSamples
from sharded_lamb.bert.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from sharded_lamb.recipes.training.batch import BatchPlan
from tests.bert.conftest import LENGTH


def source_of(
    tree: dict[str, Any], *, nsp: bool = False, key: int = 5
) -> tuple[BatchSource, Vocabulary, Path]:
    config = build_config({**tree, "data": {**tree["data"], "nsp": nsp}})
    folder = prepare(config, LENGTH)
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    masker = Masker(vocabulary, 0.15, config.max_predictions(config.phases[0]), False, key)
    return BatchSource(PackedSamples(folder, "train"), vocabulary, masker, key), vocabulary, folder


def split(batch: MicroBatch, values: torch.Tensor) -> list[list[int]]:
    """[T] values by document."""
    offsets = batch.documents.offsets.tolist()
    return [values[begin:end].tolist() for begin, end in pairwise(offsets)]


def originals(batch: MicroBatch) -> torch.Tensor:
    """[T] tokens without masks."""
    tokens = batch.tokens.clone()
    tokens[batch.output_positions] = batch.labels
    return tokens


def documents_in(rows: Any, vocabulary: Vocabulary) -> list[list[int]]:
    """The documents in [B, L] rows, in no order: `[CLS] … [SEP]` each, without padding."""
    found: list[list[int]] = []
    for piece in rows.ravel().tolist():
        if piece == vocabulary.cls:
            found.append([])
        if piece != vocabulary.pad:
            found[-1].append(piece)
    return sorted(found)


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
    expected: list[list[list[int]]] = []
    for world, micro, begin in ((1, 12, 0), (2, 4, 0), (3, 4, 2), (2, 5, 3), (1, 1, 5)):
        plan = BatchPlan(6, 12, world, micro, 12, 0)
        ranks = [list(source.steps(plan, begin, rank)) for rank in range(world)]
        tokens = [
            sorted(document for data in datas for m in data.micro_batches for document in split(m, m.tokens))
            for datas in zip(*ranks, strict=True)
        ]
        expected = expected or tokens
        assert len(tokens) == 6 - begin
        assert tokens == expected[begin:]
        for datas in ranks:
            assert all(d.predicted == sum(len(m.labels) for m in d.micro_batches) for d in datas)
            assert [d.first_sample for d in datas] == [12 * step for step in range(begin, 6)]


def test_another_seed_gives_another_order(tree: dict[str, Any]) -> None:
    one, two = (source_of(tree, key=key)[0].micro_batch(np.arange(12)) for key in (5, 6))
    again = source_of(tree, key=5)[0].micro_batch(np.arange(12))
    assert split(one, one.tokens) == split(again, again.tokens)
    assert torch.equal(one.output_positions, again.output_positions)
    assert sorted(split(one, one.tokens)) != sorted(split(two, two.tokens))


def test_labels_are_what_stood_at_the_predicted_places(tree: dict[str, Any]) -> None:
    source, vocabulary, _ = source_of(tree)
    numbers = np.arange(40)
    batch = source.micro_batch(numbers)
    rows = source.samples.rows(source.sample_numbers(numbers))
    assert sorted(split(batch, originals(batch))) == documents_in(rows, vocabulary)
    changed = batch.tokens != originals(batch)
    assert changed.any()
    assert torch.isin(changed.nonzero()[:, 0], batch.output_positions).all()
    assert not torch.isin(batch.labels, torch.tensor(vocabulary.special)).any()


def test_documents_lie_one_after_another_the_shortest_first_without_padding(tree: dict[str, Any]) -> None:
    source, vocabulary, _ = source_of(tree)
    batch = source.micro_batch(np.arange(40))
    lengths = [len(document) for document in split(batch, batch.tokens)]
    assert lengths == sorted(lengths)
    assert [(lengths.count(n), n) for n in sorted(set(lengths))] == list(batch.documents.groups)
    assert batch.documents.count == len(lengths) > 40, (
        "no row holds two documents, so this test shows nothing"
    )
    assert batch.documents.pairs == sum(n * n for n in lengths)
    assert split(batch, batch.positions) == [list(range(n)) for n in lengths]
    for document in split(batch, originals(batch)):
        assert (document[0], document[-1]) == (vocabulary.cls, vocabulary.sep)
        assert vocabulary.pad not in document
    assert not batch.documents.are_full
    full = source.samples.rows(np.arange(len(source.samples)))
    full = full[(full != vocabulary.pad).all(1) & ((full == vocabulary.cls).sum(1) == 1)][:3]
    none = np.zeros_like(full, dtype=bool)
    one = MicroBatch.of(full, none, full, None, None, pad=vocabulary.pad, cls=vocabulary.cls)
    assert len(full)
    assert one.documents.are_full


def test_next_sentences_are_replaced_half_of_the_time(tree: dict[str, Any]) -> None:
    source, vocabulary, _ = source_of(tree, nsp=True)
    count = min(2000, 8 * len(source.samples))
    indices = np.arange(count)
    batch = source.micro_batch(indices)
    own = source.samples.rows(source.sample_numbers(indices))
    assert batch.follows is not None
    assert abs(batch.follows.double().mean() - 0.5) < 5 * 0.5 / count**0.5
    pieces, segments = split(batch, originals(batch)), split(batch, batch.segments)
    kept = {tuple(document) for document in documents_in(own, vocabulary)}
    differs = [tuple(document) not in kept for document in pieces]
    replaced = batch.follows.tolist()
    assert not any(d for d, r in zip(differs, replaced, strict=True) if not r)
    assert sum(d for d, r in zip(differs, replaced, strict=True) if r) > 0.95 * sum(replaced)
    beginnings = {document[: document.index(vocabulary.sep) + 1] for document in kept}
    for document, segment in zip(pieces, segments, strict=True):
        assert document.count(vocabulary.sep) == 2
        a_side = document.index(vocabulary.sep) + 1
        assert segment == [0] * a_side + [1] * (len(document) - a_side)
        assert tuple(document[:a_side]) in beginnings


def test_an_empty_split_is_refused(tree: dict[str, Any]) -> None:
    config = build_config({**tree, "data": {**tree["data"], "heldout_fraction": 0.0}})
    folder = prepare(config, LENGTH)
    vocabulary = vocabulary_of(load_tokenizer(folder / "tokenizer"))
    with pytest.raises(ValueError, match="the heldout split holds no sample"):
        BatchSource(PackedSamples(folder, "heldout"), vocabulary, Masker(vocabulary, 0.15, 5, False, 1), 1)


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
