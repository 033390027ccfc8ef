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
from sharded_lamb.checkpoint import parts, saving, storage, tensorfile
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.loading import load
from sharded_lamb.checkpoint.ranks import Ranks
from sharded_lamb.saving import SavingOptimizer

logger = logging.getLogger("sharded_lamb")

LATEST = "latest"
_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True)
class Resumed:
    """Where a run goes on from."""

    path: Path
    step: int
    extra: dict[str, Any]
    skipped: tuple[str, ...]  # why newer checkpoints could not be used


class Checkpoints:
    """Checkpoints of a run by step, in a folder that all ranks see.

    Args:
        root: the folder; made when something is saved.
        keep: how many of the newest to keep, the one ``latest`` names always among them; 0: all.

    Raises:
        ValueError: ``keep`` < 0.
    """

    def __init__(self, root: str | os.PathLike[str], *, keep: int = 3) -> None:
        if keep < 0:
            raise ValueError(f"keep must be >= 0 (0 keeps all), got {keep!r}")
        self.root, self.keep = Path(root), keep
        self._pending: saving.Saving | None = None

    def path(self, step: int) -> Path:
        return self.root / f"step-{step:08d}"

    def save(
        self, step: int, model: nn.Module, optimizer: Any = None, extra: Mapping[str, Any] | None = None
    ) -> Path:
        """As `sharded_lamb.checkpoint.save`; then ``latest`` names it, and old ones are deleted. Collective."""
        self.wait()
        saving.save(self.path(step), model, optimizer, extra, written=self.commit)
        return self.path(step)

    def async_save(
        self, step: int, model: nn.Module, optimizer: Any = None, extra: Mapping[str, Any] | None = None
    ) -> saving.Saving:
        """As `save`, behind training. The next save, `wait` or `resume` raises what went wrong."""
        self.wait()
        self._pending = saving.async_save(self.path(step), model, optimizer, extra, written=self.commit)
        return self._pending

    def wait(self) -> None:
        """Until what is being written is whole. Raises what `save` raises."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def commit(self, written: Path) -> None:
        """Make a whole checkpoint the one to go on from, and delete those that are not kept; on the first rank."""
        faults.point("checkpoint-latest")
        part = self.root / f".{LATEST}.part"
        with part.open("wb") as file:
            file.write(f"{written.name}\n".encode())
            tensorfile.sync_file(file)
        part.rename(self.root / LATEST)
        tensorfile.sync_folder(self.root)
        faults.point("checkpoint-prune")
        self._prune(written.name)
        for left in (*self.root.glob(".step-*.part"), *self.root.glob(".step-*.dropped")):
            shutil.rmtree(left, ignore_errors=True)  # by a crash

    def _prune(self, latest: str) -> None:
        if not self.keep:
            return
        # What lies after the latest is of a run that was given up: it goes first.
        others = [path for path in self._found() if path.name != latest]
        earlier = [path for path in others if path.name < latest]
        kept = earlier[len(earlier) - (self.keep - 1) :] if self.keep > 1 else []
        for path in others:
            if path not in kept:
                old = path.with_name(f".{path.name}.dropped")
                shutil.rmtree(old, ignore_errors=True)
                path.rename(old)  # never half a checkpoint under its name
                shutil.rmtree(old, ignore_errors=True)

    def _found(self) -> list[Path]:
        """Oldest first."""
        return sorted(path for path in self.root.glob("step-*") if _NAME.fullmatch(path.name))

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
        storage.recover(self.root)
        newest_first, latest = self._found()[::-1], self.latest()
        if latest is None:
            return newest_first
        return sorted(newest_first, key=lambda path: path.name > latest.name)

    def resume(
        self,
        model: nn.Module,
        optimizer: Any = None,
        extra: Mapping[str, Any] | None = None,
    ) -> Resumed | None:
        """Load the last whole checkpoint, and log which and why no newer one; None where there is none. Collective.

        Raises:
            CheckpointError: there are checkpoints, and none can be used: starting anew is not decided here.
            ValueError: see `load`.
        """
        self.wait()
        known = None if optimizer is None else parts.checked_optimizer(optimizer)
        everyone = known.ranks if isinstance(known, SavingOptimizer) else None
        ranks = Ranks.of(model if optimizer is None else optimizer, everyone)
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
            if ranks.rank == 0:
                logger.info("going on from %s", path)
            return Resumed(path, int(path.name.removeprefix("step-")), loaded, tuple(skipped))
        if skipped:
            raise CheckpointError(
                f"none of the {len(skipped)} checkpoints in {self.root} can be used: {'; '.join(skipped)}. Move the "
                f"folder "
                f"away to start anew"
            )
        return None
