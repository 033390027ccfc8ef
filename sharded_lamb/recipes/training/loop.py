"""Runs a training: resumes, steps, saves, evaluates, stops on a signal. A `Recipe` provides what is its own."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.recipes.training import checkpoint
from sharded_lamb.recipes.training.checkpoint import Position, StopRequested
from sharded_lamb.recipes.training.metrics import MetricsLog, peak_memory
from sharded_lamb.recipes.training.precision import resolved
from sharded_lamb.recipes.training.ranks import Ranks, use_threads
from sharded_lamb.recipes.training.sharded_backend import TrainBackend
from sharded_lamb.recipes.training.step_clock import SECTIONS, StepClock
from sharded_lamb.telemetry import LayerNorms
from sharded_lamb.watchdog import Watchdog

Beat = Callable[[str], None]
"""Reports progress of this rank: `Watchdog.beat`."""

Row = dict[str, Any]
"""An object of metrics.jsonl."""


@dataclass(frozen=True)
class Outcome:
    """The result of a run. `metrics` is the last object of metrics.jsonl; None if a signal stopped the run."""

    run_dir: Path
    metrics: Row | None

    def exit_code(self, config: Any, ranks: Ranks) -> int:
        """`checkpoint.requeue_exit_code` if a signal stopped the run; else 0, and rank 0 prints where results are."""
        if self.metrics is None:
            requeue: int = config.checkpoint.requeue_exit_code
            return requeue
        if ranks.is_first:
            print(f"results in {self.run_dir}", flush=True)
        return 0


@dataclass(frozen=True)
class Step:
    """What all ranks know of an optimizer step before its forward. A recipe adds what its row needs."""

    position: Position  # after the step
    lr: float
    micro_batches: int  # of a rank
    # [n] factors of the sums of losses. Backends average gradients over ranks, so a loss is divided by the count of the
    # whole global batch and multiplied by the number of ranks: neither accumulation nor world size changes the result.
    scale: Tensor
    saves: bool  # a checkpoint follows: the phase ends, or a save is due
    stops: bool  # a rank was asked to


@dataclass(frozen=True)
class Measured:
    """The numbers of a step over all ranks."""

    sums: list[float]  # of what `TrainBackend.accumulate` returned
    grad_norm: float | None
    seconds: float  # of the slowest rank
    timing: Row
    ranks: Row  # their memory, and which is slowest
    norms: dict[str, LayerNorms]  # of every log.trust_ratio_steps-th step; {} of others


@dataclass(frozen=True)
class Recipe(ABC):
    """What a run trains. All ranks call every method but `row`, in the same order."""

    config: Any  # a dataclass, with `run_dir`, `checkpoint`, `faults`, `log.trust_ratio_steps`, `speed` as in BERT's
    ranks: Ranks
    backend: TrainBackend
    start: Any  # the `Position`, or a subclass, of a run that is not resumed; others are of its class
    total_steps: int
    counted: ClassVar[str]  # what `{counted}_per_s` of a row counts

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @abstractmethod
    def begin(self, position: Any) -> None:
        """Creates the run folder. A run that is not resumed may load weights."""

    @abstractmethod
    def data(self, position: Any) -> Iterator[Any]:
        """This rank's part of every remaining step. A request for the first of a phase begins that phase."""

    @abstractmethod
    def step(self, data: Any, position: Any, *, stop: bool, due: bool) -> Step:
        """The step after ``position``. Sums its counts over ranks, and ``stop`` (a signal asked this rank to stop) and
        ``due`` (rank 0 should save)."""

    @abstractmethod
    def batch(self, data: Any, step: Any, index: int) -> Any:
        """A micro-batch on the device. Seeds dropout with a key, so that a resumed run has the same."""

    @abstractmethod
    def row(self, step: Any, measured: Measured) -> Row:
        """The row of a step: step, loss, lr, `{counted}_per_s`, ``measured.timing`` and more. Called by rank 0 only."""

    @abstractmethod
    def evaluation(self, position: Any, beat: Beat) -> Row:
        """Numbers of held-out data for the row of the step before ``position``; {} if they are not due."""

    @abstractmethod
    def finish(self, position: Any, log: MetricsLog | None, beat: Beat) -> Row:
        """Evaluates what was trained; writes the results and the last row, which it returns."""


def train(config: Any, resume: str | None, ranks: Ranks, set_up: Callable[[Any, Ranks], Recipe]) -> Outcome:
    """Train as configured. Collective.

    Args:
        resume: a checkpoint's folder, "auto" for the newest complete one, or None.
        set_up: makes the recipe from the configuration with the resolved precision.

    Raises:
        ValueError, OSError: bad input, on every rank. Earlier checkpoints stay.
    """
    stop = StopRequested()
    config = resolved(config)
    checkpoint.choose(config, resume, ranks)  # a run that is refused prepares nothing
    use_threads(config.speed.threads)
    recipe = set_up(config, ranks)
    try:
        with checkpoint.claimed(config.run_dir, ranks):
            candidates = checkpoint.choose(config, resume, ranks)  # another run may have ended meanwhile
            with Watchdog(config.faults.hang_timeout_s) as watchdog:
                return _train(recipe, candidates, stop, watchdog.beat)
    finally:
        recipe.backend.close()


