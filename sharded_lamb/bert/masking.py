"""Dynamic masking, keyed by sample: which pieces are predicted, and which pieces replace them.

Masks are vectorized over a batch, and functions of (key, global sample index, row, step's probability) only: a sample
gets the same mask on every rank, world size, accumulation and restart, and a new one in every epoch. So is the draw of
the samples that are causal, of which every ordinary piece is predicted and none is replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.tokenizer import Vocabulary
from sharded_lamb.recipes.training.settings import require
from sharded_lamb.recipes.training.stateless_rng import key_of, uniform

Bools = NDArray[np.bool_]
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

_AS_MASK, _AS_RANDOM = 0.8, 0.9  # [0, 0.8) → [MASK], [0.8, 0.9) → a random piece, the rest stays


@dataclass(frozen=True)
class Masker:
    """Masks the share `probability` of a row's ordinary pieces, at most `max_predictions`.

    With a `causal_fraction`, which is that share of the samples, pieces are predicted at the position before them.
    """

    vocabulary: Vocabulary
    probability: float
    max_predictions: int
    whole_word: bool
    key: int
    causal_fraction: float | None = None
    change: float = 0.0  # of `probability`, a step

    def at(self, step: int) -> Masker:
        """The masker of a step, which is `probability`'s own at step 0."""
        return replace(self, probability=self.probability + step * self.change)

    def is_causal(self, samples: Ints) -> Bools | None:
        """[n] global sample indices → [n], or None without a `causal_fraction`."""
        if self.causal_fraction is None:
            return None
        return uniform(key_of(self.key, "causal"), samples) < self.causal_fraction

    def __call__(self, rows: Ints, samples: Ints) -> tuple[Ints, Bools]:
        """([n, length] ids, [n] global sample indices) → (ids with masks, [n, length] whether predicted)."""
        length = rows.shape[1]
        # One number for each position of each sample; no row is longer than 2^16.
        position = (samples[:, None] << 16) + np.arange(length)
        ordinary = ~np.isin(rows, self.vocabulary.special)
        score = uniform(key_of(self.key, "which"), position)
        chosen = (
            self._whole_words(rows, ordinary, score, position)
            if self.whole_word
            else self._single(ordinary, score)
        )
        masked, is_causal = self._replace(rows, chosen, position), self.is_causal(samples)
        if is_causal is None:
            return masked, chosen
        return np.where(is_causal[:, None], rows, masked), np.where(is_causal[:, None], ordinary, chosen)

    def _budget(self, ordinary: Bools) -> Ints:
        """[n]: number of predictions: the rounded share, at least one, at most the cap."""
        count = ordinary.sum(1)
        share = np.maximum(1, np.rint(count * self.probability)).astype(np.int64)
        budget: Ints = np.minimum(np.minimum(share, self.max_predictions), count)
        return budget

    def _single(self, ordinary: Bools, score: Floats) -> Bools:
        """The positions with the lowest scores."""
        score = np.where(ordinary, score, 2.0)
        return (_rank(score) < self._budget(ordinary)[:, None]) & ordinary

    def _whole_words(self, rows: Ints, ordinary: Bools, score: Floats, position: Ints) -> Bools:
        """All pieces of the words with the lowest scores.

        The word that crosses the budget is masked with the probability that keeps the expected count at the budget,
        unless it exceeds the cap.
        """
        starts = ordinary & ~self._continues(rows, ordinary)
        word = np.where(ordinary, np.maximum.accumulate(np.where(starts, np.arange(rows.shape[1]), 0), 1), 0)
        word_score = np.where(ordinary, np.take_along_axis(score, word, 1), 2.0)
        rank = _rank(word_score)
        # Positions of one word share a score, so their ranks are consecutive: the first and the size bound the word.
        first = np.take_along_axis(rank, word, 1)
        size = _word_sizes(word, ordinary)
        budget = self._budget(ordinary)[:, None]
        fits = first + size <= budget
        coin = uniform(key_of(self.key, "crossing"), np.take_along_axis(position, word, 1))
        crossing = (
            (first < budget) & ~fits & (coin * size < budget - first) & (first + size <= self.max_predictions)
        )
        return (fits | crossing) & ordinary

    def _continues(self, rows: Ints, ordinary: Bools) -> Bools:
        """Continuations whose word begins in this row (a row may begin inside a word)."""
        continues = self.vocabulary.continues_word[rows] & ordinary
        continues[:, 1:] &= ordinary[:, :-1]
        continues[:, 0] = False
        return continues

    def _replace(self, rows: Ints, chosen: Bools, position: Ints) -> Ints:
        kind = uniform(key_of(self.key, "kind"), position)
        ordinary = self.vocabulary.ordinary
        other = ordinary[(uniform(key_of(self.key, "other"), position) * len(ordinary)).astype(np.int64)]
        masked = np.where(chosen & (kind < _AS_MASK), self.vocabulary.mask, rows)
        return np.where(chosen & (kind >= _AS_MASK) & (kind < _AS_RANDOM), other, masked)


def masker_of(config: RunConfig, phase: int, vocabulary: Vocabulary, key: int) -> Masker:
    """The masker of a phase's training steps."""
    masking, before = config.masking, sum(phase.steps for phase in config.phases[:phase])
    change = (masking.last_probability - masking.probability) / sum(phase.steps for phase in config.phases)
    return Masker(
        vocabulary,
        masking.probability + before * change,
        config.max_predictions(config.phases[phase]),
        masking.whole_word,
        key,
        masking.causal_fraction,
        change,
    )


def require_masked_only(config: RunConfig) -> None:
    """Raises: ValueError for next-piece prediction, in a comparison of masked language modelling."""
    fraction = config.masking.causal_fraction
    require(fraction is None, "masking.causal_fraction", fraction, "null, since the comparison is of masking")


def _rank(score: Floats) -> Ints:
    """Each position's rank in its row; equal scores rank from left to right."""
    order = np.argsort(score, axis=1, kind="stable")
    rank = np.empty_like(order)
    np.put_along_axis(rank, order, np.broadcast_to(np.arange(score.shape[1]), score.shape), 1)
    return rank


def _word_sizes(word: Ints, ordinary: Bools) -> Ints:
    """[n, length]: number of pieces in the word of each position."""
    n, length = word.shape
    flat = (np.arange(n)[:, None] * length + word)[ordinary]
    sizes = np.bincount(flat, minlength=n * length)
    out: Ints = np.take_along_axis(sizes.reshape(n, length), word, 1)
    return out
