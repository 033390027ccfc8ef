"""A run's checkpoints: the newest is committed by ``latest``, the last few are kept, the last whole one is found.

::

    checkpoints/latest                 the name of the checkpoint to go on from; replaced last
                step-00000100/         older ones
                step-00000200/
                .step-00000300.part/   being written
"""

import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sharded_lamb import faults
from sharded_lamb.checkpoint import saving, tensorfile
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.loading import load
from sharded_lamb.checkpoint.manifest import SUMS
from sharded_lamb.checkpoint.rank_group import ranks_of

logger = logging.getLogger("sharded_lamb")

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")
_OLD = re.compile(r"\.step-\d{8,}\.old")
_LEFT = re.compile(r"\.step-\d{8,}(\.[0-9a-f]{8})?\.(part|dropped)")


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on from."""

    path: Path
    step: int
    extra: dict[str, Any]
    skipped: tuple[str, ...]  # why newer checkpoints could not be used


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class Checkpoints:
    """Checkpoints of a run by step, in a folder that all ranks see.

    Args:
        root: the folder; made when something is saved.
        keep: how many of the newest to keep, the one ``latest`` names always among them; 0: all.
        resumed: what is there is this run's. Else `save` refuses a folder that holds checkpoints before `resume` was
            called: they are of a run that somebody may want.

    Raises:
        ValueError: ``keep`` < 0.
    """

    def __init__(self, root: str | os.PathLike[str], *, keep: int = 3, resumed: bool = False) -> None:
        if keep < 0:
            raise ValueError(f"keep must be >= 0 (0 keeps all), got {keep!r}")
        self.root, self.keep, self._resumed = Path(root).absolute(), keep, resumed
        self._pending: saving.AsyncSave | None = None

    def path(self, step: int) -> Path:
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return self.root / f"step-{step:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: Any = None, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """As `sharded_lamb.checkpoint.save`; then ``latest`` names it, and old ones are deleted. Collective."""
        self._prepare(step, optimizer)
        path = self.path(step)
        saving.save(path, model, optimizer, extra, written=lambda _: self.commit(path))
        return path

    def async_save(
        self, step: int, model: nn.Module, optimizer: Any = None, extra: Mapping[str, Any] | None = None
    ) -> saving.AsyncSave:
        """As `save`, behind training. The next save, `wait` or `resume` raises what went wrong."""
        self._prepare(step, optimizer)
        path = self.path(step)
        self._pending = saving.async_save(path, model, optimizer, extra, written=lambda _: self.commit(path))
        return self._pending

    def _prepare(self, step: int, optimizer: Any) -> None:
        self.wait()
        ranks = ranks_of(optimizer, None)
        ranks.each(lambda: self.path(step))
        if not self._resumed:
            ranks.first(lambda: self._check_begins(step))
            self._resumed = True

    def _check_begins(self, step: int) -> None:
        self.recover()
        there = self.candidates()
        if there:
            raise ValueError(
                f"{self.root} holds {there[0].name} of an earlier run, and this one saves step {step}: call resume() "
                f"first, to go on from there, or give this run a folder of its own"
            )

    def wait(self) -> None:
        """Until what is being written is whole. Raises what `save` raises."""
        pending = self._pending
        if pending is not None and pending.told:
            self._pending = None
        elif pending is not None:
            try:
                pending.result()
            finally:
                if pending.done():  # else an interrupt came: it is still being written
                    self._pending = None

    def commit(self, written: Path) -> None:
        """Make a whole checkpoint the one to go on from, and delete those that are not kept; on the first rank."""
        try:
            self._point_at(written)
        except OSError as error:
            raise OSError(
                error.errno, f"`{LATEST}` still names the one before it: {error.strerror}"
            ) from error
        try:
            faults.point("checkpoint-prune")
            self._set_aside_later(written)
            self._prune(written)
        except OSError as error:  # nothing is lost by it
            logger.warning("checkpoints beside %s could not be put in order: %s", written, error)
        for left in self.root.iterdir():
            if _LEFT.fullmatch(left.name):
                shutil.rmtree(left, ignore_errors=True)  # by a crash

    def _point_at(self, written: Path) -> None:
        faults.point("checkpoint-latest")
        part = self.root / f".{LATEST}.part"
        with part.open("wb") as file:
            file.write(f"{written.name}\n".encode())
            tensorfile.sync_file(file)
        part.rename(self.root / LATEST)
        tensorfile.sync_folder(self.root)

    def _prune(self, latest: Path) -> None:
        if not self.keep:
            return
        earlier = [path for path in self._found() if _step_of(path) < _step_of(latest)]
        kept = earlier[len(earlier) - (self.keep - 1) :] if self.keep > 1 else []
        for path in earlier:
            if path not in kept:
                self._drop(path)

    def _drop(self, path: Path) -> None:
        old = path.with_name(f".{path.name}.dropped")
        shutil.rmtree(old, ignore_errors=True)
        try:
            path.rename(old)  # never half a checkpoint under its name
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
        shutil.rmtree(old, ignore_errors=True)

    def _set_aside_later(self, latest: Path) -> None:
        """What lies after the latest is of a run that was given up, or could not be read: nobody's to delete."""
        for path in self._found():
            if _step_of(path) > _step_of(latest):
                free = (path.with_name(f"given-up-{number}-{path.name}") for number in range(1, 10**6))
                path.rename(next(name for name in free if not name.exists()))
                logger.warning("%s lies after %s, of a run that was given up: set aside", path, latest.name)

    def _found(self) -> list[Path]:
        """Oldest first."""
        found = (path for path in self.root.glob("step-*") if _NAME.fullmatch(path.name))
        return sorted(found, key=_step_of)

    def recover(self) -> None:
        """Give a checkpoint its name back that was about to be replaced at a crash. By one rank, while none saves."""
        if not self.root.is_dir():
            return
        for old in self.root.iterdir():
            if _OLD.fullmatch(old.name) and (old / SUMS).is_file():
                target = self.root / old.name.removeprefix(".").removesuffix(".old")
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.rename(target)

    def latest(self) -> Path | None:
        """What ``latest`` names, unseen whether it is whole; None before the first checkpoint."""
        try:
            name = (self.root / LATEST).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.root / name if _NAME.fullmatch(name) else None

    def candidates(self) -> list[Path]:
        """What to go on from, best first: the latest, those before it, those after it (of a run that was given up)."""
        if not self.root.is_dir():
            return []
        newest_first, latest = self._found()[::-1], self.latest()
        if latest is None:
            return newest_first
        return sorted(newest_first, key=lambda path: _step_of(path) > _step_of(latest))

    def resume(
        self,
        model: nn.Module,
        optimizer: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Resumed | None:
        """Load the last whole checkpoint, and log which and why no newer one; None where there is none. Collective.

        ``latest`` is the commit: what lies after it, of a run that was given up or that ended before it could commit,
        is taken only where nothing else is whole. The next save puts it aside.

        Raises:
            CheckpointError: there are checkpoints, and none can be used: starting anew is not decided here.
            ValueError: see `load`.
        """
        self.wait()
        ranks = ranks_of(optimizer, None)
        ranks.first(self.recover)
        names = ranks.first(lambda: [str(path) for path in self.candidates()])
        skipped: list[str] = []
        for path in map(Path, names):
            try:
                loaded = load(path, model, optimizer, extra)
            except CheckpointError as error:
                if ranks.rank == 0:
                    logger.warning("%s; trying the one before it", error)
                skipped.append(str(error))
                continue
            self._resumed = True
            if ranks.rank == 0:
                logger.info("going on from %s", path)
            return Resumed(path, int(path.name.removeprefix("step-")), loaded, tuple(skipped))
        if skipped:
            raise CheckpointError(
                f"none of the {len(skipped)} checkpoints in {self.root} can be used: {'; '.join(skipped)}. Move the "
                f"folder away to start anew"
            )
        self._resumed = True
        return None
