"""The built-in tasks, from the prose in every CPython: do the second words continue the first; which is named?"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from sharded_lamb.bert.corpus import builtin_documents
from sharded_lamb.bert.finetune.squad import Question, SpanDataset, SpanSplit
from sharded_lamb.bert.finetune.tasks import Dataset, Split, Task
from sharded_lamb.recipes.training.stateless_rng import Permutation, draw, key_of, uniform

NAME = "builtin"
WORDS = 16
"""Of each half: equal lengths, so that a length tells nothing."""

SPANS_NAME = "builtin-spans"
ASKED = {
    "Which exception is named?": re.compile(r"\b[A-Z]\w*(?:Error|Exception|Warning)\b"),
    "Which number is given?": re.compile(r"(?<![\w.])\d+(?:\.\d+)*(?![\w.]*\w)"),
    "Which function is called?": re.compile(r"\b[\w.]+\(\)"),
    "Which word has capitals only?": re.compile(r"\b[A-Z][A-Z_]{3,}\b"),
}
"""Questions, and the answers of each."""
_SHORTEST, _LONGEST = 20, 60
"""Words of a paragraph that is asked about."""

_DEV_SHARE = 0.25
_TRAIN, _DEV = 2000, 800  # pairs at most: 25 s of a core for the quickstart's model and 3 epochs
_TASK = Task(NAME, ("first", "second"), "continues", ("accuracy", "f1"), ("no", "yes"))


def builtin_dataset() -> Dataset:
    """Pairs of `WORDS` words each from a paragraph, half of them with the second half of another document's pair.

    A document is in one split only, and a replacement is of the same split.
    """
    splits = []
    for (name, documents), most in zip(_documents_by_split().items(), (_TRAIN, _DEV), strict=True):
        pairs, sources = _halves(documents)
        splits.append(_split(pairs, sources, key_of(NAME, name), most))
    return Dataset(_TASK, *splits)


def _documents_by_split() -> dict[str, dict[int, str]]:
    """Split → number of a document → its paragraphs."""
    documents = builtin_documents()
    is_dev = uniform(key_of(NAME, "split"), np.arange(len(documents))) < _DEV_SHARE
    chosen = {"train": np.flatnonzero(~is_dev), "dev": np.flatnonzero(is_dev)}
    return {name: {i: documents[i] for i in numbers.tolist()} for name, numbers in chosen.items()}


def _halves(documents: dict[int, str]) -> tuple[list[list[str]], list[int]]:
    """Every 2 x `WORDS` words of the paragraphs, cut in the middle, and each pair's document."""
    pairs, sources = [], []
    for number, document in documents.items():
        for paragraph in document.split("\n\n"):
            words = paragraph.split()
            for begin in range(0, len(words) - 2 * WORDS + 1, 2 * WORDS):
                middle = begin + WORDS
                pairs.append([" ".join(words[begin:middle]), " ".join(words[middle : middle + WORDS])])
                sources.append(number)
    return pairs, sources


def _split(pairs: list[list[str]], sources: list[int], key: int, most: int) -> Split:
    count = min(most, len(pairs))
    chosen = Permutation(len(pairs), key)(np.arange(count)).tolist()
    continues = (uniform(key_of(key, "continues"), np.arange(count)) < 0.5).astype(np.int64)
    texts = []
    for i, pair in enumerate(chosen):
        other, turn = pair, 0
        while not continues[i] and sources[other] == sources[pair]:
            word = draw(key_of(key, "other", turn), np.array([i]))[0]
            other, turn = chosen[int(word % np.uint64(count))], turn + 1
        texts.append((pairs[pair][0], pairs[other][1]))
    return Split(tuple(texts), continues)


def builtin_spans() -> SpanDataset:
    """Questions about paragraphs in which exactly one place is an answer, or, in about a third, none.

    A document is in one split only, as in `builtin_dataset`.
    """
    splits = (
        SpanSplit(f"{SPANS_NAME} {name}", tuple(_questions(documents)))
        for name, documents in _documents_by_split().items()
    )
    return SpanDataset(SPANS_NAME, True, *splits)


def _questions(documents: dict[int, str]) -> Iterator[Question]:
    for number, document in documents.items():
        for place, paragraph in enumerate(document.split("\n\n")):
            if not _SHORTEST <= len(paragraph.split()) <= _LONGEST:
                continue
            found = {text: list(pattern.finditer(paragraph)) for text, pattern in ASKED.items()}
            one = [text for text, matches in found.items() if len(matches) == 1]
            none = [text for text, matches in found.items() if not matches]
            for text in one:
                answer = found[text][0]
                yield Question(f"{number}.{place}.{text}", text, paragraph, (answer.group(),), answer.start())
            if one and none and uniform(key_of(SPANS_NAME, number), np.array([place]))[0] < 0.5:
                text = none[int(draw(key_of(SPANS_NAME, number, "none"), np.array([place]))[0]) % len(none)]
                yield Question(f"{number}.{place}.{text}", text, paragraph, (), 0)
