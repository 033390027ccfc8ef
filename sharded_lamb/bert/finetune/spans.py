"""Spans of a context as answers: the model, its loss, and the best span over all windows."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor, nn

from sharded_lamb.bert.data import MicroBatch
from sharded_lamb.bert.finetune.encoder import Encoder
from sharded_lamb.bert.finetune.span_baselines import most_similar_sentences, random_words
from sharded_lamb.bert.finetune.span_scores import METRICS, METRICS_UNANSWERABLE, span_scores
from sharded_lamb.bert.finetune.squad import SpanDataset
from sharded_lamb.bert.finetune.tasks import OnBad
from sharded_lamb.bert.finetune.windows import Lengths, Windows
from sharded_lamb.bert.model import encode_documents
from sharded_lamb.recipes.training.stateless_rng import I64

LONGEST_ANSWER = 30
"""Pieces, as in `run_squad.py` of google-research/bert."""
_EVALUATED = 32
"""Windows in a batch of the dev split."""


class SpanModel(nn.Module):
    """Hugging Face's `BertForQuestionAnswering` over documents without padding.

    [T, 2] of T tokens: the logits of being an answer's first and last piece.
    """

    def __init__(self, encoder: Encoder, seed: int) -> None:
        from transformers import BertForQuestionAnswering

        super().__init__()
        self.module: Any = encoder.with_head(BertForQuestionAnswering, 2, seed)

    def forward(self, batch: MicroBatch) -> Tensor:
        out: Tensor = self.module.qa_outputs(encode_documents(self.module.bert, batch))
        return out


class Spans:
    """A `Problem`: a dataset of spans as windows. Examples to train are windows, as in `run_squad.py`.

    ``null_threshold``: by how much the score of no answer must exceed that of the best span (SQuAD 2.0).
    """

    def __init__(
        self,
        dataset: SpanDataset,
        tokenizer: Any,
        lengths: Lengths,
        on_bad: OnBad = "error",
        null_threshold: float = 0.0,
    ) -> None:
        self._dataset = dataset
        self._train, self._dev = (
            Windows(split, tokenizer, lengths, on_bad) for split in (dataset.train, dataset.dev)
        )
        self._targets = torch.from_numpy(self._train.targets(np.arange(len(self._train))))
        self._null_threshold = null_threshold
        self.count = len(self._train)
        self.metrics: tuple[str, ...] = METRICS_UNANSWERABLE if dataset.has_unanswerable else METRICS
        self.about = {
            "name": dataset.name,
            "metrics": self.metrics,
            "train": len(self._train.questions),
            "dev": len(self._dev.questions),
            "windows": {"train": len(self._train), "dev": len(self._dev)},
            "lengths": asdict(lengths),
            **({"null_threshold": null_threshold} if dataset.has_unanswerable else {}),
        }

    def model(self, encoder: Encoder, seed: int) -> SpanModel:
        return SpanModel(encoder, seed)

    def loss(self, model: nn.Module, numbers: I64, device: torch.device) -> Tensor:
        """[], the mean of the cross entropies of first and last piece."""
        batch = self._train.batch(numbers).to(device)
        assert batch.follows is not None
        return F.cross_entropy(by_document(model(batch), batch), self._targets.to(device)[batch.follows])

    def scores(self, model: nn.Module, device: torch.device) -> dict[str, float]:
        logits = _logits(model, self._dev, device)
        if not all(np.isfinite(rows).all() for rows in logits):
            return dict.fromkeys(self.metrics, math.nan)
        threshold = self._null_threshold if self._dataset.has_unanswerable else math.inf
        return self._scored(best_answers(self._dev, logits, threshold))

    def baselines(self) -> dict[str, dict[str, Any]]:
        questions = self._dev.questions
        found = {
            "random words": self._scored(random_words(self._train.questions, questions)),
            "most similar sentence": self._scored(most_similar_sentences(questions)),
        }
        if self._dataset.has_unanswerable:
            found["no answer"] = self._scored([""] * len(questions))
        return found

    def _scored(self, predicted: list[str]) -> dict[str, float]:
        answers = [question.answers for question in self._dev.questions]
        return span_scores(predicted, answers, has_unanswerable=self._dataset.has_unanswerable)


def by_document(values: Tensor, batch: MicroBatch) -> Tensor:
    """[T, C] of the tokens → [D, L, C] of documents of up to L tokens, -inf where one is shorter."""
    documents = batch.documents
    longest = documents.groups[-1][1]
    number = torch.repeat_interleave(documents.offsets.diff(), output_size=len(values))
    rows = values.new_full((documents.count, longest, values.shape[1]), -math.inf)
    rows[number, batch.positions] = values
    return rows


@torch.no_grad()
def _logits(model: nn.Module, windows: Windows, device: torch.device) -> list[NDArray[np.float32]]:
    """[tokens, 2] of each window."""
    found: dict[int, NDArray[np.float32]] = {}
    for begin in range(0, len(windows), _EVALUATED):
        batch = windows.batch(np.arange(begin, min(len(windows), begin + _EVALUATED))).to(device)
        assert batch.follows is not None
        parts = np.split(model(batch).float().cpu().numpy(), batch.documents.offsets.cpu()[1:-1].numpy())
        found.update(zip(batch.follows.tolist(), parts, strict=True))
    return [found[number] for number in range(len(windows))]


def best_answers(windows: Windows, logits: list[NDArray[np.float32]], null_threshold: float) -> list[str]:
    """The text of each question's best span over all windows, or "" for no answer.

    A span's score is the sum of its two logits; that of no answer is [CLS]'s, the least over the windows. A span has at
    most `LONGEST_ANSWER` pieces, and begins where its window has most context. All spans are compared, where
    `run_squad.py` compares those of the 20 best beginnings and ends.
    """
    best = [(-math.inf, "")] * len(windows.questions)
    null = np.full(len(windows.questions), math.inf)
    for number, rows in enumerate(logits):
        owner, begin = int(windows.owner[number]), windows.context_begin(number)
        null[owner] = min(null[owner], float(rows[0].sum()))
        inside = rows[begin:-1]  # without the last [SEP]
        score, first, last = best_span(inside[:, 0], inside[:, 1], windows.has_most_context(number))
        if score > best[owner][0]:
            best[owner] = (score, windows.text(number, first, last))
    return [
        "" if missing - score > null_threshold else text
        for (score, text), missing in zip(best, null.tolist(), strict=True)
    ]


def best_span(
    first: NDArray[np.float32], last: NDArray[np.float32], may_begin: NDArray[np.bool_]
) -> tuple[float, int, int]:
    """(score, first piece, last piece) of the best span; [n] each. -inf if none may begin."""
    beginnings = np.where(may_begin, first, -np.inf)
    ends = np.pad(last, (0, LONGEST_ANSWER - 1), constant_values=-np.inf)
    sums = beginnings[:, None] + sliding_window_view(ends, LONGEST_ANSWER)  # [n, pieces - 1]
    begin, more = divmod(int(sums.argmax()), LONGEST_ANSWER)
    return float(sums[begin, more]), begin, begin + more
