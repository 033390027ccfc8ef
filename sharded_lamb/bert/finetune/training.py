"""One fine-tuning: model, batches, and a loop over epochs. One process, fp32."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.bert.attention import use_documents
from sharded_lamb.bert.config import OptimizerConfig
from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.finetune.encoder import Encoder
from sharded_lamb.bert.finetune.scores import scores
from sharded_lamb.bert.finetune.tasks import Dataset, Split
from sharded_lamb.bert.model import encode_documents, parameters_to_train
from sharded_lamb.bert.schedule import Schedule
from sharded_lamb.bert.tokenizer import encode, vocabulary_of
from sharded_lamb.recipes.training.sharded_backend import set_lr
from sharded_lamb.recipes.training.stateless_rng import I64, Permutation, key_of

_EVALUATED = 128
"""Examples in a batch of the dev split."""


@dataclass(frozen=True)
class Settings:
    """The settings of a fine-tuning that all rates and seeds share."""

    optimizer: str  # a variant of ShardedLamb
    epochs: int
    batch: int
    max_length: int  # pieces, with [CLS] and [SEP]
    warmup: float  # share of the steps


class Classifier(nn.Module):
    """Hugging Face's `BertForSequenceClassification` over documents without padding: [D, outputs] of D documents."""

    def __init__(self, encoder: Encoder, outputs: int, seed: int) -> None:
        from transformers import BertForSequenceClassification

        super().__init__()
        config = deepcopy(encoder.config)
        config.num_labels = outputs
        torch.manual_seed(key_of(seed, "weights") >> 1)
        self.module: Any = BertForSequenceClassification(config)
        if encoder.weights is not None:
            with torch.no_grad():
                for name, value in encoder.weights.items():
                    self.module.bert.get_parameter(name).copy_(value)
        use_documents(self.module)

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


def finetune(
    encoder: Encoder,
    dataset: Dataset,
    train: Examples,
    dev: Examples,
    settings: Settings,
    lr: float,
    seed: int,
    device: torch.device,
) -> dict[str, float]:
    """Trains all weights; returns {metric: value on dev, "loss": mean of the last epoch}.

    Order, dropout and new weights are functions of ``seed``: on one device and number of threads, so are all bits.
    """
    model = Classifier(encoder, dataset.outputs, seed).to(device).train()
    keywords = OptimizerConfig(variant=settings.optimizer).keywords()
    optimizer = ShardedLamb(parameters_to_train(model), lr=0.0, **keywords)
    count = len(dataset.train)
    in_epoch = -(-count // settings.batch)
    steps = settings.epochs * in_epoch
    schedule = Schedule(lr, steps, round(settings.warmup * steps), 1.0, "command")
    targets = torch.from_numpy(dataset.train.targets).to(device)
    losses = torch.zeros((), dtype=torch.float64, device=device)
    for step in range(steps):
        epoch, turn = divmod(step, in_epoch)
        if turn == 0:
            losses.zero_()
        places = np.arange(turn * settings.batch, min(count, (turn + 1) * settings.batch))
        numbers = Permutation(count, key_of(seed, "order", epoch))(places)
        torch.manual_seed(key_of(seed, "dropout", step) >> 1)
        batch = train.batch(numbers).to(device)
        loss = _loss(model(batch), targets[batch.follows])
        loss.backward()  # type: ignore[no-untyped-call]
        set_lr(optimizer, schedule.lr(step))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses += loss.detach().double() * len(numbers)
    optimizer.close()
    found = scores(dataset.task.metrics, _predict(model, dev, len(dataset.dev), device), dataset.dev.targets)
    return {**found, "loss": float(losses) / count}


def _loss(out: Tensor, targets: Tensor) -> Tensor:
    if targets.dtype.is_floating_point:
        return F.mse_loss(out[:, 0], targets.to(out.dtype))
    return F.cross_entropy(out, targets)


@torch.no_grad()
def _predict(model: Classifier, examples: Examples, count: int, device: torch.device) -> NDArray[np.float32]:
    """[count, outputs]"""
    model.eval()
    parts, orders = [], []
    for begin in range(0, count, _EVALUATED):
        batch = examples.batch(np.arange(begin, min(count, begin + _EVALUATED))).to(device)
        assert batch.follows is not None
        parts.append(model(batch))
        orders.append(batch.follows)
    out, order = torch.cat(parts).cpu(), torch.cat(orders).cpu()
    values: NDArray[np.float32] = out[order.argsort()].numpy()
    return values
