"""The training loop. Its random choices are keyed by seed, step and rank: a resumed run has the same bits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sharded_lamb import faults
from sharded_lamb.core.host_values import to_device
from sharded_lamb.recipes.training import checkpoint
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.checkpoint import Position, StopRequested
from sharded_lamb.recipes.training.config_io import dump_config
from sharded_lamb.recipes.training.metrics import MetricsLog, peak_memory, summarize_ratios
from sharded_lamb.recipes.training.precision import resolve_precision
from sharded_lamb.recipes.training.ranks import Ranks, use_threads
from sharded_lamb.recipes.training.sharded_backend import ShardedBackend
from sharded_lamb.recipes.training.stateless_rng import key_of
from sharded_lamb.recipes.training.step_clock import SECTIONS, StepClock
from sharded_lamb.recipes.vision.batches import MicroBatch, Read, TrainBatches, mixed, to_batch
from sharded_lamb.recipes.vision.config import VisionConfig
from sharded_lamb.recipes.vision.evaluate import evaluate, handle_broken
from sharded_lamb.recipes.vision.images import Splits, open_splits
from sharded_lamb.recipes.vision.model import build_backend, build_model, layer_of, whole
from sharded_lamb.recipes.vision.schedule import Schedule
from sharded_lamb.recipes.vision.transforms import mixing
from sharded_lamb.telemetry import LayerNorms
from sharded_lamb.watchdog import Watchdog

Beat = Callable[[str], None]
"""Reports progress of this rank: `Watchdog.beat`."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run. `metrics` is the last object of metrics.jsonl; None if a signal stopped the run."""

    run_dir: Path
    metrics: dict[str, Any] | None


@dataclass(frozen=True)
class _Job:
    """The constants of a run."""

    config: VisionConfig
    ranks: Ranks
    data: Splits
    plan: BatchPlan
    schedule: Schedule
    batches: TrainBatches
    evaluated: dict[str, Read]  # by split
    mixup: Any  # timm's, or None
    backend: ShardedBackend
    stop: StopRequested
    run_dir: Path


def run(config: VisionConfig, resume: str | None, ranks: Ranks) -> Outcome:
    """Train as configured. Collective.

    Raises:
        ValueError, OSError: bad input, on every rank. Earlier checkpoints stay.
    """
    stop = StopRequested()
    config = replace(config, speed=replace(config.speed, precision=resolve_precision(config.speed.precision)))
    run_dir = Path(config.run_dir)
    candidates = checkpoint.choose(run_dir / "checkpoints", resume, ranks)
    job = _set_up(config, ranks, run_dir, stop)
    try:
        with Watchdog(config.faults.hang_timeout_s) as watchdog:
            return _train(job, candidates, watchdog.beat)
    finally:
        job.backend.close()


def _set_up(config: VisionConfig, ranks: Ranks, run_dir: Path, stop: StopRequested) -> _Job:
    use_threads(config.speed.threads)
    data = _open(config, ranks)
    settings, count = config.schedule, len(data.splits["train"].labels)
    per_epoch = count // settings.global_batch
    if not per_epoch:
        raise ValueError(
            f"schedule.global_batch={settings.global_batch}: expected at most the {count} training images"
        )
    steps, batch = settings.epochs * per_epoch, settings.global_batch
    plan = BatchPlan(steps, batch, ranks.world_size, settings.max_micro_batch, batch, 0)
    mixup = mixing(config, len(data.classes))
    sizes = {stop - start for start, stop in plan.step_plan(0, 0, 0).micro_batches}
    if mixup is not None and any(size % 2 for size in sizes):
        raise ValueError(
            f"augment.mix mixes pairs: expected micro-batches of even sizes, got {sorted(sizes)}; change "
            f"schedule.max_micro_batch={settings.max_micro_batch} or schedule.global_batch={batch}"
        )
    batches = TrainBatches(data.splits["train"], config, plan, per_epoch)
    held_out = (name for name in data.splits if name != "train")
    evaluated = {name: Read(data.splits[name], config, is_training=False) for name in held_out}
    model = build_model(config, len(data.classes)).to(ranks.device)
    if ranks.is_first:
        print(_headline(config, model, data, plan, per_epoch), flush=True)
    backend = build_backend(config, model)
    schedule = Schedule(settings, per_epoch)
    return _Job(config, ranks, data, plan, schedule, batches, evaluated, mixup, backend, stop, run_dir)


def _open(config: VisionConfig, ranks: Ranks) -> Splits:
    """The splits; rank 0 fills the cache of `datasets` first. An error of any rank is raised on every rank."""
    opened: list[Splits] = []
    ranks.from_first(lambda: opened.append(open_splits(config.data)))
    failure = ""
    try:
        opened = opened or [open_splits(config.data)]
    except (ValueError, OSError) as error:
        failure = str(error)
    found = failure or opened[0].digest()
    ranks.agree("the data", found, "data.source must be one folder that every rank sees")
    return opened[0]


