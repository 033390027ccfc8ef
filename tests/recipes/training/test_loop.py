"""The loop that recipes share, under a recipe as small as can be: least squares, trained by `Lamb` as the oracle."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from sharded_lamb import ShardedLamb
from sharded_lamb.checkpoint import read_contents
from sharded_lamb.optim.lamb import Lamb
from sharded_lamb.recipes.training import loop
from sharded_lamb.recipes.training.batch import BatchPlan
from sharded_lamb.recipes.training.checkpoint import Position
from sharded_lamb.recipes.training.loop import Beat, Measured, Recipe, Row, Step
from sharded_lamb.recipes.training.metrics import MetricsLog
from sharded_lamb.recipes.training.ranks import Ranks
from sharded_lamb.recipes.training.settings import CheckpointConfig, FaultsConfig
from sharded_lamb.recipes.training.sharded_backend import Entered, ShardedBackend
from tests.harness import run_ranks

STEPS, BATCH, LR = 6, 12, 0.05


@dataclass(frozen=True)
class Speed:
    precision: str = "fp32"
    threads: int = 1


@dataclass(frozen=True)
class Log:
    trust_ratio_steps: int = 2


@dataclass(frozen=True)
class Config:
    run_dir: str
    stop_at: int | None = None  # the step whose data arrive as rank 1 gets SIGTERM
    checkpoint: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(every_steps=4, keep=0))
    faults: FaultsConfig = field(default_factory=FaultsConfig)
    log: Log = field(default_factory=Log)
    speed: Speed = field(default_factory=Speed)

    def digest(self) -> str:
        return "settings"


class Errors(nn.Module):
    """Inputs [B, 3] → [1] the sum of squared errors."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(3, 1)
        with torch.no_grad():
            self.line.weight.copy_(torch.tensor([[0.5, 0.25, -1.0]]))
            self.line.bias.fill_(0.5)

    def forward(self, inputs: Tensor) -> Tensor:
        error = self.line(inputs)[:, 0] - inputs @ torch.tensor([1.0, -2.0, 3.0])
        return error.square().sum()[None]


def inputs(start: int, stop: int) -> Tensor:
    return torch.sin(torch.arange(start, stop)[:, None] * torch.tensor([1.0, 2.0, 5.0]))


@dataclass(frozen=True)
class LeastSquares(Recipe):
    counted: ClassVar[str] = "samples"

    def begin(self, position: Position) -> None:
        self.ranks.from_first(lambda: self.run_dir.mkdir(parents=True, exist_ok=True))

    def data(self, position: Position) -> Iterator[list[Tensor]]:
        plan = BatchPlan(STEPS, BATCH, self.ranks.world_size, 2, BATCH, 0)
        for step in range(position.total_step, STEPS):
            if step == self.config.stop_at and self.ranks.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield [inputs(*cut) for cut in plan.step_plan(step, step * BATCH, self.ranks.rank).micro_batches]

    def step(self, data: list[Tensor], position: Position, *, stop: bool, due: bool) -> Step:
        stops, dues = self.ranks.sum([stop, due])
        done = position.total_step + 1
        position = replace(position, total_step=done, sample=done * BATCH, world_size=self.ranks.world_size)
        scale = torch.tensor([self.ranks.world_size / BATCH])
        return Step(position, LR / done, len(data), scale, dues > 0 or done == STEPS, stops > 0)

    def batch(self, data: list[Tensor], step: Step, index: int) -> Tensor:
        return data[index]

    def row(self, step: Step, measured: Measured) -> Row:
        row = {"step": step.position.total_step, "loss": measured.sums[0] / BATCH, "lr": step.lr}
        row |= {"samples_per_s": BATCH / measured.seconds, "ratios": sorted(measured.norms)}
        return {**row, **measured.timing, **measured.ranks}

    def evaluation(self, position: Position, beat: Beat) -> Row:
        return {} if position.total_step % 3 else {"bias": float(self.backend.model.bias)}

    def finish(self, position: Position, log: MetricsLog | None, beat: Beat) -> Row:
        assert isinstance(self.backend, Noted)
        row = {
            "step": position.total_step,
            "bias": float(self.backend.model.bias),
            "last": self.backend.lasts,
        }
        self.ranks.from_first(lambda: log.final(row) if log is not None else None)
        return row


