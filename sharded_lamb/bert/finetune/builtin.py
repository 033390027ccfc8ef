"""The built-in task: do the second words continue the first? From the prose in every CPython."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from sharded_lamb.bert.corpus import builtin_documents
from sharded_lamb.bert.finetune.tasks import Dataset, Split, Task
from sharded_lamb.recipes.training.stateless_rng import Permutation, draw, key_of, uniform

NAME = "builtin"
WORDS = 16
"""Of each half: equal lengths, so that a length tells nothing."""

_DEV_SHARE = 0.25
_TRAIN, _DEV = 2000, 800  # pairs at most: 25 s of a core for the quickstart's model and 3 epochs
_TASK = Task(NAME, ("first", "second"), "continues", ("accuracy", "f1"), ("no", "yes"))


def builtin_dataset() -> Dataset:
    """Pairs of `WORDS` words each from a paragraph, half of them with the second half of another document's pair.

    A document is in one split only, and a replacement is of the same split.
    """
    documents = builtin_documents()
    is_dev = uniform(key_of(NAME, "split"), np.arange(len(documents))) < _DEV_SHARE
    splits = []
    for name, most in (("train", _TRAIN), ("dev", _DEV)):
        pairs, sources = _halves(documents, is_dev if name == "dev" else ~is_dev)
        splits.append(_split(pairs, sources, key_of(NAME, name), most))
    return Dataset(_TASK, *splits)


def _halves(documents: tuple[str, ...], chosen: NDArray[np.bool_]) -> tuple[list[list[str]], list[int]]:
    """Every 2 x `WORDS` words of the paragraphs, cut in the middle, and each pair's document."""
    pairs, sources = [], []
    for number in np.flatnonzero(chosen).tolist():
        for paragraph in documents[number].split("\n\n"):
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
