"""Saving a run so that it continues with the same bits, or on another number of ranks, or sharded in another way.

The format, how it survives crashes, and which one a run goes on from: `sharded_lamb.checkpoint`. Beside weights and
state it holds the position. Random numbers are keyed by seed, step and rank, so the position is their state too; the
schedule is a function of the step.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from sharded_lamb.bert.ranks import Ranks
from sharded_lamb.bert.trainee import Trainee
from sharded_lamb.checkpoint import CheckpointError, Checkpoints


@dataclass(frozen=True)
class Position:
    """Where a run stands: `step` steps of phase `phase` are done."""

    phase: int
    step: int
    total_step: int  # over all phases
    sample: int  # global sample index of the phase at which the next step begins
    config_digest: str
    data_digest: str
    world_size: int  # for information: it may change
    tokens: int = 0  # trained on so far
    seconds: float = 0.0


class StopRequested:
    """Remembers SIGTERM or SIGUSR1 (what SLURM sends before it takes the machine away)."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def save(folder: Path, keep: int, position: Position, trainee: Trainee) -> None:
    """Write one checkpoint; every rank must call it.

    Raises:
        OSError, ValueError: it could not be written (disk full, say), on every rank. Older checkpoints stay.
    """
    try:
        trainee.save(
            Checkpoints(folder, keep=keep, resumed=True), position.total_step, {"position": asdict(position)}
        )
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}. Free space or set run_dir, then start again with --resume auto"
        ) from error


def choose(folder: Path, resume: str | None, ranks: Ranks) -> list[Path]:
    """The checkpoints to go on from, best first: the named one, or with `auto` all there are.

    Raises:
        ValueError: a folder that already holds a run nobody asked to resume.
    """

    def pick() -> list[str]:
        if resume is not None and resume != "auto":
            return [resume]
        checkpoints = Checkpoints(folder)
        checkpoints.recover()
        found = checkpoints.candidates()
        if found and resume is None:
            raise ValueError(
                f"{folder.parent} already holds a run: continue it with --resume auto, or set another run_dir"
            )
        return [str(path) for path in found]

    return [Path(name) for name in ranks.from_first(pick)]


def load(found: Sequence[Path], trainee: Trainee, ranks: Ranks) -> Position:
    """Put weights, state and options back from the first of ``found`` that is whole; every rank must call it.

    Raises:
        CheckpointError: none is.
    """
    for path in found[:-1]:
        try:
            return _position(trainee.load(path, options=True), path)
        except CheckpointError as error:
            if ranks.is_first:
                print(f"checkpoint {path} is broken ({error}); trying the one before it", flush=True)
    return _position(trainee.load(found[-1], options=True), found[-1])


def start_from(path: Path, trainee: Trainee) -> None:
    """Take on weights and moments; options stay as configured. Every rank must call it. Raises CheckpointError."""
    trainee.load(path, options=False)
    trainee.restart_steps()


def _position(extra: dict[str, Any], path: Path) -> Position:
    if "position" not in extra:
        raise ValueError(f"checkpoint {path} has no position in a run: it was not made by this command")
    return Position(**extra["position"])


def check_position(position: Position, config_digest: str, data_digest: str) -> None:
    """Raises: ValueError if the run to be continued was another one."""
    for name, saved, now in (
        ("configuration", position.config_digest, config_digest),
        ("prepared data", position.data_digest, data_digest),
    ):
        if saved != now:
            raise ValueError(
                f"the checkpoint's {name} is {saved} and this run's is {now}: it would not continue the same "
                f"training; restore what changed since (config.yaml in the run folder has it), or set a new run_dir"
            )
