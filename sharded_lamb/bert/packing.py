"""Documents (lists of piece ids) → fixed-length rows.

A packed row holds `[CLS] part [SEP]` of several documents in turn; every `[CLS]` begins a document, so the row itself
bounds attention. A row for next-sentence prediction is `[CLS] A [SEP] B [SEP]`, where A and B follow each other in one
document; the reader draws whether to replace B.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sharded_lamb.bert.tokenizer import Vocabulary

MIN_NSP_TOKENS = 8  # fewer pieces make no pair


class Packer:
    """Collects rows of `length` ids from documents, in the order of `add`."""

    def __init__(self, vocabulary: Vocabulary, length: int, *, nsp: bool, pack: bool) -> None:
        self._vocabulary, self._length = vocabulary, length
        self._nsp, self._pack = nsp, pack
        self._smallest = max(4, length // 16)  # a shorter part isn't worth cutting a document for
        self._open: list[int] = []
        self._rows: list[list[int]] = []
        self.dropped = 0

    def add(self, document: Sequence[int]) -> None:
        if self._nsp:
            self._add_pairs(document)
        elif document:
            self._add_parts(document)
        else:
            self.dropped += 1

    def rows(self) -> NDArray[np.int64]:
        """[samples, length]; closes the open row."""
        self._close()
        out = np.full((len(self._rows), self._length), self._vocabulary.pad, np.int64)
        for row, ids in zip(out, self._rows, strict=True):
            row[: len(ids)] = ids
        return out

    def _close(self) -> None:
        if self._open:
            self._rows.append(self._open)
            self._open = []

    def _add_parts(self, document: Sequence[int]) -> None:
        begin = 0
        while begin < len(document):
            room = self._length - len(self._open) - 2
            left = len(document) - begin
            if room < min(left, self._smallest):
                self._close()
                continue
            taken = document[begin : begin + room]
            self._open += [self._vocabulary.cls, *taken, self._vocabulary.sep]
            begin += len(taken)
            if not self._pack:
                self._close()

    def _add_pairs(self, document: Sequence[int]) -> None:
        room = self._length - 3
        for begin in range(0, len(document), room):
            window = list(document[begin : begin + room])
            if len(window) < MIN_NSP_TOKENS:
                self.dropped += begin == 0
                continue
            cut = self._middle(window)
            sep = self._vocabulary.sep
            self._rows.append([self._vocabulary.cls, *window[:cut], sep, *window[cut:], sep])

    def _middle(self, window: Sequence[int]) -> int:
        """Index at which B begins: after the sentence end nearest to the middle, if the middle half has one."""
        half, quarter = len(window) // 2, len(window) // 4
        ends = [i + 1 for i, piece in enumerate(window) if piece in self._vocabulary.sentence_end]
        near = [end for end in ends if abs(end - half) <= quarter and 0 < end < len(window)]
        return min(near, key=lambda end: abs(end - half)) if near else half