def _headline(config: VisionConfig, model: Any, data: Splits, plan: BatchPlan, per_epoch: int) -> str:
    parameters = sum(p.numel() for p in model.parameters())
    left_out = "".join(f"; {count} wrong labels of {name} left out" for name, count in data.left_out.items())
    return (
        f"{config.model.name} of {parameters:,} parameters, {len(data.classes)} classes, stage {config.stage} on "
        f"{plan.world_size} ranks, {config.optimizer.variant}, {config.speed.precision}: {config.schedule.epochs} "
        f"epochs of {per_epoch} steps of {plan.global_batch} = {plan.world_size} ranks x {plan.accumulation(0)} "
        f"accumulated; lr {config.schedule.lr:g}{left_out}"
    )


def _train(job: _Job, candidates: list[Path], beat: Beat) -> Outcome:
    """Trains from the first complete checkpoint of `candidates`, if any, to the end or a request to stop."""
    config, ranks, digest = job.config, job.ranks, job.data.digest()
    position = Position(0, 0, config.digest(), digest, ranks.world_size)
    if candidates:
        position = checkpoint.load(Position, candidates, job.backend, ranks)
        checkpoint.check_position(position, config, digest, candidates[0])
    ranks.from_first(partial(_begin, job))
    log = None
    if ranks.is_first:
        done, title = position.total_step, job.run_dir.name
        log = MetricsLog(job.run_dir, done, title, job.plan.steps, counted="images")
    try:
        position, stopped = _Loop(job, log, beat).run(position)
        return Outcome(job.run_dir, None if stopped else _finish(job, position, log, beat))
    finally:
        if log is not None:
            log.close()


def _begin(job: _Job) -> None:
    job.run_dir.mkdir(parents=True, exist_ok=True)
    (job.run_dir / "config.yaml").write_text(dump_config(job.config))
    (job.run_dir / "classes.txt").write_text("\n".join(job.data.classes) + "\n")


@dataclass(frozen=True)
class _Started:
    """A step whose work was started; its numbers are on the device."""

    position: Position  # after it
    lr: float
    sums: torch.Tensor  # [2] of this rank
    broken: int
    clock: StepClock


