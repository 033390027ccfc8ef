"""Batches: (seed, phase, global sample index) → model input, made ahead of time by a thread."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sharded_lamb.bert.batch import BatchPlan
from sharded_lamb.bert.masking import Masker
from sharded_lamb.bert.packing import MIN_NSP_TOKENS
from sharded_lamb.bert.shards import PackedSamples
from sharded_lamb.bert.stateless_rng import I64, Permutation, draw, key_of, uniform
from sharded_lamb.bert.tokenizer import Vocabulary


@dataclass(frozen=True)
class MicroBatch:
    """One forward's input: B sequences of length L, with M masked positions."""

    tokens: Tensor  # [B, L] int64
    segments: Tensor | None  # [B, L] int64: 0 in A, 1 in B; None without next-sentence prediction
    positions: Tensor  # [B, L] int64: position inside its document
    documents: Tensor | None  # [B, L] int64: attention stays inside equal numbers; None: one document a row
    masked_positions: Tensor  # [M] int64, into tokens.flatten()
    labels: Tensor  # [M] int64
    follows: Tensor | None  # [B] int64: 0 if B follows A, 1 if it was replaced (Hugging Face's convention)

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            name: None if value is None else value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
        }
        return MicroBatch(**moved)


@dataclass(frozen=True)
class StepData:
    """One rank's part of one optimizer step."""

    step: int
    first_sample: int
    global_batch: int
    micro_batches: tuple[MicroBatch, ...]
    predicted: int  # on this rank
    tokens: int  # on this rank, without padding


class BatchSource:
    """Samples of one phase in their shuffled order, as model input.

    Sample g of the phase is sample permutation(epoch)(g mod N) of the shards, epoch = g // N, and g is the key of its
    mask: g is the whole state.
    """

    def __init__(self, samples: PackedSamples, vocabulary: Vocabulary, masker: Masker, key: int) -> None:
        if not len(samples):
            raise ValueError(
                f"{samples.folder}: the {samples.split} split holds no sample; prepare more text"
            )
        self.samples, self._vocabulary, self._masker, self._key = samples, vocabulary, masker, key
        self._order = lru_cache(maxsize=4)(self._permutation)

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(len(self.samples), key_of(self._key, "order", epoch))

    def sample_numbers(self, indices: I64) -> I64:
        """Global sample indices → rows of the shards."""
        epochs, offsets = np.divmod(indices, len(self.samples))
        out = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._order(int(epoch))(offsets[here])
        return out

    def micro_batch(self, indices: I64, *, shuffled: bool = True) -> MicroBatch:
        """The samples with these global indices (`shuffled=False`: in the shards' own order)."""
        numbers = self.sample_numbers(indices) if shuffled else indices
        rows = self.samples.rows(numbers)
        follows = None
        if self.samples.manifest.nsp:
            rows, follows = self._next_sentences(rows, numbers, indices)
        masked, chosen = self._masker(rows, indices)
        documents, positions = self._structure(rows)
        single = bool((documents == 1).all())
        return MicroBatch(
            tokens=torch.from_numpy(masked),
            segments=torch.from_numpy(self._segments(rows)) if follows is not None else None,
            positions=torch.from_numpy(positions),
            documents=None if single else torch.from_numpy(documents),
            masked_positions=torch.from_numpy(np.flatnonzero(chosen)),
            labels=torch.from_numpy(rows[chosen]),
            follows=None if follows is None else torch.from_numpy(follows),
        )

    def _structure(self, rows: I64) -> tuple[I64, I64]:
        """(document number from 1, 0 for padding; position inside the document)."""
        begins = rows == self._vocabulary.cls
        columns = np.arange(rows.shape[1])
        documents = np.where(rows == self._vocabulary.pad, 0, np.cumsum(begins, 1))
        positions: I64 = columns - np.maximum.accumulate(np.where(begins, columns, 0), 1)
        return documents, positions

    def _segments(self, rows: I64) -> I64:
        is_sep = rows == self._vocabulary.sep
        after = (np.cumsum(is_sep, 1) - is_sep) > 0
        segments: I64 = (after & (rows != self._vocabulary.pad)).astype(np.int64)
        return segments

    def _next_sentences(self, rows: I64, numbers: I64, indices: I64) -> tuple[I64, I64]:
        """Half of the rows get the B of a random other row."""
        total = len(self.samples)
        replaced = (uniform(key_of(self._key, "replaced"), indices) < 0.5) & (total > 1)
        jump = 1 + (draw(key_of(self._key, "partner"), indices) % np.uint64(max(1, total - 1))).astype(
            np.int64
        )
        partners = self.samples.rows((numbers + jump) % total)
        out = rows.copy()
        for i in np.flatnonzero(replaced):
            own, other = (np.flatnonzero(r == self._vocabulary.sep) for r in (rows[i], partners[i]))
            begin = own[0] + 1
            b = partners[i, other[0] + 1 : other[1]][: max(MIN_NSP_TOKENS // 2, rows.shape[1] - begin - 1)]
            b = b[: rows.shape[1] - begin - 1]
            out[i, begin:] = self._vocabulary.pad
            out[i, begin : begin + len(b)] = b
            out[i, begin + len(b)] = self._vocabulary.sep
        return out, replaced.astype(np.int64)

    def step(self, plan: BatchPlan, step: int, first: int, rank: int) -> StepData:
        """The data of `rank` in a step whose samples begin at `first`."""
        cuts = plan.step_plan(step, first, rank)
        micro = tuple(self.micro_batch(np.arange(start, stop)) for start, stop in cuts.micro_batches)
        return StepData(
            step=step,
            first_sample=first,
            global_batch=cuts.global_batch,
            micro_batches=micro,
            predicted=sum(len(m.labels) for m in micro),
            tokens=sum(int((m.tokens != self._vocabulary.pad).sum()) for m in micro),
        )

    def steps(self, plan: BatchPlan, begin: int, rank: int) -> Iterator[StepData]:
        """Steps `begin` … of the phase; a thread makes each while the one before trains."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            pending: Future[StepData] | None = None
            first = plan.samples_before(begin)
            for step in range(begin, plan.steps):
                current = pending or pool.submit(self.step, plan, step, first, rank)
                first += plan.batch_at(step)
                last = step + 1 == plan.steps
                data = current.result()
                pending = None if last else pool.submit(self.step, plan, step + 1, first, rank)
                yield data
