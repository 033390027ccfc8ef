"""Saving a run so that it continues with the same bits, or on another number of ranks.

::

    checkpoints/step-00000200/model.safetensors   whole parameters, in the training dtype
                              optimizer.pt        ShardedLamb.full_state_dict(): whole tensors, no world size in
                                                  it; masters where the weights are not fp32 themselves
                              position.json       phase, step, next sample
                              files.json          sizes and hashes of the three, written last

A checkpoint is written under another name, synced and renamed when whole. Random numbers are keyed by seed,
step and rank, so the position is their state too; the schedule is a function of the step.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from sharded_lamb.bert.ranks import Ranks
from sharded_lamb.bert.trainee import Trainee

_FILES = ("model.safetensors", "optimizer.pt", "position.json")


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


def save(folder: Path, keep: int, position: Position, trainee: Trainee, ranks: Ranks) -> Path:
    """Write one checkpoint; every rank must call it.

    Raises:
        OSError, ValueError: it could not be written (disk full, say), on every rank. Older checkpoints stay.
    """
    weights, state = trainee.weights(), trainee.full_state()
    target = folder / f"step-{position.total_step:08d}"

    def write() -> str:
        try:
            assert weights is not None
            _write(target, position, weights, state)
        except OSError as error:
            raise OSError(
                error.errno,
                f"checkpoint {target} could not be written: {error.strerror}; "
                f"the ones before it are untouched. Free space or set run_dir, then start again with "
                f"--resume auto",
            ) from error
        _prune(folder, keep)
        return str(target)

    return Path(ranks.from_first(write))


def _write(target: Path, position: Position, weights: dict[str, Tensor], optimizer_state: Any) -> None:
    aside = target.with_name(f".{target.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        _write_parameters(aside / "model.safetensors", weights)
        with (aside / "optimizer.pt").open("wb") as out:
            torch.save(optimizer_state, out)
        (aside / "position.json").write_text(json.dumps(asdict(position), indent=1))
        hashes = {name: _hash(aside / name) for name in _FILES}
        (aside / "files.json").write_text(json.dumps(hashes, indent=1))
        for name in (*_FILES, "files.json"):
            _sync(aside / name)
        _sync(aside)
        if target.exists():  # left by a run that went on from an older checkpoint
            shutil.rmtree(target)
        aside.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _write_parameters(path: Path, weights: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(weights, str(path))
    except SafetensorError as error:  # it wraps the system's error in text
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error)) from error


def _hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _prune(folder: Path, keep: int) -> None:
    if keep:
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old)


def problem_with(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        expected = json.loads((checkpoint / "files.json").read_text())
        for name in _FILES:
            if _hash(checkpoint / name) != expected[name]:
                return f"{name} does not have the size and hash it was written with"
    except (OSError, KeyError, json.JSONDecodeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def choose(folder: Path, resume: str | None, ranks: Ranks) -> Path | None:
    """The checkpoint to go on from: `auto` takes the newest whole one, if any.

    Raises:
        ValueError: a named one that is broken, or a folder that already holds a run nobody asked to resume.
    """

    def pick() -> str | None:
        if resume is not None and resume != "auto":
            return str(_whole(resume, "--resume"))
        found = sorted(folder.glob("step-*"), reverse=True)
        if found and resume is None:
            raise ValueError(
                f"{folder.parent} already holds a run: continue it with --resume auto, or set another run_dir"
            )
        for checkpoint in found:
            problem = problem_with(checkpoint)
            if problem is None:
                return str(checkpoint)
            print(f"checkpoint {checkpoint} is broken ({problem}); trying the one before it", flush=True)
        return None

    chosen = ranks.from_first(pick)
    return None if chosen is None else Path(chosen)


def require(checkpoint: str, ranks: Ranks) -> Path:
    """The named checkpoint. Raises: ValueError on every rank if it is missing or broken."""
    return ranks.from_first(lambda: _whole(checkpoint, "start_from"))


def _whole(checkpoint: str, option: str) -> Path:
    problem = problem_with(Path(checkpoint))
    if problem:
        raise ValueError(
            f"{option} {checkpoint}: {problem}; name a folder such as RUN/checkpoints/step-00001000"
        )
    return Path(checkpoint)


def load(checkpoint: Path, trainee: Trainee, ranks: Ranks) -> Position:
    """Put weights and optimizer state back; every rank must call it."""
    from safetensors.torch import load_file

    saved = load_file(str(checkpoint / "model.safetensors"))
    own = {name for name, _ in trainee.bert.named_parameters()}
    if saved.keys() != own:
        raise ValueError(
            f"{checkpoint}: its parameters are not this model's; they differ in "
            f"{sorted(saved.keys() ^ own)[:5]}"
        )
    state = None
    if ranks.is_first:
        state = torch.load(checkpoint / "optimizer.pt", map_location="cpu", weights_only=True)
    trainee.load(saved, state)
    return read_position(checkpoint)


def read_position(checkpoint: Path) -> Position:
    return Position(**json.loads((checkpoint / "position.json").read_text()))


def check_position(position: Position, config_digest: str, data_digest: str) -> None:
    """Raises: ValueError if the run to be continued was another one."""
    for name, saved, now in (
        ("configuration", position.config_digest, config_digest),
        ("prepared data", position.data_digest, data_digest),
    ):
        if saved != now:
            raise ValueError(
                f"the checkpoint's {name} is {saved} and this run's is {now}: it would not continue the "
                f"same training; "
                f"restore what changed since (config.yaml in the run folder has it), or set a new run_dir"
            )
