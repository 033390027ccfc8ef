"""Vision's part of a run. Its random choices are keyed by seed, step and rank: a resumed run has the same bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from sharded_lamb.core.host_values import to_device
from sharded_lamb.recipes.training import loop
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.checkpoint import Position
from sharded_lamb.recipes.training.config_io import dump_config
from sharded_lamb.recipes.training.loop import Beat, Measured, Outcome, Recipe, Row
from sharded_lamb.recipes.training.metrics import MetricsLog, summarize_ratios
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.training.stateless_rng import key_of
from sharded_lamb.recipes.vision.batches import MicroBatch, Read, TrainBatches, mixed, to_batch
from sharded_lamb.recipes.vision.config import VisionConfig
from sharded_lamb.recipes.vision.evaluate import evaluate, handle_broken
from sharded_lamb.recipes.vision.images import Splits, open_splits
from sharded_lamb.recipes.vision.model import Batch, build_backend, build_model, layer_of, whole
from sharded_lamb.recipes.vision.schedule import Schedule
from sharded_lamb.recipes.vision.transforms import mixing


@dataclass(frozen=True)
class _Step(loop.Step):
    broken: int  # images


def run(config: VisionConfig, resume: str | None, ranks: Ranks) -> Outcome:
    """As `recipes.training.loop.train`."""
    return loop.train(config, resume, ranks, _set_up)


def _set_up(config: VisionConfig, ranks: Ranks) -> _Training:
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
    splits = {name: Read(data.splits[name], config, is_training=False) for name in held_out}
    model = build_model(config, len(data.classes)).to(ranks.device)
    if ranks.is_first:
        print(_headline(config, model, data, plan, per_epoch), flush=True)
    backend = build_backend(config, model)
    start = Position(0, 0, config.digest(), data.digest(), ranks.world_size)
    schedule = Schedule(settings, per_epoch)
    return _Training(
        config, ranks, backend, start, steps, data.classes, plan, schedule, batches, splits, mixup
    )


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


@dataclass(frozen=True)
class _Training(Recipe):
    config: VisionConfig
    classes: tuple[str, ...]
    plan: BatchPlan
    schedule: Schedule
    batches: TrainBatches
    splits: dict[str, Read]  # to evaluate
    mixup: Any  # timm's, or None
    counted: ClassVar[str] = "images"
    _reported: set[str] = field(default_factory=set)  # names of broken images

    def begin(self, position: Position) -> None:
        def write() -> None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            (self.run_dir / "config.yaml").write_text(dump_config(self.config))
            (self.run_dir / "classes.txt").write_text("\n".join(self.classes) + "\n", encoding="utf-8")

        self.ranks.from_first(write)

    def data(self, position: Position) -> Iterator[list[MicroBatch]]:
        return self.batches.steps(position.total_step, self.ranks.rank)

    def step(self, data: list[MicroBatch], position: Position, *, stop: bool, due: bool) -> _Step:
        own, ranks = [name for micro in data for name in micro.broken], self.ranks
        stops, dues, broken = ranks.sum([stop, due, len(own)])
        if broken:
            names = set(handle_broken(ranks, own, self.config)) - self._reported
            self._reported.update(names)
            for name in sorted(names) if ranks.is_first else ():
                print(f"broken image, read the next instead: {name}", flush=True)
        number, batch = position.total_step, self.plan.global_batch
        scale = to_device([ranks.world_size / batch], None, ranks.device)
        done, world_size = number + 1, ranks.world_size
        position = replace(position, total_step=done, sample=done * batch, world_size=world_size)
        saves, lr = dues > 0 or done == self.plan.steps, self.schedule.lr(number)
        return _Step(position, lr, len(data), scale, saves, stops > 0, int(broken))

    def batch(self, data: list[MicroBatch], step: _Step, index: int) -> Batch:
        config, ranks, smoothing = self.config, self.ranks, self.config.loss.label_smoothing
        batch = to_batch(data[index], len(self.classes), config, ranks.device, smoothing=smoothing)
        key = (step.position.total_step - 1, ranks.rank, index)
        if self.mixup is not None:
            batch = mixed(batch, self.mixup, key_of(config.seed, "mix", *key))
        torch.manual_seed(key_of(config.seed, "dropout", *key) >> 1)
        return batch

    def row(self, step: _Step, measured: Measured) -> Row:
        done, batch = step.position.total_step, self.plan.global_batch
        loss, right = (total / batch for total in measured.sums)
        return {
            "step": done,
            "epoch": (done - 1) // self.schedule.steps_per_epoch,
            "loss": loss,
            "lr": step.lr,
            "grad_norm": measured.grad_norm,
            "accuracy": right,
            "images_per_s": batch / measured.seconds,
            "sample": step.position.sample,
            "broken_images": step.broken,
            **measured.timing,
            **measured.ranks,
            **summarize_ratios(measured.norms, layer_of),
        }

    def evaluation(self, position: Position, beat: Beat) -> Row:
        epoch, rest = divmod(position.total_step, self.schedule.steps_per_epoch)
        is_end = position.total_step == self.plan.steps  # `finish` evaluates
        is_due = not rest and epoch % self.config.log.validation_epochs == 0 and not is_end
        return self._scores("validation", beat) if is_due else {}

    def _scores(self, split: str, beat: Beat) -> Row:
        """Loss and accuracy of the weights, and of their average if there is one. Collective."""
        prefix = {"validation": "heldout"}.get(split, split)

        def score() -> tuple[float, float, int, int]:
            images, classes = self.splits[split], len(self.classes)
            own = evaluate(self.backend.losses, images, classes, self.config, self.ranks, beat)
            return own.loss, own.accuracy, own.images, own.broken

        loss, accuracy, images, broken = score()
        row: Row = {
            f"{prefix}_loss": loss,
            f"{prefix}_accuracy": accuracy,
            f"{prefix}_images": images,
            f"{prefix}_broken_images": broken,
        }
        if self.config.optimizer.ema_decay is not None:
            with self.backend.averaged():
                row[f"{prefix}_ema_loss"], row[f"{prefix}_ema_accuracy"] = score()[:2]
        return row

    def finish(self, position: Position, log: MetricsLog | None, beat: Beat) -> Row:
        """The last metrics, of validation and test, the picture and the weights."""
        row: Row = {"step": position.total_step}
        for split in ("validation", "test"):
            if split in self.splits:
                row |= self._scores(split, beat)
        row["training_seconds"] = position.seconds
        beat("outputs")
        weights = self.backend.weights()

        def write() -> None:
            from safetensors.torch import save_file

            assert log is not None
            assert weights is not None
            log.final(row)
            if self.config.log.picture:
                log.picture()
            save_file(whole(self.backend.model, weights), self.run_dir / "model.safetensors")
            for name in ("heldout", "test"):
                if f"{name}_accuracy" in row:
                    print(
                        f"{name}: loss {row[f'{name}_loss']:.4f}, accuracy {row[f'{name}_accuracy']:.2%}",
                        flush=True,
                    )

        self.ranks.from_first(write)
        return row
