"""Answers without a network: random words, and the sentence that shares most words with the question."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from sharded_lamb.bert.finetune.span_scores import normalized
from sharded_lamb.bert.finetune.squad import Question
from sharded_lamb.recipes.training.stateless_rng import key_of, uniform

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")


def random_words(train: Sequence[Question], dev: Sequence[Question]) -> list[str]:
    """Words anywhere in each context, as many as a random answer of ``train`` has."""
    lengths = [len(question.answers[0].split()) for question in train if question.answers] or [1]
    drawn = [uniform(key_of("random words", purpose), np.arange(len(dev))) for purpose in ("length", "place")]
    answers = []
    for question, length, place in zip(dev, *(values.tolist() for values in drawn), strict=True):
        words = question.context.split()
        count = min(len(words), lengths[int(length * len(lengths))])
        begin = int(place * (len(words) - count + 1))
        answers.append(" ".join(words[begin : begin + count]))
    return answers


def most_similar_sentences(dev: Sequence[Question]) -> list[str]:
    """The first of the context's sentences that share most normalized words with the question."""
    answers = []
    for question in dev:
        asked = {*normalized(question.text).split()}
        sentences = _SENTENCE_END.split(question.context.strip())
        answers.append(max(sentences, key=lambda s: len(asked & {*normalized(s).split()})))
    return answers
