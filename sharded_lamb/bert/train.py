"""The training loop: a step's result doesn't depend on its split over ranks and micro-batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from sharded_lamb import faults
from sharded_lamb.bert import outputs
from sharded_lamb.bert.batch import plan_batches
from sharded_lamb.bert.config import PhaseConfig, RunConfig
from sharded_lamb.bert.data import BatchSource, StepData
from sharded_lamb.bert.evaluate import HeldOut, held_out
from sharded_lamb.bert.masking import masker_of
from sharded_lamb.bert.metrics import layer_of, peak_flops
from sharded_lamb.bert.model import ModelSize, build_bert, model_size, whole_bert
from sharded_lamb.bert.prepare import prepare
from sharded_lamb.bert.schedule import schedule_of
from sharded_lamb.bert.shards import Manifest, PackedSamples
from sharded_lamb.bert.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from sharded_lamb.bert.train_backend import TrainBackend, build_backend, check_parallel
from sharded_lamb.core.host_values import to_device
from sharded_lamb.recipes.training import checkpoint
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.checkpoint import Position, StopRequested
from sharded_lamb.recipes.training.metrics import MetricsLog, peak_memory, summarize_ratios
from sharded_lamb.recipes.training.precision import resolve_precision
from sharded_lamb.recipes.training.ranks import Ranks, use_threads
from sharded_lamb.recipes.training.stateless_rng import key_of
from sharded_lamb.recipes.training.step_clock import SECTIONS, StepClock
from sharded_lamb.telemetry import LayerNorms
from sharded_lamb.watchdog import Watchdog

Beat = Callable[[str], None]
"""Reports progress of this rank: `Watchdog.beat`."""


@dataclass(frozen=True)
class PhasePosition(Position):
    """`step` steps of phase `phase` are done; `total_step` counts over all phases."""

    phase: int = 0
    step: int = 0
    tokens: int = 0  # trained on so far
    remedy: ClassVar[str] = "continue from it with start_from"


@dataclass(frozen=True)
class Outcome:
    """The result of a run. `metrics` is the last object of metrics.jsonl; None if a signal stopped the run."""

    run_dir: Path
    metrics: dict[str, Any] | None


@dataclass(frozen=True)
class Job:
    """The constants of a run."""

    config: RunConfig
    ranks: Ranks
    run_dir: Path
    folders: tuple[Path, ...]  # prepared shards of each phase
    manifest: Manifest  # of the first phase
    tokenizer: Any
    vocabulary: Vocabulary
    backend: TrainBackend
    size: ModelSize
    flops: float  # of one rank, for MFU
    stop: StopRequested

    def source(self, phase: int) -> BatchSource:
        key = key_of(self.config.seed, "train", phase)
        masker = masker_of(self.config, phase, self.vocabulary, key_of(key, "mask"))
        return BatchSource(PackedSamples(self.folders[phase], "train"), self.vocabulary, masker, key)

    def heldout_source(self, phase: int, causal_fraction: float | None) -> BatchSource:
        """Masked as at the end of training."""
        key = key_of(self.config.seed, "heldout", 0)
        masker = masker_of(self.config, phase, self.vocabulary, key_of(key, "mask"))
        probability = self.config.masking.last_probability
        masker = replace(masker, probability=probability, change=0.0, causal_fraction=causal_fraction)
        return BatchSource(PackedSamples(self.folders[phase], "heldout"), self.vocabulary, masker, key)


def run(config: RunConfig, resume: str | None, ranks: Ranks) -> Outcome:
    """Train as configured. Collective.

    Raises:
        ValueError, OSError: bad input, on every rank. Earlier checkpoints stay.
    """
    stop = StopRequested()
    config = replace(config, speed=replace(config.speed, precision=resolve_precision(config.speed.precision)))
    check_parallel(config, ranks.world_size)
    plans = [plan_batches(config, phase, ranks.world_size) for phase in config.phases]
    run_dir = Path(config.run_dir)
    candidates = checkpoint.choose(run_dir / "checkpoints", resume, ranks)
    job = _set_up(config, ranks, run_dir, stop)
    try:
        with Watchdog(config.faults.hang_timeout_s) as watchdog:
            return _train(job, plans, candidates, watchdog.beat)
    finally:
        job.backend.close()


def _train(job: Job, plans: list[BatchPlan], candidates: list[Path], beat: Beat) -> Outcome:
    """Trains from the first complete checkpoint of `candidates`, if any, to the end or a request to stop."""
    config, ranks, run_dir = job.config, job.ranks, job.run_dir
    digest = ",".join(PackedSamples(folder, "train").manifest.digest() for folder in job.folders)
    ranks.agree("prepared data", digest, "data.prepared must be one folder that every node sees")
    position = PhasePosition(0, 0, config.digest(), digest, ranks.world_size)
    if candidates:
        position = checkpoint.load(PhasePosition, candidates, job.backend, ranks)
        checkpoint.check_position(position, config, digest, candidates[0])
    elif config.start_from is not None:
        # Options stay as configured.
        job.backend.load(Path(config.start_from), options=False)
        job.backend.restart_steps()
    ranks.from_first(partial(outputs.begin, run_dir, config, job.tokenizer))
    log = _open_log(job, position) if ranks.is_first else None
    try:
        for number in range(position.phase, len(config.phases)):
            if number > position.phase:
                if config.cosine is None:
                    job.backend.restart_steps()
                position = replace(position, phase=number, step=0, sample=0)
            position, stopped = _Phase(job, number, plans[number], log, beat).run(position)
            if stopped:
                return Outcome(run_dir, None)
        return Outcome(run_dir, _finish(job, position, log, beat))
    finally:
        if log is not None:
            log.close()


def _set_up(config: RunConfig, ranks: Ranks, run_dir: Path, stop: StopRequested) -> Job:
    use_threads(config.speed.threads)
    lengths = [phase.sequence_length for phase in config.phases]
    folders = ranks.from_first(lambda: [prepare(config, length) for length in lengths])
    tokenizer = load_tokenizer(folders[0] / "tokenizer")
    vocabulary = vocabulary_of(tokenizer)
    bert = build_bert(config, vocabulary, folders[0] / "unigram.npy").to(ranks.device)
    size = model_size(bert)
    backend = build_backend(config, bert, ranks.world_size)
    speed = config.speed
    flops, flops_source = peak_flops(ranks.device, speed.peak_tflops, is_fp32=speed.precision == "fp32")
    if ranks.is_first:
        print(outputs.headline(config, size, ranks, flops, flops_source), flush=True)
    manifest = PackedSamples(folders[0], "train").manifest
    return Job(
        config,
        ranks,
        run_dir,
        tuple(folders),
        manifest,
        tokenizer,
        vocabulary,
        backend,
        size,
        flops,
        stop,
    )


def _open_log(job: Job, position: PhasePosition) -> MetricsLog:
    total = sum(phase.steps for phase in job.config.phases)
    return MetricsLog(job.run_dir, position.total_step, job.run_dir.name, total, counted="tokens")


@dataclass(frozen=True)
class _StepTotals:
    """Sums over ranks for one step, known before its forward."""

    predicted: float
    causal: float  # predicted in causal documents
    causal_samples: float
    tokens: float
    pairs: float  # of tokens of which the first attends to the second
    documents: float
    stop_signals: float  # ranks that a signal asked to stop
    due_saves: float  # 1 if checkpoint.every_minutes are up on rank 0


@dataclass(frozen=True)
class _Started:
    """A step whose work was started; its numbers are on the device."""

    position: PhasePosition  # after it
    batch: int
    lr: float
    totals: _StepTotals
    sums: torch.Tensor  # [4] of this rank
    clock: StepClock


class _Phase:
    """One phase on this rank. A step's numbers are read while the next one runs: the host waits for no device."""

    def __init__(self, job: Job, number: int, plan: BatchPlan, log: MetricsLog | None, beat: Beat) -> None:
        self.job, self.number, self.plan, self.log, self.beat = job, number, plan, log, beat
        self.settings: PhaseConfig = job.config.phases[number]
        self.schedule = schedule_of(job.config, number)
        self._last_save = time.monotonic()
        self._unread: _Started | None = None
        self._seconds = 0.0

    def run(self, position: PhasePosition) -> tuple[PhasePosition, bool]:
        """(position after the phase or the last step before a stop, whether a signal stopped it)."""
        job = self.job
        if job.ranks.is_first:
            print(outputs.phase_line(self.settings, self.schedule, self.plan, position.step), flush=True)
        self._seconds = position.seconds
        for data, clock in self._batches(position.step):
            faults.point("step", step=position.total_step)
            self.beat(f"step {position.total_step}: data")
            totals = self._totals(data)
            sums = self._accumulate(data, totals, clock)
            clock.enter("log")
            self._record()
            clock.enter("optimizer")
            lr = self.schedule.lr(data.step)
            job.backend.step(lr)
            clock.end()
            position = replace(
                position,
                step=data.step + 1,
                total_step=position.total_step + 1,
                sample=data.first_sample + data.global_batch,
                world_size=job.ranks.world_size,
                tokens=position.tokens + int(totals.tokens),
            )
            self._unread = _Started(position, data.global_batch, lr, totals, sums, clock)
            every = job.config.log.heldout_steps
            if every is not None and position.total_step % every == 0:
                self._record(_heldout_row(job, self.number, self.beat))
            stopping = totals.stop_signals > 0
            regular = position.total_step % job.config.checkpoint.every_steps == 0
            if regular or stopping or totals.due_saves > 0 or position.step == self.plan.steps:
                self._record()
                position = replace(position, seconds=self._seconds)
                self._save(position)
            if stopping:
                return position, True
        return position, False

    def _batches(self, begin: int) -> Iterator[tuple[StepData, StepClock]]:
        """Each step's data, and a clock started at the request for it."""
        ranks = self.job.ranks
        source = self.job.source(self.number)
        steps = source.steps(self.plan, begin, ranks.rank, pin=ranks.device.type == "cuda")
        while True:
            clock = StepClock(ranks.device)
            clock.enter("data")
            data = next(steps, None)
            if data is None:
                return
            yield data, clock

    def _totals(self, data: StepData) -> _StepTotals:
        job = self.job
        documents = sum(micro.documents.count for micro in data.micro_batches)
        stop, due = job.stop.signal is not None, self._save_is_due() and job.ranks.is_first
        predicted = [data.predicted, data.causal, data.causal_samples]
        return _StepTotals(*job.ranks.sum([*predicted, data.tokens, data.pairs, documents, stop, due]))

    def _scale(self, batch: int, totals: _StepTotals) -> tuple[float, float]:
        """Factors of the two sums of `Losses` in the loss of a step.

        Means over pieces and over pairs are added. Masked and causal means are weighted by their share of the samples,
        as in ltgoslo/gpt-bert, where a rank has one objective and every rank's mean the same weight.
        """
        if self.job.config.data.nsp:
            return 1 / totals.predicted, 1 / totals.documents
        share = totals.causal_samples / batch
        return (1 - share) / max(1, totals.predicted - totals.causal), share / max(1, totals.causal)

    def _accumulate(self, data: StepData, totals: _StepTotals, clock: StepClock) -> torch.Tensor:
        """Forward and backward of one global batch; returns this rank's [4] sums.

        Backends average gradients over ranks, so each loss is divided by the count of the whole global batch and
        multiplied by the number of ranks: neither accumulation nor world size changes the result.
        """
        job, ranks = self.job, self.job.ranks
        scale = to_device([*self._scale(data.global_batch, totals)], None, ranks.device) * ranks.world_size
        # A key, so that dropout in a resumed run equals that of an uninterrupted one.
        torch.manual_seed(key_of(job.config.seed, "dropout", self.number, data.step, ranks.rank) >> 1)
        sums = torch.zeros(4, device=ranks.device)
        last = len(data.micro_batches) - 1
        # Autocast forgets its casts of weights at the end of the outermost context: one a step casts them once.
        with torch.autocast(ranks.device.type, enabled=False):
            for index, micro in enumerate(data.micro_batches):
                self.beat(f"step {data.step}: micro-batch {index}")
                clock.enter("forward")
                batch = micro.to(ranks.device)
                sums += job.backend.accumulate(batch, scale, last=index == last, entered=clock.enter)
        return sums

    def _save_is_due(self) -> bool:
        every = self.job.config.checkpoint.every_minutes
        return every is not None and time.monotonic() - self._last_save > 60 * every

    def _save(self, position: PhasePosition) -> None:
        job = self.job
        folder, keep = job.run_dir / "checkpoints", job.config.checkpoint.keep
        self.beat(f"checkpoint after step {position.total_step}")
        checkpoint.save(folder, keep, position, job.backend)
        self._last_save = time.monotonic()

    def _record(self, evaluated: Mapping[str, Any] | None = None) -> None:
        """Gathers every rank's numbers of the last started step and writes its row, unless that was done.

        ``evaluated``: numbers of the held-out split after the step, for its row.
        """
        step, self._unread = self._unread, None
        if step is None:
            return
        job, totals, position = self.job, step.totals, step.position
        with step.clock.completed():
            own = [*step.sums.double().tolist(), *step.clock.seconds(), peak_memory(job.ranks.device)]
            norm = job.backend.grad_norm()
            norms: dict[str, LayerNorms] = {}
            if (position.total_step - 1) % job.config.log.trust_ratio_steps == 0:
                norms = job.backend.layer_norms()
        gathered = job.ranks.gather(own)
        sections = gathered[:, 4:-1]
        each = sections.sum(1)
        seconds = each.max().item()
        self._seconds += seconds
        if self.log is None:
            return
        work = job.size.flops(int(totals.tokens), int(totals.predicted), int(totals.pairs))
        slowest = sections.amax(0).tolist()
        row = {
            "step": position.total_step,
            "phase": self.number,
            **_predictions(job.config, gathered[:, :4].sum(0).tolist(), totals, step.batch),
            "lr": step.lr,
            "grad_norm": norm,
            "tokens_per_s": totals.tokens / seconds,
            "tokens": position.tokens,
            "global_batch": step.batch,
            "sample": position.sample,
            "step_s": seconds,
            **{f"{name}_s": value for name, value in zip(SECTIONS, slowest, strict=True)},
            "data_wait_share": (sections[:, 0] / each).max().item(),
            "mfu": work / seconds / (job.flops * job.ranks.world_size),
            "peak_memory_bytes": int(gathered[:, -1].max().item()),
            "slowest_rank": int(each.argmax()),
            "unigram_entropy": job.manifest.unigram_entropy,
            **summarize_ratios({name: own.ratio for name, own in norms.items()}, layer_of),
        }
        self.log.step({**row, **(evaluated or {})}, norms)


