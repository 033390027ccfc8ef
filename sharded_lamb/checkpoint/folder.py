"""A run's checkpoints by step: commit with ``latest``, keep the last few, resume from the last whole one.

::

    checkpoints/latest                 the name of the checkpoint to resume from; written last
                step-00000100/         an older checkpoint
                step-00000200/
                .step-00000300.….part/ a save in progress
                superseded-1-step-…/   later than the checkpoint that was resumed from; never read or deleted
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
from sharded_lamb.checkpoint import durable, saving
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.loading import load
from sharded_lamb.checkpoint.manifest import SUMS
from sharded_lamb.checkpoint.rank_group import ranks_of

logger = logging.getLogger("sharded_lamb")

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")
_REPLACED = re.compile(r"\.step-\d{8,}\.old")
_LEFTOVER = re.compile(r"\.step-\d{8,}(\.[0-9a-f]{8})?\.(part|dropped)")


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a run resumes from."""

    path: Path
    step: int
    extra: dict[str, Any]
    skipped: tuple[str, ...]  # why each newer checkpoint was skipped


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


class Checkpoints:
    """Checkpoints of a run by step, in a folder that all ranks see.

    Never deletes checkpoints of another run: those later than the latest are renamed, and `save` raises until `resume`
    was called on a folder that holds checkpoints.

    Args:
        root: the folder; the first save makes it.
        keep: number of newest checkpoints to keep, including the latest; 0: all.
        resumed: whether the checkpoints in ``root`` are this run's, so that `save` need not wait for `resume`.

    Raises:
        ValueError: ``keep`` < 0.
    """

    def __init__(self, root: str | os.PathLike[str], *, keep: int = 3, resumed: bool = False) -> None:
        if keep < 0:
            raise ValueError(f"keep must be >= 0 (0 keeps all), got {keep!r}")
        self.root, self.keep, self._resumed = Path(root).absolute(), keep, resumed
        self._pending: saving.AsyncSave | None = None

    def path(self, step: int) -> Path:
        """Returns the folder of a step's checkpoint. Raises ValueError for a negative step."""
        if step < 0:
            raise ValueError(f"step must be >= 0, got {step}")
        return self.root / f"step-{step:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: Any = None, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """Like `sharded_lamb.checkpoint.save`, then points ``latest`` at it and deletes old ones. Collective.

        Raises:
            ValueError: ``root`` holds checkpoints, and neither `resume` was called nor ``resumed`` passed.
            The errors of `sharded_lamb.checkpoint.save`, and of an unfinished `async_save`.
        """
        self._prepare(step, optimizer)
        path = self.path(step)
        saving.save(path, model, optimizer, extra, written=lambda _: self.commit(path))
        return path

    def async_save(
        self, step: int, model: nn.Module, optimizer: Any = None, extra: Mapping[str, Any] | None = None
    ) -> saving.AsyncSave:
        """Like `save`, but a thread writes the checkpoint. Collective.

        The next `save`, `async_save`, `wait` or `resume` raises its errors, unless `AsyncSave.result` already did.
        """
        self._prepare(step, optimizer)
        path = self.path(step)
        self._pending = saving.async_save(path, model, optimizer, extra, written=lambda _: self.commit(path))
        return self._pending

    def _prepare(self, step: int, optimizer: Any) -> None:
        self.wait()
        ranks = ranks_of(optimizer, None)
        ranks.each(lambda: self.path(step))
        if not self._resumed:
            ranks.first(lambda: self._check_no_earlier_run(step))
            self._resumed = True

    def _check_no_earlier_run(self, step: int) -> None:
        self.recover()
        earlier = self.candidates()
        if earlier:
            raise ValueError(
                f"{self.root} holds {earlier[0].name} of an earlier run, but this run saves step {step}: call resume() "
                f"first to continue that run, or use a new folder"
            )

    def wait(self) -> None:
        """Waits for an unfinished `async_save`. Raises the errors of `save`."""
        pending = self._pending
        if pending is not None and pending.reported:
            self._pending = None
        elif pending is not None:
            try:
                pending.result()
            finally:
                if pending.done():  # after an interrupt the save still runs
                    self._pending = None

    def commit(self, written: Path) -> None:
        """Points ``latest`` at a whole checkpoint and deletes those that are not kept. On the first rank.

        Raises:
            OSError: ``latest`` could not be written. Failing to delete old checkpoints is only logged.
        """
        try:
            self._point_at(written)
        except OSError as error:
            raise OSError(
                error.errno, f"`{LATEST}` still names the checkpoint before it: {error.strerror}"
            ) from error
        try:
            faults.point("checkpoint-prune")
            self._rename_superseded(written)
            self._prune(written)
        except OSError as error:  # the new checkpoint is committed
            logger.warning("old checkpoints beside %s could not be deleted or renamed: %s", written, error)
        for path in self.root.iterdir():
            if _LEFTOVER.fullmatch(path.name):  # of a crash
                shutil.rmtree(path, ignore_errors=True)

    def _point_at(self, written: Path) -> None:
        faults.point("checkpoint-latest")
        content = f"{written.name}\n".encode()
        durable.write_aside(self.root / LATEST, lambda part: part.write_bytes(content))

    def _prune(self, latest: Path) -> None:
        if not self.keep:
            return
        earlier = [path for path in self._steps() if _step_of(path) < _step_of(latest)]
        for path in earlier[: max(0, len(earlier) + 1 - self.keep)]:
            self._drop(path)

    def _drop(self, path: Path) -> None:
        old = path.with_name(f".{path.name}.dropped")
        shutil.rmtree(old, ignore_errors=True)
        try:
            path.rename(old)  # a half-deleted checkpoint must not keep its name
        except OSError as error:
            logger.warning("%s could not be deleted: %s", path, error)
        shutil.rmtree(old, ignore_errors=True)

    def _rename_superseded(self, latest: Path) -> None:
        """Renames checkpoints later than the latest: a resume skipped them, or ``latest`` was set back."""
        for path in self._steps():
            if _step_of(path) > _step_of(latest):
                free = (path.with_name(f"superseded-{number}-{path.name}") for number in range(1, 10**6))
                superseded = next(name for name in free if not name.exists())
                path.rename(superseded)
                logger.warning("%s is later than %s: renamed to %s", path, latest.name, superseded.name)

    def _steps(self) -> list[Path]:
        """Returns the checkpoints of steps, oldest first."""
        paths = (path for path in self.root.glob("step-*") if _NAME.fullmatch(path.name))
        return sorted(paths, key=_step_of)

    def recover(self) -> None:
        """Restores the name of a checkpoint whose replacement crashed. On one rank, while no save runs."""
        if not self.root.is_dir():
            return
        for old in self.root.iterdir():
            if _REPLACED.fullmatch(old.name) and (old / SUMS).is_file():
                target = self.root / old.name.removeprefix(".").removesuffix(".old")
                if target.exists():
                    shutil.rmtree(old, ignore_errors=True)
                else:
                    old.rename(target)

    def latest(self) -> Path | None:
        """Returns the checkpoint that ``latest`` names, unverified; None if it names none."""
        try:
            name = (self.root / LATEST).read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            return None
        return self.root / name if _NAME.fullmatch(name) else None

    def candidates(self) -> list[Path]:
        """Returns the checkpoints to try, best first: the latest, those before it, those after it."""
        if not self.root.is_dir():
            return []
        newest_first, latest = self._steps()[::-1], self.latest()
        if latest is None:
            return newest_first
        return sorted(newest_first, key=lambda path: _step_of(path) > _step_of(latest))

    def resume(
        self,
        model: nn.Module,
        optimizer: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Resumed | None:
        """Loads the last whole checkpoint and logs which, and why newer ones were skipped. Collective.

        ``latest`` is the commit: a later checkpoint was abandoned or never committed. It is loaded only if no other is
        whole, and the next save renames it.

        Returns:
            The checkpoint that was loaded; None if there is none.

        Raises:
            CheckpointError: there are checkpoints, but none is whole.
            ValueError, TypeError: as `sharded_lamb.checkpoint.load`.
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
                    logger.warning("%s; trying the checkpoint before it", error)
                skipped.append(str(error))
                continue
            self._resumed = True
            if ranks.rank == 0:
                logger.info("resuming from %s", path)
            return Resumed(path, _step_of(path), loaded, tuple(skipped))
        if skipped:
            raise CheckpointError(
                f"none of the {len(skipped)} checkpoints in {self.root} can be used: {'; '.join(skipped)}. Move the "
                f"folder away to start anew"
            )
        self._resumed = True
        return None
