"""A baseline without a network: logistic (or linear) regression on which words a text has."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sharded_lamb.bert.finetune.scores import scores
from sharded_lamb.bert.finetune.tasks import Dataset, Split

PENALTIES = (1e-2, 1e-3, 1e-4)
"""Weights of the squared norm, of which the best on dev is taken, as the best rate of a network is."""

_WORD = re.compile(r"\w+|[^\w\s]")
_ITERATIONS = 60


def bag_of_words(dataset: Dataset) -> dict[str, Any]:
    """{"penalty": the best, metric: its value on dev}.

    Features: the words of each sentence; for a pair also the words in both, and the share of the second's that is
    in the first.
    """
    vocabulary: dict[str, int] = {}
    train = _features(dataset.train, vocabulary, grows=True)
    dev = _features(dataset.dev, vocabulary, grows=False)
    targets = torch.from_numpy(dataset.train.targets)
    main = dataset.task.metrics[0]
    results = []
    for penalty in PENALTIES:
        weights, bias = _fit(train, targets, len(vocabulary), dataset.outputs, penalty)
        found = scores(dataset.task.metrics, (dev @ weights + bias).numpy(), dataset.dev.targets)
        results.append({"penalty": penalty, **found})
    return max(results, key=lambda row: np.nan_to_num(row[main], nan=-np.inf))


def _features(split: Split, vocabulary: dict[str, int], *, grows: bool) -> Tensor:
    """[N, features] fp64, sparse; rows of words have length 1. Features unseen in training are left out."""
    rows: list[int] = []
    columns: list[int] = []
    values: list[float] = []
    for row, texts in enumerate(split.texts):
        words = [{*_WORD.findall(text.lower())} for text in texts]
        sets = [*words, words[0] & words[1]] if len(words) == 2 else words
        named = [f"{number} {word}" for number, own in enumerate(sets) for word in sorted(own)]
        found = {name: len(named) ** -0.5 for name in named}
        if len(words) == 2:
            found["shared"] = len(sets[2]) / max(1, len(words[1]))
        for name, value in found.items():
            if grows:
                vocabulary.setdefault(name, len(vocabulary))
            if name in vocabulary:
                rows.append(row)
                columns.append(vocabulary[name])
                values.append(value)
    indices = torch.tensor([rows, columns], device="cpu")
    entries = torch.tensor(values, dtype=torch.float64, device="cpu")
    return torch.sparse_coo_tensor(
        indices, entries, (len(split), len(vocabulary)), check_invariants=True
    ).coalesce()


def _fit(
    features: Tensor, targets: Tensor, width: int, outputs: int, penalty: float
) -> tuple[Tensor, Tensor]:
    """Weights [width, outputs] and bias [outputs] of the penalized minimum, by L-BFGS."""
    weights = torch.zeros(width, outputs, dtype=torch.float64, device="cpu", requires_grad=True)
    bias = torch.zeros(outputs, dtype=torch.float64, device="cpu", requires_grad=True)
    solver = torch.optim.LBFGS([weights, bias], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        solver.zero_grad()
        out = torch.sparse.mm(features, weights) + bias
        loss = F.mse_loss(out[:, 0], targets) if outputs == 1 else F.cross_entropy(out, targets)
        total = loss + penalty * weights.square().sum()
        total.backward()  # type: ignore[no-untyped-call]
        return total

    solver.step(closure)  # type: ignore[no-untyped-call]
    return weights.detach(), bias.detach()


def majority(dataset: Dataset) -> dict[str, float]:
    """Metrics on dev of the most frequent label of the training file; in regression of its mean."""
    targets: NDArray[Any] = dataset.train.targets
    outputs = np.zeros((len(dataset.dev), dataset.outputs))
    outputs[:, 0 if dataset.outputs == 1 else np.bincount(targets).argmax()] = (
        targets.mean() if dataset.outputs == 1 else 1
    )
    return scores(dataset.task.metrics, outputs, dataset.dev.targets)
