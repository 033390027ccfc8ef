"""Batches: (seed, phase, global sample index) → what the model sees, and a thread that makes them in time."""

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
from sharded_lamb.bert.keyed import I64, Permutation, draw, key_of, uniform
from sharded_lamb.bert.masking import Masker
from sharded_lamb.bert.packing import MIN_NSP_TOKENS
from sharded_lamb.bert.shards import PackedSamples
from sharded_lamb.bert.tokenizer import Pieces


@dataclass(frozen=True)
class MicroBatch:
    """One forward's input. B sequences of length L, of which M places are predicted."""

    tokens: Tensor  # [B, L] int64
    segments: Tensor | None  # [B, L] int64: 0 in A, 1 in B; None without next-sentence prediction
    positions: Tensor  # [B, L] int64: place inside its document
    documents: Tensor | None  # [B, L] int64: attention stays inside equal numbers; None: every row is one
    places: Tensor  # [M] int64: predicted places, in tokens.flatten()
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

    Sample number g of the phase is sample permutation(epoch)(g mod N) of the shards, epoch = g // N; its mask
    is keyed by g. So g is the whole state.
    """

    def __init__(self, samples: PackedSamples, pieces: Pieces, masker: Masker, key: int) -> None:
        if not len(samples):
            raise ValueError(
                f"{samples.folder}: the {samples.split} split holds no sample; prepare more text"
            )
        self.samples, self._pieces, self._masker, self._key = samples, pieces, masker, key
        self._order = lru_cache(maxsize=4)(self._permutation)

    def _permutation(self, epoch: int) -> Permutation:
        return Permutation(len(self.samples), key_of(self._key, "order", epoch))

    def sample_numbers(self, indices: I64) -> I64:
        """Global sample indices → rows of the shards."""
        epochs, places = np.divmod(indices, len(self.samples))
        out = np.empty_like(indices)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            out[here] = self._order(int(epoch))(places[here])
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
            places=torch.from_numpy(np.flatnonzero(chosen)),
            labels=torch.from_numpy(rows[chosen]),
            follows=None if follows is None else torch.from_numpy(follows),
        )

    def _structure(self, rows: I64) -> tuple[I64, I64]:
        """(document number from 1, 0 for padding; place inside the document)."""
        begins = rows == self._pieces.cls
        here = np.arange(rows.shape[1])
        documents = np.where(rows == self._pieces.pad, 0, np.cumsum(begins, 1))
        positions: I64 = here - np.maximum.accumulate(np.where(begins, here, 0), 1)
        return documents, positions

    def _segments(self, rows: I64) -> I64:
        is_sep = rows == self._pieces.sep
        after = (np.cumsum(is_sep, 1) - is_sep) > 0
        segments: I64 = (after & (rows != self._pieces.pad)).astype(np.int64)
        return segments

    def _next_sentences(self, rows: I64, numbers: I64, indices: I64) -> tuple[I64, I64]:
        """Half of the rows get the B of another row instead of their own."""
        total = len(self.samples)
        replaced = (uniform(key_of(self._key, "replaced"), indices) < 0.5) & (total > 1)
        jump = 1 + (draw(key_of(self._key, "partner"), indices) % np.uint64(max(1, total - 1))).astype(
            np.int64
        )
        partners = self.samples.rows((numbers + jump) % total)
        out = rows.copy()
        for i in np.flatnonzero(replaced):
            own, other = (np.flatnonzero(r == self._pieces.sep) for r in (rows[i], partners[i]))
            begin = own[0] + 1
            b = partners[i, other[0] + 1 : other[1]][: max(MIN_NSP_TOKENS // 2, rows.shape[1] - begin - 1)]
            b = b[: rows.shape[1] - begin - 1]
            out[i, begin:] = self._pieces.pad
            out[i, begin : begin + len(b)] = b
            out[i, begin + len(b)] = self._pieces.sep
        return out, replaced.astype(np.int64)

    def step(self, plan: BatchPlan, step: int, first: int, rank: int) -> StepData:
        """What `rank` sees in a step whose samples begin at `first`."""
        cuts = plan.step_plan(step, first, rank)
        micro = tuple(self.micro_batch(np.arange(start, stop)) for start, stop in cuts.micro_batches)
        return StepData(
            step=step,
            first_sample=first,
            global_batch=cuts.global_batch,
            micro_batches=micro,
            predicted=sum(len(m.labels) for m in micro),
            tokens=sum(int((m.tokens != self._pieces.pad).sum()) for m in micro),
        )

    def steps(self, plan: BatchPlan, begin: int, rank: int) -> Iterator[StepData]:
        """Steps `begin` … of the phase, each made by a thread while the one before trains."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            coming: Future[StepData] | None = None
            first = plan.samples_before(begin)
            for step in range(begin, plan.steps):
                now = coming or pool.submit(self.step, plan, step, first, rank)
                first += plan.batch_at(step)
                last = step + 1 == plan.steps
                data = now.result()
                coming = None if last else pool.submit(self.step, plan, step + 1, first, rank)
                yield data
