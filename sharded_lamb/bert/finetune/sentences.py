"""Classes or numbers of one or two sentences: the model, its input, its loss and its scores."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.finetune.bag_of_words import bag_of_words, majority
from sharded_lamb.bert.finetune.encoder import Encoder
from sharded_lamb.bert.finetune.scores import scores
from sharded_lamb.bert.finetune.tasks import Dataset, Split
from sharded_lamb.bert.model import encode_documents
from sharded_lamb.bert.tokenizer import encode, vocabulary_of
from sharded_lamb.recipes.training.stateless_rng import I64

_EVALUATED = 128
"""Examples in a batch of the dev split."""


class Classifier(nn.Module):
    """Hugging Face's `BertForSequenceClassification` over documents without padding: [D, outputs] of D documents."""

    def __init__(self, encoder: Encoder, outputs: int, seed: int) -> None:
        from transformers import BertForSequenceClassification

        super().__init__()
        self.module: Any = encoder.with_head(BertForSequenceClassification, outputs, seed)

    def forward(self, batch: MicroBatch) -> Tensor:
        hidden = encode_documents(self.module.bert, batch)
        first = hidden.index_select(0, batch.documents.offsets[:-1])
        pooled = self.module.bert.pooler(first[:, None])
        out: Tensor = self.module.classifier(self.module.dropout(pooled))
        return out


class Examples:
    """A split as pieces: `[CLS] first [SEP]`, or `[CLS] first [SEP] second [SEP]`, cut to ``max_length``."""

    def __init__(self, split: Split, tokenizer: Any, max_length: int) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        columns = [list(encode(tokenizer, list(texts))) for texts in zip(*split.texts, strict=True)]
        shape = (len(split), max_length)
        self._rows = np.full(shape, self._vocabulary.pad, np.int64)
        self._segments = np.zeros(shape, np.int64)
        self.cut = 0  # examples that lost pieces
        for number, parts in enumerate(zip(*columns, strict=True)):
            kept = longest_first(parts, max_length - 1 - len(parts))
            self.cut += kept != list(parts)
            pieces = [self._vocabulary.cls]
            for segment, part in enumerate(kept):
                self._segments[number, len(pieces) : len(pieces) + len(part) + 1] = segment
                pieces += [*part, self._vocabulary.sep]
            self._rows[number, : len(pieces)] = pieces

    def batch(self, numbers: I64) -> MicroBatch:
        """The examples ``numbers``; its ``follows`` holds them, in the order of its documents."""
        rows, nothing = self._rows[numbers], np.zeros((len(numbers), self._rows.shape[1]), np.bool_)
        pad, cls = self._vocabulary.pad, self._vocabulary.cls
        return MicroBatch.of(rows, nothing, rows, self._segments[numbers], numbers, pad=pad, cls=cls)


def longest_first(parts: tuple[list[int], ...], room: int) -> list[list[int]]:
    """The parts, from whose longest the last piece is removed until ``room`` holds all (the last of equals)."""
    lengths = [len(part) for part in parts]
    while sum(lengths) > room:
        lengths[max(range(len(parts)), key=lambda i: (lengths[i], i))] -= 1
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


class Sentences:
    """A `Problem`: a dataset of sentences as pieces."""

    def __init__(self, dataset: Dataset, tokenizer: Any, max_length: int) -> None:
        self._dataset = dataset
        self._train, self._dev = (
            Examples(split, tokenizer, max_length) for split in (dataset.train, dataset.dev)
        )
        self._targets = torch.from_numpy(dataset.train.targets)
        self.metrics = dataset.task.metrics
        self.count = len(dataset.train)
        sizes = {"train": len(dataset.train), "dev": len(dataset.dev)}
        self.about = {**asdict(dataset.task), **sizes, "max_length": max_length}
        if cut := self._train.cut + self._dev.cut:
            total = len(dataset.train) + len(dataset.dev)
            print(f"{cut} of {total} examples are longer than --max-length and cut", flush=True)

    def model(self, encoder: Encoder, seed: int) -> Classifier:
        return Classifier(encoder, self._dataset.outputs, seed)

    def loss(self, model: nn.Module, numbers: I64, device: torch.device) -> Tensor:
        batch = self._train.batch(numbers).to(device)
        assert batch.follows is not None
        out: Tensor = model(batch)
        targets = self._targets.to(device)[batch.follows]
        if targets.dtype.is_floating_point:
            return F.mse_loss(out[:, 0], targets.to(out.dtype))
        return F.cross_entropy(out, targets)

    def scores(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        outputs = _predict(model, self._dev, len(self._dataset.dev), device)
        return scores(self.metrics, outputs, self._dataset.dev.targets)

    def baselines(self) -> dict[str, dict[str, Any]]:
        return {"most frequent label": majority(self._dataset), "bag of words": bag_of_words(self._dataset)}


@torch.no_grad()
def _predict(model: nn.Module, examples: Examples, count: int, device: torch.device) -> NDArray[np.float32]:
    """[count, outputs]"""
    parts, orders = [], []
    for begin in range(0, count, _EVALUATED):
        batch = examples.batch(np.arange(begin, min(count, begin + _EVALUATED))).to(device)
        assert batch.follows is not None
        parts.append(model(batch))
        orders.append(batch.follows)
    out, order = torch.cat(parts).cpu(), torch.cat(orders).cpu()
    values: NDArray[np.float32] = out[order.argsort()].numpy()
    return values
