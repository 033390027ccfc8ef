"""BERT's part of a run: a step's result doesn't depend on its split over ranks and micro-batches."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from sharded_lamb.bert import outputs
from sharded_lamb.bert.config import RunConfig
from sharded_lamb.bert.data import BatchSource, MicroBatch, StepData
from sharded_lamb.bert.evaluate import HeldOut, check_sentences, held_out
from sharded_lamb.bert.masking import masker_of
from sharded_lamb.bert.metrics import layer_of, peak_flops
from sharded_lamb.bert.model import ModelSize, build_bert, model_size, whole_bert
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.schedule import schedule_of
from sharded_lamb.bert.shards import Manifest, PackedSamples
from sharded_lamb.bert.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from sharded_lamb.bert.train_backend import build_backend, check_parallel
from sharded_lamb.core.host_values import to_device
from sharded_lamb.recipes.training import loop
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.checkpoint import Position
from sharded_lamb.recipes.training.loop import Beat, Measured, Outcome, Recipe, Row
from sharded_lamb.recipes.training.metrics import MetricsLog, summarize_ratios
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.training.stateless_rng import key_of


@dataclass(frozen=True)
class PhasePosition(Position):
    """`step` steps of phase `phase` are done; `total_step` counts over all phases."""

    phase: int = 0
    step: int = 0
    tokens: int = 0  # trained on so far
    remedy: ClassVar[str] = "continue from it with start_from"


@dataclass(frozen=True)
class _Counts:
    """Of a global batch."""

    predicted: float
    causal: float  # predicted in causal documents
    causal_samples: float
    tokens: float
    pairs: float  # of tokens of which the first attends to the second
    documents: float


@dataclass(frozen=True)
class _Step(loop.Step):
    position: PhasePosition
    global_batch: int
    counts: _Counts


def run(config: RunConfig, resume: str | None, ranks: Ranks) -> Outcome:
    """As `recipes.training.loop.train`."""
    return loop.train(config, resume, ranks, _set_up)


def _set_up(config: RunConfig, ranks: Ranks) -> _Pretraining:
    check_parallel(config, ranks.world_size)
    plans = [config.plan_batches(phase, ranks.world_size) for phase in config.phases]
    lengths = [phase.sequence_length for phase in config.phases]
    folders = ranks.from_first(lambda: [prepare(config, length) for length in lengths])
    manifests = [PackedSamples(folder, "train").manifest for folder in folders]
    digest = ",".join(manifest.digest() for manifest in manifests)
    ranks.agree("prepared data", digest, "data.prepared must be one folder that every node sees")
    tokenizer = load_tokenizer(folders[0] / "tokenizer")
    check_sentences(tokenizer, config.log.fill_mask, config.model.max_positions)
    vocabulary = vocabulary_of(tokenizer)
    bert = build_bert(config, vocabulary, folders[0] / "unigram.npy").to(ranks.device)
    size = model_size(bert)
    backend = build_backend(config, bert, ranks.world_size)
    speed = config.speed
    flops, flops_source = peak_flops(ranks.device, speed.peak_tflops, is_fp32=speed.precision == "fp32")
    if ranks.is_first:
        print(outputs.headline(config, size, ranks, flops, flops_source), flush=True)
    start = PhasePosition(0, 0, config.digest(), digest, ranks.world_size)
    common = (config, ranks, backend, start, sum(plan.steps for plan in plans))
    return _Pretraining(*common, plans, folders, manifests[0], tokenizer, vocabulary, size, flops)


@dataclass(frozen=True)
class _Pretraining(Recipe):
    config: RunConfig
    plans: list[BatchPlan]  # of each phase
    folders: list[Path]  # prepared shards of each phase
    manifest: Manifest  # of the first phase
    tokenizer: Any
    vocabulary: Vocabulary
    size: ModelSize
    flops: float  # of one rank, for MFU
    counted: ClassVar[str] = "tokens"

    def begin(self, position: PhasePosition) -> None:
        if not position.total_step and self.config.start_from is not None:
            # Options stay as configured.
            self.backend.load(Path(self.config.start_from), options=False)
            self.backend.restart_steps()
        self.ranks.from_first(partial(outputs.begin, self.run_dir, self.config, self.tokenizer))

    def data(self, position: PhasePosition) -> Iterator[tuple[int, StepData]]:
        """(phase, data) of every step."""
        config, ranks = self.config, self.ranks
        for phase in range(position.phase, len(config.phases)):
            if phase > position.phase and config.cosine is None:
                self.backend.restart_steps()
            begin = position.step if phase == position.phase else 0
            plan, schedule = self.plans[phase], schedule_of(config, phase)
            if ranks.is_first:
                print(outputs.phase_line(config.phases[phase], schedule, plan, begin), flush=True)
            source = self._source(phase, "train")
            for data in source.steps(plan, begin, ranks.rank, pin=ranks.device.type == "cuda"):
                yield phase, data

    def _source(self, phase: int, split: Literal["train", "heldout"], **changed: Any) -> BatchSource:
        """``changed``: fields of the masker."""
        key = key_of(self.config.seed, split, phase if split == "train" else 0)
        masker = masker_of(self.config, phase, self.vocabulary, key_of(key, "mask"))
        return BatchSource(
            PackedSamples(self.folders[phase], split), self.vocabulary, replace(masker, **changed), key
        )

    def step(self, data: tuple[int, StepData], position: PhasePosition, *, stop: bool, due: bool) -> _Step:
        phase, own = data
        documents = sum(micro.documents.count for micro in own.micro_batches)
        numbers = [own.predicted, own.causal, own.causal_samples, own.tokens, own.pairs, documents]
        *sums, stops, dues = self.ranks.sum([*numbers, stop, due])
        counts = _Counts(*sums)
        factors = _factors(counts, own.global_batch, nsp=self.config.data.nsp)
        position = replace(
            position,
            phase=phase,
            step=own.step + 1,
            total_step=position.total_step + 1,
            sample=own.first_sample + own.global_batch,
            world_size=self.ranks.world_size,
            tokens=position.tokens + int(counts.tokens),
        )
        return _Step(
            position,
            schedule_of(self.config, phase).lr(own.step),
            micro_batches=len(own.micro_batches),
            scale=to_device(factors, None, self.ranks.device) * self.ranks.world_size,
            saves=dues > 0 or position.step == self.plans[phase].steps,
            stops=stops > 0,
            global_batch=own.global_batch,
            counts=counts,
        )

    def batch(self, data: tuple[int, StepData], step: _Step, index: int) -> MicroBatch:
        phase, own = data
        if not index:
            torch.manual_seed(key_of(self.config.seed, "dropout", phase, own.step, self.ranks.rank) >> 1)
        return own.micro_batches[index].to(self.ranks.device)

    def row(self, step: _Step, measured: Measured) -> Row:
        position, seconds = step.position, measured.seconds
        counts = step.counts
        work = self.size.flops(int(counts.tokens), int(counts.predicted), int(counts.pairs))
        return {
            "step": position.total_step,
            "phase": position.phase,
            **_predictions(self.config, counts, step.global_batch, measured.sums),
            "lr": step.lr,
            "grad_norm": measured.grad_norm,
            "tokens_per_s": counts.tokens / seconds,
            "tokens": position.tokens,
            "global_batch": step.global_batch,
            "sample": position.sample,
            **measured.timing,
            "mfu": work / seconds / (self.flops * self.ranks.world_size),
            **measured.ranks,
            "unigram_entropy": self.manifest.unigram_entropy,
            **summarize_ratios(measured.norms, layer_of),
        }

    def evaluation(self, position: PhasePosition, beat: Beat) -> Row:
        every = self.config.log.heldout_steps
        return {} if every is None or position.total_step % every else self._held_out(position.phase, beat)

    def _held_out(self, phase: int, beat: Beat) -> Row:
        """Loss and accuracy of the (averaged) weights on the held-out split, masked as at the end of training."""
        config = self.config
        if not PackedSamples(self.folders[phase], "heldout").manifest.samples("heldout"):
            return {"heldout_loss": None, "heldout_accuracy": None}
        batch, limit = config.max_micro_batch(config.phases[phase]), config.log.heldout_batches
        probability = config.masking.last_probability

        def score(causal_fraction: float | None) -> HeldOut:
            changed = {"probability": probability, "change": 0.0, "causal_fraction": causal_fraction}
            source = self._source(phase, "heldout", **changed)
            return held_out(self.backend.losses, source, batch, self.ranks, limit, beat)

        is_mixed = config.masking.causal_fraction is not None
        with self.backend.averaged():
            masked = score(0.0 if is_mixed else None)
            causal = score(1.0) if is_mixed else None
        row: Row = {"heldout_loss": masked.loss, "heldout_accuracy": masked.accuracy}
        if masked.nsp_accuracy is not None:
            row["heldout_nsp_accuracy"] = masked.nsp_accuracy
        if causal is not None:
            row |= {"heldout_causal_loss": causal.loss, "heldout_causal_accuracy": causal.accuracy}
        return row

    def finish(self, position: PhasePosition, log: MetricsLog | None, beat: Beat) -> Row:
        """The last metrics, the picture and the Hugging Face folder."""
        row = {
            "step": position.total_step,
            **self._held_out(len(self.config.phases) - 1, beat),
            "unigram_entropy": self.manifest.unigram_entropy,
            "tokens": position.tokens,
            "training_seconds": position.seconds,
            "mean_tokens_per_s": position.tokens / max(position.seconds, 1e-9),
        }

        beat("outputs")
        with self.backend.averaged():
            weights = self.backend.weights()

        def write() -> None:
            assert log is not None
            assert weights is not None
            log.final(row)
            log.picture()
            outputs.finish(
                self.run_dir, self.config, whole_bert(self.backend.model, weights), self.tokenizer, row
            )

        self.ranks.from_first(write)
        return row


def _factors(counts: _Counts, batch: int, *, nsp: bool) -> list[float]:
    """Of the two sums of `Losses` in the loss of a step.

    Means over pieces and over pairs are added. Masked and causal means are weighted by their share of the samples,
    as in ltgoslo/gpt-bert, where a rank has one objective and every rank's mean the same weight.
    """
    if nsp:
        return [1 / counts.predicted, 1 / counts.documents]
    share = counts.causal_samples / batch
    return [(1 - share) / max(1, counts.predicted - counts.causal), share / max(1, counts.causal)]


def _predictions(config: RunConfig, counts: _Counts, batch: int, sums: list[float]) -> Row:
    """A step's losses and accuracies, from the sums of `Losses` over its global ``batch``."""
    loss, other_loss, right, other_right = sums
    if config.data.nsp:
        nsp = {"nsp_loss": other_loss / counts.documents, "nsp_accuracy": other_right / counts.documents}
        return {"loss": loss / counts.predicted, "accuracy": right / counts.predicted, **nsp}
    share, masked = counts.causal_samples / batch, counts.predicted - counts.causal
    losses = loss / max(1, masked), other_loss / max(1, counts.causal)
    row = {
        "loss": (1 - share) * losses[0] + share * losses[1],
        "accuracy": (right + other_right) / max(1, counts.predicted),
    }
    if config.masking.causal_fraction is None:
        return row
    return {
        **row,
        "masked_loss": losses[0] if masked else None,
        "causal_loss": losses[1] if counts.causal else None,
    }