@dataclass
class _Loop:
    """The steps on this rank. A step's numbers are read while the next one runs: the host waits for no device."""

    job: _Job
    log: MetricsLog | None
    beat: Beat
    _unread: _Started | None = None
    _seconds: float = 0.0
    _last_save: float = field(default_factory=time.monotonic)
    _reported: set[str] = field(default_factory=set)

    def run(self, position: Position) -> tuple[Position, bool]:
        """(position after the last step, or before a stop; whether a signal stopped it)."""
        job, config = self.job, self.job.config
        self._seconds = position.seconds
        for step, read, clock in self._batches(position.total_step):
            faults.point("step", step=step)
            self.beat(f"step {step}")
            stop, due, broken = self._totals(read)
            sums = self._accumulate(step, read, clock)
            clock.enter("log")
            self._record()
            clock.enter("optimizer")
            lr = job.schedule.lr(step)
            job.backend.step(lr)
            clock.end()
            done, total = step + 1, job.plan.steps
            sample = done * job.plan.global_batch
            position = replace(position, total_step=done, sample=sample, world_size=job.ranks.world_size)
            self._unread = _Started(position, lr, sums, int(broken), clock)
            epoch, rest = divmod(done, job.schedule.steps_per_epoch)
            if not rest and epoch % config.log.validation_epochs == 0 and done < total:
                self._record(scores(job, "validation", self.beat))
            if done % config.checkpoint.every_steps == 0 or stop or due or done == total:
                self._record()
                position = replace(position, seconds=self._seconds)
                self._save(position)
            if stop:
                return position, True
        return position, False

    def _batches(self, begin: int) -> Iterator[tuple[int, list[MicroBatch], StepClock]]:
        """Each step with its data, and a clock started at the request for it."""
        steps = self.job.batches.steps(begin, self.job.ranks.rank)
        for step in range(begin, self.job.plan.steps):
            clock = StepClock(self.job.ranks.device)
            clock.enter("data")
            yield step, next(steps), clock

    def _totals(self, read: list[MicroBatch]) -> tuple[float, float, float]:
        """Over ranks: a signal asked to stop, a save is due by the clock, broken images. Collective."""
        job = self.job
        own = [name for micro in read for name in micro.broken]
        every = job.config.checkpoint.every_minutes
        is_due = every is not None and time.monotonic() - self._last_save > 60 * every
        stop, due, broken = job.ranks.sum(
            [job.stop.signal is not None, is_due and job.ranks.is_first, len(own)]
        )
        if broken:
            names = set(handle_broken(job.ranks, own, job.config)) - self._reported
            self._reported |= names
            for name in sorted(names) if job.ranks.is_first else ():
                print(f"broken image, read the next instead: {name}", flush=True)
        return stop, due, broken

    def _accumulate(self, step: int, read: list[MicroBatch], clock: StepClock) -> torch.Tensor:
        """Forward and backward of one global batch; returns this rank's [2] sums.

        Backends average gradients over ranks, so each sum of losses is divided by the global batch and multiplied by
        the number of ranks.
        """
        job, config, ranks = self.job, self.job.config, self.job.ranks
        scale = to_device([ranks.world_size / job.plan.global_batch], None, ranks.device)
        sums = torch.zeros(2, device=ranks.device)
        # Autocast forgets its casts of weights at the end of the outermost context: one a step casts them once.
        with torch.autocast(ranks.device.type, enabled=False):
            for index, micro in enumerate(read):
                self.beat(f"step {step}: micro-batch {index}")
                clock.enter("forward")
                smoothing = config.loss.label_smoothing
                batch = to_batch(micro, len(job.data.classes), config, ranks.device, smoothing=smoothing)
                if job.mixup is not None:
                    batch = mixed(batch, job.mixup, key_of(config.seed, "mix", step, ranks.rank, index))
                torch.manual_seed(key_of(config.seed, "dropout", step, ranks.rank, index) >> 1)
                sums += job.backend.accumulate(batch, scale, last=index == len(read) - 1, entered=clock.enter)
        return sums

    def _save(self, position: Position) -> None:
        job = self.job
        self.beat(f"checkpoint after step {position.total_step}")
        checkpoint.save(job.run_dir / "checkpoints", job.config.checkpoint.keep, position, job.backend)
        self._last_save = time.monotonic()

    def _record(self, evaluated: Mapping[str, Any] | None = None) -> None:
        """Gathers every rank's numbers of the last started step and writes its row, unless that was done.

        ``evaluated``: numbers of the validation split after the step, for its row.
        """
        step, self._unread = self._unread, None
        if step is None:
            return
        job, done = self.job, step.position.total_step
        with step.clock.completed():
            own = [*step.sums.double().tolist(), *step.clock.seconds(), peak_memory(job.ranks.device)]
            norm = job.backend.grad_norm()
            norms: dict[str, LayerNorms] = {}
            if (done - 1) % job.config.log.trust_ratio_steps == 0:
                norms = job.backend.layer_norms()
        gathered = job.ranks.gather(own)
        sections = gathered[:, 2:-1]
        each = sections.sum(1)
        seconds = each.max().item()
        self._seconds += seconds
        if self.log is None:
            return
        batch = job.plan.global_batch
        loss, right = (gathered[:, :2].sum(0) / batch).tolist()
        slowest = sections.amax(0).tolist()
        row = {
            "step": done,
            "epoch": (done - 1) // job.schedule.steps_per_epoch,
            "loss": loss,
            "lr": step.lr,
            "grad_norm": norm,
            "accuracy": right,
            "images_per_s": batch / seconds,
            "sample": step.position.sample,
            "broken_images": step.broken,
            "step_s": seconds,
            **{f"{name}_s": value for name, value in zip(SECTIONS, slowest, strict=True)},
            "data_wait_share": (sections[:, 0] / each).max().item(),
            "peak_memory_bytes": int(gathered[:, -1].max().item()),
            "slowest_rank": int(each.argmax()),
            **summarize_ratios({name: own.ratio for name, own in norms.items()}, layer_of),
        }
        self.log.step({**row, **(evaluated or {})}, norms)


def scores(job: _Job, split: str, beat: Beat) -> dict[str, Any]:
    """Loss and accuracy of the weights, and of their average if there is one. Collective."""
    prefix = {"validation": "heldout"}.get(split, split)

    def score() -> tuple[float, float, int, int]:
        images, classes = job.evaluated[split], len(job.data.classes)
        own = evaluate(job.backend.losses, images, classes, job.config, job.ranks, beat)
        return own.loss, own.accuracy, own.images, own.broken

    loss, accuracy, images, broken = score()
    row: dict[str, Any] = {
        f"{prefix}_loss": loss,
        f"{prefix}_accuracy": accuracy,
        f"{prefix}_images": images,
        f"{prefix}_broken_images": broken,
    }
    if job.config.optimizer.ema_decay is not None:
        with job.backend.averaged():
            row[f"{prefix}_ema_loss"], row[f"{prefix}_ema_accuracy"] = score()[:2]
    return row


def _finish(job: _Job, position: Position, log: MetricsLog | None, beat: Beat) -> dict[str, Any]:
    """Evaluates validation and test; writes the last metrics, the picture and the weights."""
    row: dict[str, Any] = {"step": position.total_step}
    for split in ("validation", "test"):
        if split in job.evaluated:
            row |= scores(job, split, beat)
    row["training_seconds"] = position.seconds
    beat("outputs")
    weights = job.backend.weights()

    def write() -> None:
        from safetensors.torch import save_file

        assert log is not None
        assert weights is not None
        log.final(row)
        if job.config.log.picture:
            log.picture()
        save_file(whole(job.backend.model, weights), job.run_dir / "model.safetensors")
        for name in ("heldout", "test"):
            if f"{name}_accuracy" in row:
                print(
                    f"{name}: loss {row[f'{name}_loss']:.4f}, accuracy {row[f'{name}_accuracy']:.2%}",
                    flush=True,
                )

    job.ranks.from_first(write)
    return row