class Noted(ShardedBackend):
    """Keeps which micro-batches were said to be the last of their step."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lasts: list[bool] = []

    def accumulate(self, batch: Tensor, scale: Tensor, *, last: bool, entered: Entered) -> Tensor:
        self.lasts.append(last)
        return super().accumulate(batch, scale, last=last, entered=entered)


def set_up(config: Config, ranks: Ranks) -> LeastSquares:
    errors = Errors()
    weights = errors.line.named_parameters()
    backend = Noted(errors.line, errors, 2, lambda: ShardedLamb(weights, lr=0.0, stage=2))
    return LeastSquares(config, ranks, backend, Position(0, 0, "settings", "data", ranks.world_size), STEPS)


def train(rank: int, config: Config, resume: str | None) -> Row | None:
    return loop.train(config, resume, Ranks.start(), set_up).metrics


def trained(config: Config, resume: str | None = None) -> tuple[list[Row | None], list[Row]]:
    """(what each rank returned, the rows of metrics.jsonl)."""
    ended = run_ranks(2, train, config, resume)
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return ended, [json.loads(line) for line in lines]


def saved(config: Config) -> dict[int, dict[str, Tensor]]:
    """{step: the weights of its checkpoint}."""
    folders = sorted((Path(config.run_dir) / "checkpoints").glob("step-*"))
    return {int(folder.name.removeprefix("step-")): read_contents(folder).weights for folder in folders}


def expected() -> list[tuple[float, dict[str, Tensor]]]:
    """(loss, weights after it) of each step, of whole batches in one process."""
    errors, steps = Errors(), []
    optimizer = Lamb(errors.line.named_parameters(), lr=0.0)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = LR / (step + 1)
        loss = errors(inputs(step * BATCH, (step + 1) * BATCH)).sum() / BATCH
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        steps.append((loss.item(), {name: p.detach().clone() for name, p in errors.line.named_parameters()}))
    return steps


def test_a_run_trains_saves_evaluates_and_writes_a_row_a_step(tmp_path: Path) -> None:
    config = Config(str(tmp_path))
    ended, (*rows, last) = trained(config)
    steps, weights = expected(), saved(config)
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows] == pytest.approx([loss for loss, _ in steps], rel=1e-5)
    assert [row["lr"] for row in rows] == [LR / done for done in range(1, STEPS + 1)]
    assert [bool(row["ratios"]) for row in rows] == [True, False] * 3
    assert list(weights) == [4, 6]  # every fourth, and the last
    for done, own in weights.items():
        for name, value in steps[done - 1][1].items():
            torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-6)
    evaluated = {row["step"]: row["bias"] for row in rows if "bias" in row}
    assert evaluated == {done: pytest.approx(float(steps[done - 1][1]["bias"]), rel=1e-5) for done in (3, 6)}
    assert ended == [last, last] == [{"step": 6, "bias": evaluated[6], "last": [False, False, True] * 6}] * 2


def test_a_signal_to_one_rank_stops_all_after_a_save_and_the_resumed_run_has_the_same_bits(
    tmp_path: Path,
) -> None:
    whole, stopped = Config(str(tmp_path / "whole")), Config(str(tmp_path / "stopped"), stop_at=2)
    ended, rows = trained(whole)
    assert trained(stopped)[0] == [None, None]
    assert list(saved(stopped)) == [3]
    again, resumed = trained(replace(stopped, stop_at=None), "auto")
    assert [row["bias"] for row in again if row] == [row["bias"] for row in ended if row]
    assert [len(row["last"]) for row in again if row] == [3 * 3] * 2  # three steps remained
    assert [row.get("loss") for row in resumed] == [row.get("loss") for row in rows]
    assert all(torch.equal(saved(stopped)[6][name], value) for name, value in saved(whole)[6].items())


def test_a_save_is_due_by_the_clock_of_rank_0(tmp_path: Path) -> None:
    always = CheckpointConfig(every_steps=100, every_minutes=-1.0, keep=0)
    config = Config(str(tmp_path), checkpoint=always)
    trained(config)
    assert list(saved(config)) == [1, 2, 3, 4, 5, 6]
