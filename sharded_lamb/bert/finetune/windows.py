"""Questions over windows of their contexts: pieces, and the characters they come from."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.finetune.squad import Question, SpanSplit
from sharded_lamb.bert.finetune.tasks import OnBad, report_bad
from sharded_lamb.bert.tokenizer import encode, encode_with_offsets, vocabulary_of
from sharded_lamb.recipes.training.stateless_rng import I64

_SPECIAL = 3  # [CLS] question [SEP] context [SEP]


@dataclass(frozen=True)
class Lengths:
    """In pieces. `run_squad.py` of google-research/bert has 384, 128 and 64 of 512 positions."""

    window: int  # question, part of the context, and three special pieces
    stride: int  # between the beginnings of two windows
    question: int  # at most

    def __post_init__(self) -> None:
        room = self.window - _SPECIAL - self.question
        if min(self.stride, self.question) < 1 or self.stride > room:
            raise ValueError(
                f"--stride {self.stride}, --max-question {self.question}: expected positive numbers, and a stride of "
                f"at most the {room} pieces that --max-length {self.window} leaves to the context"
            )


@dataclass(frozen=True)
class _Pieces:
    """A text as n pieces."""

    ids: I64  # [n]
    begins: I64  # [n], in characters
    ends: I64  # [n], in characters, exclusive


@dataclass(frozen=True)
class _Asked:
    question: Question
    pieces: list[int]
    context: _Pieces
    answer: tuple[int, int] | None  # its first and last piece in the context
    windows: I64  # [W]: where each begins in the context
    room: int  # pieces of the context in a window, at most


class Windows:
    """W windows of ``questions``, in their order: all of a question's, each ``stride`` after the one before.

    Attributes:
        questions: those of the split that are not bad.
        owner: [W] int64, each window's question by its place in ``questions``.
        first: [questions] int64, each question's first window.

    Raises:
        ValueError: a question is longer than ``lengths.question``, or a context or an answer has no pieces, if
            ``on_bad`` is "error".
    """

    def __init__(self, split: SpanSplit, tokenizer: Any, lengths: Lengths, on_bad: OnBad) -> None:
        self._vocabulary = vocabulary_of(tokenizer)
        self._length = lengths.window
        contexts = list(dict.fromkeys(question.context for question in split.questions))
        encoded = (
            _Pieces(*(np.array(part, np.int64) for part in parts))
            for parts in encode_with_offsets(tokenizer, contexts)
        )
        pieces = dict(zip(contexts, encoded, strict=True))
        self._asked: list[_Asked] = []
        bad = []
        asked = encode(tokenizer, [question.text for question in split.questions])
        for question, words in zip(split.questions, asked, strict=True):
            found = _asked(question, words, pieces[question.context], lengths)
            if isinstance(found, str):
                bad.append(f"question {question.id!r}: {found}")
            else:
                self._asked.append(found)
        if bad:
            report_bad(f"{split.source}: {len(bad)} of {len(split)} questions are bad", bad, on_bad)
        if not self._asked:
            raise ValueError(f"{split.source}: no good question in {len(split)}")
        self.questions = tuple(asked.question for asked in self._asked)
        counts = np.array([len(asked.windows) for asked in self._asked])
        self.owner = np.repeat(np.arange(len(counts)), counts)
        self.first = np.cumsum(counts) - counts

    def __len__(self) -> int:
        return len(self.owner)

    def batch(self, numbers: I64) -> MicroBatch:
        """The windows ``numbers``; its ``follows`` holds them, in the order of its documents."""
        pad, cls, sep = self._vocabulary.pad, self._vocabulary.cls, self._vocabulary.sep
        rows = np.full((len(numbers), self._length), pad, np.int64)
        segments = np.zeros(rows.shape, np.int64)
        for row, number in enumerate(numbers.tolist()):
            asked, begin, end = self._part(number)
            beginning = [cls, *asked.pieces, sep]
            whole = [*beginning, *asked.context.ids[begin:end], sep]
            rows[row, : len(whole)] = whole
            segments[row, len(beginning) : len(whole)] = 1
        return MicroBatch.of(rows, np.zeros(rows.shape, np.bool_), rows, segments, numbers, pad=pad, cls=cls)

    def targets(self, numbers: I64) -> I64:
        """[N, 2]: the answer's first and last piece in each window; 0, 0 ([CLS]) where not all of it is there."""
        found = np.zeros((len(numbers), 2), np.int64)
        for row, number in enumerate(numbers.tolist()):
            asked, begin, end = self._part(number)
            if asked.answer is not None and begin <= asked.answer[0] and asked.answer[1] < end:
                found[row] = np.array(asked.answer) - begin + self.context_begin(number)
        return found

    def context_begin(self, number: int) -> int:
        """Pieces of a window before those of the context."""
        return len(self._asked[self.owner[number]].pieces) + 2

    def has_most_context(self, number: int) -> NDArray[np.bool_]:
        """[pieces of the context in the window]: whether no other window of the question has more on both sides.

        The smaller of the pieces before and after it counts, the first of equals, as in `run_squad.py`, whose 0.01 of
        the window's length decides nothing: only the last window can be shorter.
        """
        asked, begin, end = self._part(number)
        place = np.arange(begin, end)[:, None]
        ends = np.minimum(asked.windows + asked.room, len(asked.context.ids))
        context = np.minimum(place - asked.windows, ends - 1 - place)  # negative outside of a window
        own: NDArray[np.bool_] = context.argmax(1) == number - self.first[self.owner[number]]
        return own

    def text(self, number: int, first: int, last: int) -> str:
        """The characters of the context from piece ``first`` to ``last`` of its part in a window.

        Combining marks that follow belong to it: a tokenizer without accents leaves them out of its pieces.
        """
        asked, begin, _ = self._part(number)
        context = asked.question.context
        end = int(asked.context.ends[begin + last])
        while end < len(context) and unicodedata.combining(context[end]):
            end += 1
        return context[int(asked.context.begins[begin + first]) : end]

    def _part(self, number: int) -> tuple[_Asked, int, int]:
        """The question of a window, and [begin, end) of the context's pieces in it."""
        owner = int(self.owner[number])
        asked = self._asked[owner]
        begin = int(asked.windows[number - self.first[owner]])
        return asked, begin, min(begin + asked.room, len(asked.context.ids))


def _asked(question: Question, words: list[int], context: _Pieces, lengths: Lengths) -> _Asked | str:
    """The question's pieces and windows, or the reason why it is bad."""
    if not 0 < len(words) <= lengths.question:
        return f"{len(words)} pieces, expected 1 to the {lengths.question} of --max-question"
    if not len(context.ids):
        return "its context has no pieces"
    answer = None
    if question.answers:
        stop = question.start + len(question.answers[0])
        first = int(np.searchsorted(context.ends, question.start, side="right"))
        last = int(np.searchsorted(context.begins, stop, side="left")) - 1
        if first > last:
            return f"answer {question.answers[0]!r} has no pieces"
        answer = (first, last)
    room = lengths.window - _SPECIAL - len(words)
    more = max(0, len(context.ids) - room)
    windows = np.arange(0, more + lengths.stride, lengths.stride)
    return _Asked(question, words, context, answer, windows, room)
