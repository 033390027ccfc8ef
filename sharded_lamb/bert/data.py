"""Batches: (seed, phase, global sample index) → model input, made ahead of time by a thread."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sharded_lamb.bert.attention import Documents
from sharded_lamb.bert.masking import Masker
from sharded_lamb.bert.packing import MIN_NSP_TOKENS
from sharded_lamb.bert.shards import PackedSamples
from sharded_lamb.bert.tokenizer import Vocabulary
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.stateless_rng import I64, Permutation, draw, key_of, uniform


@dataclass(frozen=True)
class MicroBatch:
    """One forward's input: T tokens of documents that lie one after another, and M labels."""

    tokens: Tensor  # [T] int64
    segments: Tensor  # [T] int64: 0 in A, 1 in B
    positions: Tensor  # [T] int64: position inside its document
    documents: Documents  # attention stays inside each
    output_positions: Tensor  # [M] int64, into tokens: where labels are predicted
    labels: Tensor  # [M] int64
    follows: Tensor | None  # [D] int64: 0 if B follows A, 1 if it was replaced (Hugging Face's convention)
    causal_labels: int  # the last labels, which are those of causal documents
    causal_samples: int

    @staticmethod
    def of(
        rows: I64,
        chosen: NDArray[np.bool_],
        masked: I64,
        segments: I64 | None,
        follows: I64 | None,
        *,
        pad: int,
        cls: int,
        is_causal: NDArray[np.bool_] | None = None,
    ) -> MicroBatch:
        """The documents of [B, L] ``rows``, each of which begins with ``cls``; ``pad`` is left out.

        ``chosen``: the pieces to predict; ``masked``: the rows with masks; ``segments``: [B, L]; ``follows``: [B];
        ``is_causal``: [B], in which case a piece is predicted at the position before it.
        """
        kept = np.flatnonzero(rows != pad)
        begins = np.flatnonzero(rows.ravel()[kept] == cls)
        lengths = np.diff(begins, append=len(kept))
        causal = (
            np.zeros(len(begins), bool) if is_causal is None else is_causal[kept[begins] // rows.shape[1]]
        )
        order = np.lexsort((lengths, causal))  # stable
        places = np.concatenate([kept[begins[d] : begins[d] + lengths[d]] for d in order])
        ends = np.cumsum(lengths[order])
        positions = np.arange(len(kept)) - np.repeat(ends - lengths[order], lengths[order])
        predicted = np.flatnonzero(chosen.ravel()[places])
        first_causal = len(places) - lengths[causal].sum()
        return MicroBatch(
            tokens=torch.from_numpy(masked.ravel()[places]),
            segments=torch.from_numpy(
                np.zeros_like(places) if segments is None else segments.ravel()[places]
            ),
            positions=torch.from_numpy(positions),
            documents=Documents.of(lengths[order], rows.shape[1], int(causal.sum())),
            output_positions=torch.from_numpy(predicted if is_causal is None else predicted - 1),
            labels=torch.from_numpy(rows.ravel()[places][predicted]),
            follows=None if follows is None else torch.from_numpy(follows[order]),
            causal_labels=int((predicted >= first_causal).sum()),
            causal_samples=0 if is_causal is None else int(is_causal.sum()),
        )

    def pinned(self) -> MicroBatch:
        """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._each(Tensor.pin_memory, self.documents.pinned())

    def to(self, device: torch.device) -> MicroBatch:
        if device.type == "cpu":
            return self
        return self._each(lambda x: x.to(device, non_blocking=True), self.documents.to(device))

    def _each(self, moved: Callable[[Tensor], Tensor], documents: Documents) -> MicroBatch:
        fields: dict[str, Any] = {n: moved(x) for n, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(self, documents=documents, **fields)


@dataclass(frozen=True)
class StepData:
    """One rank's part of one optimizer step."""

    step: int
    first_sample: int
    global_batch: int
    micro_batches: tuple[MicroBatch, ...]
    # On this rank:
    predicted: int
    causal: int  # predicted in causal documents
    causal_samples: int
    tokens: int
    pairs: int  # of tokens of which the first attends to the second


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

    def micro_batch(self, indices: I64, *, shuffled: bool = True, step: int = 0) -> MicroBatch:
        """The samples with these global indices, masked as in ``step`` (`shuffled=False`: in the shards' own order)."""
        numbers = self.sample_numbers(indices) if shuffled else indices
        rows = self.samples.rows(numbers)
        follows = None
        if self.samples.manifest.nsp:
            rows, follows = self._next_sentences(rows, numbers, indices)
        masked, chosen = self._masker.at(step)(rows, indices)
        segments = None if follows is None else self._segments(rows)
        pad, cls, is_causal = self._vocabulary.pad, self._vocabulary.cls, self._masker.is_causal(indices)
        return MicroBatch.of(rows, chosen, masked, segments, follows, pad=pad, cls=cls, is_causal=is_causal)

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

    def step(self, plan: BatchPlan, step: int, first: int, rank: int, *, pin: bool = False) -> StepData:
        """The data of `rank` in a step whose samples begin at `first`."""
        cuts = plan.step_plan(step, first, rank)
        micro = tuple(self.micro_batch(np.arange(a, b), step=step) for a, b in cuts.micro_batches)
        if pin:
            micro = tuple(one.pinned() for one in micro)
        return StepData(
            step=step,
            first_sample=first,
            global_batch=cuts.global_batch,
            micro_batches=micro,
            predicted=sum(len(m.labels) for m in micro),
            causal=sum(m.causal_labels for m in micro),
            causal_samples=sum(m.causal_samples for m in micro),
            tokens=sum(len(m.tokens) for m in micro),
            pairs=sum(m.documents.pairs for m in micro),
        )

    def steps(self, plan: BatchPlan, begin: int, rank: int, *, pin: bool = False) -> Iterator[StepData]:
        """Steps `begin` … of the phase; a thread makes each, and pins it, while the one before trains."""
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as pool:
            pending: Future[StepData] | None = None
            first = plan.samples_before(begin)
            for step in range(begin, plan.steps):
                current = pending or pool.submit(self.step, plan, step, first, rank, pin=pin)
                first += plan.batch_at(step)
                last = step + 1 == plan.steps
                data = current.result()
                pending = None if last else pool.submit(self.step, plan, step + 1, first, rank, pin=pin)
                yield data
