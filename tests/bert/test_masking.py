from typing import Any

import numpy as np
import pytest

from sharded_lamb.bert.masking import Masker
from sharded_lamb.bert.tokenizer import Vocabulary

VOCABULARY, PAD, CLS, SEP, MASK = 1000, 0, 2, 3, 4


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    continues = np.zeros(VOCABULARY, bool)
    continues[500:] = True
    return Vocabulary(VOCABULARY, PAD, CLS, SEP, MASK, (0, 1, 2, 3, 4), continues, ())


def rows_of(n: int, length: int = 128, seed: int = 0) -> np.ndarray[Any, np.dtype[np.int64]]:
    rows = np.random.default_rng(seed).integers(5, VOCABULARY, (n, length))
    rows[:, 0], rows[:, -1] = CLS, SEP
    rows[::3, -20:], rows[::3, -21] = PAD, SEP
    return rows


def test_masked_places_follow_the_8_1_1_rule(vocabulary: Vocabulary) -> None:
    rows = rows_of(4000)
    masked, chosen = Masker(vocabulary, 0.15, 20, False, 7)(rows, np.arange(4000))
    ordinary = rows > MASK
    assert not chosen[~ordinary].any()
    assert (masked == rows)[~chosen].all()
    assert np.array_equal(chosen.sum(1), np.rint(ordinary.sum(1) * 0.15))
    count = chosen.sum()
    now, before = masked[chosen], rows[chosen]
    # Five deviations of a binomial share; a random piece is the old one in 1 of 995 cases.
    assert abs((now == MASK).mean() - 0.8) < 5 * (0.8 * 0.2 / count) ** 0.5
    assert abs((now == before).mean() - (0.1 + 0.1 / 995)) < 5 * (0.1 * 0.9 / count) ** 0.5
    other = now[(now != MASK) & (now != before)]
    assert other.min() > MASK
    histogram = np.histogram(other, 5, (5, VOCABULARY))[0]
    assert abs(histogram - len(other) / 5).max() < 5 * (len(other) / 5) ** 0.5


def test_every_place_is_equally_likely(vocabulary: Vocabulary) -> None:
    rows = np.tile(rows_of(2)[1], (6000, 1))
    _, chosen = Masker(vocabulary, 0.15, 20, False, 7)(rows, np.arange(6000))
    share = chosen.mean(0)[1:-1]
    expected = 19 / 126
    assert abs(share - expected).max() < 5 * (expected * (1 - expected) / 6000) ** 0.5


@pytest.mark.parametrize("whole_word", [False, True])
def test_a_mask_depends_on_the_sample_index_alone(vocabulary: Vocabulary, whole_word: bool) -> None:
    rows, masker = rows_of(64), Masker(vocabulary, 0.15, 20, whole_word, 7)
    together, _ = masker(rows, np.arange(64) + 10**9)
    for i in (0, 13, 63):
        alone, _ = masker(rows[i : i + 1], np.array([i]) + 10**9)
        assert np.array_equal(alone[0], together[i])
    next_epoch, _ = masker(rows, np.arange(64) + 2 * 10**9)
    assert (next_epoch != together).any(1).mean() > 0.9
    other_key, _ = Masker(vocabulary, 0.15, 20, whole_word, 8)(rows, np.arange(64) + 10**9)
    assert (other_key != together).any(1).mean() > 0.9


def test_max_predictions_caps_a_row(vocabulary: Vocabulary) -> None:
    for whole_word in (False, True):
        _, chosen = Masker(vocabulary, 0.5, 20, whole_word, 7)(rows_of(100), np.arange(100))
        assert chosen.sum(1).max() <= 20


def test_whole_words_are_masked_whole_and_as_often(vocabulary: Vocabulary) -> None:
    rows = rows_of(6000)
    _, chosen = Masker(vocabulary, 0.15, 64, True, 7)(rows, np.arange(6000))
    ordinary = rows > MASK
    joined = (rows[:, 1:] >= 500) & ordinary[:, :-1]  # the piece continues the word before it
    assert (chosen[:, 1:] == chosen[:, :-1])[joined].all()
    # The crossing word is taken by a coin that keeps the expected count; words are up to a dozen pieces here.
    assert abs(chosen.sum() / np.rint(ordinary.sum(1) * 0.15).sum() - 1) < 0.005


def test_a_row_of_special_pieces_has_nothing_to_predict(vocabulary: Vocabulary) -> None:
    rows = np.array([[CLS, SEP, PAD, PAD]])
    for whole_word in (False, True):
        masked, chosen = Masker(vocabulary, 0.15, 2, whole_word, 7)(rows, np.array([0]))
        assert not chosen.any()
        assert np.array_equal(masked, rows)