def _predictions(config: RunConfig, sums: list[float], totals: _StepTotals, batch: int) -> dict[str, Any]:
    """A step's losses and accuracies, from the sums of `Losses` over its global ``batch``."""
    loss, other_loss, right, other_right = sums
    if config.data.nsp:
        nsp = {"nsp_loss": other_loss / totals.documents, "nsp_accuracy": other_right / totals.documents}
        return {"loss": loss / totals.predicted, "accuracy": right / totals.predicted, **nsp}
    share, masked = totals.causal_samples / batch, totals.predicted - totals.causal
    losses = loss / max(1, masked), other_loss / max(1, totals.causal)
    row = {
        "loss": (1 - share) * losses[0] + share * losses[1],
        "accuracy": (right + other_right) / max(1, totals.predicted),
    }
    if config.masking.causal_fraction is None:
        return row
    return {
        **row,
        "masked_loss": losses[0] if masked else None,
        "causal_loss": losses[1] if totals.causal else None,
    }


def _heldout_row(job: Job, phase: int, beat: Beat) -> dict[str, Any]:
    """Loss and accuracy of the (averaged) weights on the held-out split at the phase's length. Collective."""
    config = job.config
    if not PackedSamples(job.folders[phase], "heldout").manifest.samples("heldout"):
        return {"heldout_loss": None, "heldout_accuracy": None}
    batch, limit = config.max_micro_batch(config.phases[phase]), config.log.heldout_batches

    def evaluated(causal_fraction: float | None) -> HeldOut:
        source = job.heldout_source(phase, causal_fraction)
        return held_out(job.backend.losses, source, batch, job.ranks, limit, beat)

    is_mixed = config.masking.causal_fraction is not None
    with job.backend.averaged():
        masked = evaluated(0.0 if is_mixed else None)
        causal = evaluated(1.0) if is_mixed else None
    row: dict[str, Any] = {"heldout_loss": masked.loss, "heldout_accuracy": masked.accuracy}
    if masked.nsp_accuracy is not None:
        row["heldout_nsp_accuracy"] = masked.nsp_accuracy
    if causal is not None:
        row |= {"heldout_causal_loss": causal.loss, "heldout_causal_accuracy": causal.accuracy}
    return row


def _finish(job: Job, position: PhasePosition, log: MetricsLog | None, beat: Beat) -> dict[str, Any]:
    """Evaluates the held-out split; writes the last metrics, the picture and the Hugging Face folder."""
    config, ranks = job.config, job.ranks
    row: dict[str, Any] = {
        "step": position.total_step,
        **_heldout_row(job, len(config.phases) - 1, beat),
        "unigram_entropy": job.manifest.unigram_entropy,
        "tokens": position.tokens,
        "training_seconds": position.seconds,
        "mean_tokens_per_s": position.tokens / max(position.seconds, 1e-9),
    }

    beat("outputs")
    with job.backend.averaged():
        weights = job.backend.weights()

    def write() -> None:
        assert log is not None
        assert weights is not None
        log.final(row)
        log.picture()
        outputs.finish(job.run_dir, config, whole_bert(job.backend.model, weights), job.tokenizer, row)

    ranks.from_first(write)
    return row