def _train(recipe: Recipe, candidates: list[Path], stop: StopRequested, beat: Beat) -> Outcome:
    """Trains from the first complete checkpoint of `candidates`, if any, to the end or a request to stop."""
    position, run_dir, log = recipe.start, recipe.run_dir, None
    if candidates:
        position = checkpoint.load(type(position), candidates, recipe.backend, recipe.ranks)
        checkpoint.check_position(position, recipe.config, recipe.start.data_digest, candidates[0])
    recipe.begin(position)
    if recipe.ranks.is_first:
        done, total = position.total_step, recipe.total_steps
        log = MetricsLog(run_dir, done, run_dir.name, total, counted=recipe.counted)
    try:
        position, stopped = _Loop(recipe, stop, log, beat, position.seconds).run(position)
        return Outcome(run_dir, None if stopped else recipe.finish(position, log, beat))
    finally:
        if log is not None:
            log.close()


@dataclass
class _Loop:
    """The steps on this rank. A step's numbers are read while the next one runs: the host waits for no device."""

    recipe: Recipe
    stop: StopRequested
    log: MetricsLog | None
    beat: Beat
    seconds: float  # of all steps that were read
    _unread: tuple[Step, Tensor, StepClock] | None = None  # with this rank's sums
    _last_save: float = field(default_factory=time.monotonic)

    def run(self, position: Position) -> tuple[Position, bool]:
        """(position after the last step, or before a stop; whether a signal stopped it)."""
        recipe, settings = self.recipe, self.recipe.config.checkpoint
        remaining = recipe.data(position)
        while True:
            clock = StepClock(recipe.ranks.device)
            clock.enter("data")
            data = next(remaining, None)
            if data is None:
                return position, False
            faults.point("step", step=position.total_step)
            self.beat(f"step {position.total_step}: data")
            due = settings.every_minutes is not None and (
                time.monotonic() - self._last_save > 60 * settings.every_minutes
            )
            asked = self.stop.signal is not None
            step = recipe.step(data, position, stop=asked, due=due and recipe.ranks.is_first)
            sums = self._accumulate(data, step, clock)
            clock.enter("log")
            self._record()
            clock.enter("optimizer")
            recipe.backend.step(step.lr)
            clock.end()
            position, self._unread = step.position, (step, sums, clock)
            evaluation = recipe.evaluation(position, self.beat)
            if evaluation:
                self._record(evaluation)
            if position.total_step % settings.every_steps == 0 or step.saves or step.stops:
                self._record()
                position = replace(position, seconds=self.seconds)
                self.beat(f"checkpoint after step {position.total_step}")
                checkpoint.save(recipe.run_dir / "checkpoints", settings.keep, position, recipe.backend)
                self._last_save = time.monotonic()
            if step.stops:
                return position, True

    def _accumulate(self, data: Any, step: Step, clock: StepClock) -> Tensor:
        """Forward and backward of one global batch; returns this rank's sums."""
        recipe, device = self.recipe, self.recipe.ranks.device
        sums = torch.zeros(1, device=device)
        # Autocast forgets its casts of weights at the end of the outermost context: one a step casts them once.
        with torch.autocast(device.type, enabled=False):
            for index in range(step.micro_batches):
                self.beat(f"step {step.position.total_step - 1}: micro-batch {index}")
                clock.enter("forward")
                batch, last = recipe.batch(data, step, index), index == step.micro_batches - 1
                sums = sums + recipe.backend.accumulate(batch, step.scale, last=last, entered=clock.enter)
        return sums

    def _record(self, evaluation: Row | None = None) -> None:
        """Gathers all ranks' numbers of the last started step and writes its row, unless that was done."""
        if self._unread is None:
            return
        (step, sums, clock), self._unread = self._unread, None
        recipe, every = self.recipe, self.recipe.config.log.trust_ratio_steps
        with clock.completed():
            own = [*sums.double().tolist(), *clock.seconds(), peak_memory(recipe.ranks.device)]
            norm = recipe.backend.grad_norm()
            norms = {} if (step.position.total_step - 1) % every else recipe.backend.layer_norms()
        gathered = recipe.ranks.gather(own)
        sections = gathered[:, len(sums) : -1]
        each = sections.sum(1)
        seconds = each.max().item()
        self.seconds += seconds
        if self.log is None:
            return
        slowest = zip(SECTIONS, sections.amax(0).tolist(), strict=True)
        timing = {
            "step_s": seconds,
            **{f"{name}_s": value for name, value in slowest},
            "data_wait_share": (sections[:, 0] / each).max().item(),
        }
        ranks = {"peak_memory_bytes": int(gathered[:, -1].max().item()), "slowest_rank": int(each.argmax())}
        totals = gathered[:, : len(sums)].sum(0).tolist()
        row = recipe.row(step, Measured(totals, norm, seconds, timing, ranks, norms))
        self.log.step({**row, **(evaluation or {})}, norms)
