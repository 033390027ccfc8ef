"""GLUE's metrics, from their definitions, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[Any]


def accuracy(predicted: Numbers, target: Numbers) -> float:
    """Share of equal elements; [N] each."""
    return float(np.mean(predicted == target))


def f1(predicted: Numbers, target: Numbers) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if nothing is predicted right."""
    true_positive = int(np.sum((predicted == 1) & (target == 1)))
    positives = int(np.sum(predicted == 1)) + int(np.sum(target == 1))
    return 2 * true_positive / positives if positives else 0.0


def matthews(predicted: Numbers, target: Numbers) -> float:
    """Correlation of two classes, 0 and 1; 0 if either has one class only."""
    tp, tn, fp, fn = (
        int(np.sum((predicted == p) & (target == t))) for p, t in ((1, 1), (0, 0), (1, 0), (0, 1))
    )
    product = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(product) if product else 0.0


def pearson(predicted: Numbers, target: Numbers) -> float:
    """Linear correlation; nan if either is constant."""
    x, y = (np.asarray(values, np.float64) for values in (predicted, target))
    if len({*x.tolist()}) < 2 or len({*y.tolist()}) < 2:
        return math.nan
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / math.sqrt((x @ x) * (y @ y)))


def spearman(predicted: Numbers, target: Numbers) -> float:
    """`pearson` of the ranks; equal values have the mean of their ranks."""
    return pearson(_ranks(predicted), _ranks(target))


def _ranks(values: Numbers) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = (np.cumsum(counts) - (counts - 1) / 2)[which]
    return ranks


METRICS: Mapping[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def scores(metrics: Sequence[str], outputs: Numbers, target: Numbers) -> dict[str, float]:
    """{metric: value} of a model's outputs [N, C] for classes [N], or [N, 1] for numbers [N].

    Every value is nan if an output is not finite.
    """
    if not np.isfinite(outputs).all():
        return dict.fromkeys(metrics, math.nan)
    predicted = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(1)
    return {name: METRICS[name](predicted, target) for name in metrics}
