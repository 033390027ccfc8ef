"""SQuAD's metrics: exact match and F1 of texts, by the rules of its evaluation scripts of versions 1.1 and 2.0."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")

METRICS = ("f1", "exact")
METRICS_UNANSWERABLE = (*METRICS, "HasAns_f1", "HasAns_exact", "NoAns_exact")
"""Named as SQuAD 2.0's script does; for questions without an answer its F1 equals exact match."""


def normalized(text: str) -> str:
    """In lower case, without ASCII punctuation, articles and repeated white space, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def word_f1(predicted: str, answer: str, *, has_unanswerable: bool) -> float:
    """Harmonic mean of precision and recall of the normalized words; 0 if none is shared.

    Two texts without a word have 1 if ``has_unanswerable`` (SQuAD 2.0), else 0.
    """
    own, gold = (Counter(normalized(text).split()) for text in (predicted, answer))
    if has_unanswerable and not own and not gold:
        return 1.0
    shared = (own & gold).total()
    return 2 * shared / (own.total() + gold.total()) if shared else 0.0


def span_scores(
    predicted: Sequence[str], answers: Sequence[tuple[str, ...]], *, has_unanswerable: bool
) -> dict[str, float]:
    """{metric: mean over N questions, in [0, 1]}; over several right answers the best counts.

    ``predicted``: "" for no answer; ``answers``: empty where the context has none. ``has_unanswerable``: by SQuAD 2.0,
    which leaves out answers without a word, and has means over the questions with and without answers (of none: nan).
    """
    exact, f1 = [], []
    for text, given in zip(predicted, answers, strict=True):
        gold = [g for g in given if normalized(g)] or [""] if has_unanswerable else given
        exact.append(float(any(normalized(text) == normalized(g) for g in gold)))
        f1.append(max(word_f1(text, g, has_unanswerable=has_unanswerable) for g in gold))
    found = {"f1": _mean(f1), "exact": _mean(exact)}
    if has_unanswerable:
        found["HasAns_f1"] = _mean([v for v, given in zip(f1, answers, strict=True) if given])
        found["HasAns_exact"] = _mean([v for v, given in zip(exact, answers, strict=True) if given])
        found["NoAns_exact"] = _mean([v for v, given in zip(exact, answers, strict=True) if not given])
    return found


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
