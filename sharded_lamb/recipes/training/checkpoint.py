"""Checkpoints of a run, to resume it with the same bits, on another number of ranks, or with another sharding.

`sharded_lamb.checkpoint` has the format, crash safety and the choice of a checkpoint. A run's checkpoint contains
weights, optimizer state and the position. Random numbers are keyed by seed, step and rank, so the position is their
state too; the schedule is a function of the step.
"""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar, Protocol, TypeVar

from sharded_lamb.checkpoint import CheckpointError, Checkpoints, read_manifest
from sharded_lamb.recipes.training.config_io import load_config
from sharded_lamb.recipes.training.ranks import Ranks, launch_store
from sharded_lamb.recipes.training.sharded_backend import TrainBackend


@dataclass(frozen=True)
class Position:
    """Progress of a run: `total_step` steps are done. A recipe adds what it needs to continue."""

    total_step: int
    sample: int  # global sample index of the next step's first sample
    config_digest: str
    data_digest: str
    world_size: int  # for information: it may change
    seconds: float = 0.0
    remedy: ClassVar[str] = ""  # for a checkpoint without a position


Where = TypeVar("Where", bound=Position)


_CONSEQUENCE = "resuming would not continue the same training; restore the changed settings"


class Settings(Protocol):
    """A recipe's settings, a dataclass."""

    @property
    def run_dir(self) -> str: ...

    def digest(self) -> str:
        """Hash of `trained_settings`."""

    def trained_settings(self) -> dict[str, Any]:
        """The settings that determine the training's numbers."""


class StopRequested:
    """Records SIGTERM or SIGUSR1, which SLURM sends before it ends a job."""

    def __init__(self) -> None:
        self.signal: int | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._record)

    def _record(self, number: int, frame: FrameType | None) -> None:
        self.signal = number


def save(folder: Path, keep: int, position: Position, backend: TrainBackend) -> None:
    """Write one checkpoint. Collective.

    Raises:
        OSError, ValueError: writing failed (disk full, say), on every rank. Older checkpoints stay.
    """
    try:
        backend.save(
            Checkpoints(folder, keep=keep, resumed=True), position.total_step, {"position": asdict(position)}
        )
    except OSError as error:
        raise OSError(
            error.errno, f"{error.strerror}. Free space or set run_dir, then restart with --resume auto"
        ) from error


def check_writable(folder: Path, setting: str) -> None:
    """Raises OSError that names ``setting`` if no file can be made in ``folder``, or the nearest above that exists."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise OSError(f"{setting}: {there} cannot be written: {error}") from error


@contextmanager
def claimed(run_dir: str, ranks: Ranks) -> Iterator[None]:
    """Inside, no other run trains into ``run_dir``. Collective. Rank 0 holds a lock, which its end releases.

    Ranks that torchrun restarts need no lock: a host that crashed may still have it. File systems without locks let
    others in.

    Raises:
        ValueError: another run does; on every rank.
    """
    held: list[int] = []

    def claim() -> None:
        launch, own, lock = launch_store(), f"claimed/{run_dir}", Path(run_dir, ".lock")
        lock.parent.mkdir(parents=True, exist_ok=True)
        held.append(os.open(lock, os.O_WRONLY | os.O_CREAT))
        try:
            fcntl.lockf(held[0], fcntl.LOCK_EX | fcntl.LOCK_NB)  # forked workers do not inherit it
        except (BlockingIOError, PermissionError):
            if not launch.check([own]):
                raise ValueError(
                    f"another run trains into {run_dir} now: set another run_dir, or wait for its end; delete {lock} "
                    f"if its host has crashed"
                ) from None
        except OSError:  # not supported here
            pass
        launch.set(own, "")

    try:
        ranks.from_first(claim)
        yield
    finally:
        for file in held:
            os.close(file)


def candidates(config: Settings, resume: str | None) -> list[Path]:
    """The checkpoints to resume from, best first: the named one, or with `auto` every one of the run. On one process.

    Raises:
        ValueError: the run folder already contains a run, and `resume` is None; or its settings were others.
        CheckpointError: the named one, or every one, is incomplete.
    """
    run_dir = Path(config.run_dir)
    if resume is None or resume == "auto":
        checkpoints = Checkpoints(run_dir / "checkpoints")
        checkpoints.recover()
        found = checkpoints.candidates()
    else:
        found = [Path(resume)]
    if found and resume is None:
        raise ValueError(
            f"{run_dir} already contains a run: continue it with --resume auto, or set another run_dir"
        )
    for path in found:
        try:
            saved = (read_manifest(path).extra or {}).get("position")
        except CheckpointError:
            if path == found[-1]:
                raise
            continue  # `load` says so
        if isinstance(saved, dict) and "config_digest" in saved:
            _check_settings(saved["config_digest"], config, path)
        break
    return found


def choose(config: Settings, resume: str | None, ranks: Ranks) -> list[Path]:
    """`candidates` on rank 0, for all. Ranks that torchrun has restarted resume the run that they began.

    With a named checkpoint that is from the newest that they saved, or the named one if they saved none.

    Raises:
        ValueError: as `candidates`. Ranks that torchrun restarts after that get the same error.
    """

    def pick() -> list[str]:
        launch, refused, began = launch_store(), f"refused/{config.run_dir}", f"began/{config.run_dir}"
        if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) == 0:
            launch.set(began, _last_save(config))
            resumes = False
        elif resume is None:
            resumes = not launch.check([refused])
        else:
            resumes = launch.check([began]) and launch.get(began).decode() != _last_save(config)
        try:
            return [str(path) for path in candidates(config, "auto" if resumes else resume)]
        except ValueError:
            launch.set(refused, "")
            raise

    return [Path(name) for name in ranks.from_first(pick)]


def _last_save(config: Settings) -> str:
    """Differs after every save of the run."""
    saved = Checkpoints(Path(config.run_dir, "checkpoints")).candidates()
    return f"{saved[0].name}, {saved[0].stat().st_mtime_ns}" if saved else "none"


def load(kind: type[Where], candidates: Sequence[Path], backend: TrainBackend, ranks: Ranks) -> Where:
    """Restore weights, state and options from the first complete checkpoint of ``candidates``. Collective.

    Raises:
        CheckpointError: none is complete.
    """
    for path in candidates[:-1]:
        try:
            return _position(kind, backend.load(path, options=True), path)
        except CheckpointError as error:
            if ranks.is_first:
                print(f"checkpoint {path} is broken ({error}); trying the one before it", flush=True)
    return _position(kind, backend.load(candidates[-1], options=True), candidates[-1])


def _position(kind: type[Where], extra: dict[str, Any], path: Path) -> Where:
    saved = extra.get("position", {})
    if saved.keys() != {field.name for field in fields(kind)}:
        remedy = f"; {kind.remedy}" if kind.remedy else ""
        raise ValueError(f"checkpoint {path} has no position in a run: this command did not write it{remedy}")
    return kind(**saved)


def check_position(position: Position, config: Settings, data_digest: str, checkpoint: Path) -> None:
    """Check that a run of ``config`` continues the training of ``checkpoint``, in the folder of its run.

    Raises:
        ValueError: settings or data differ from those of the saved run; names the settings.
    """
    _check_settings(position.config_digest, config, checkpoint)
    if position.data_digest != data_digest:
        raise ValueError(
            f"the prepared data of {checkpoint} is {position.data_digest} and this run's is {data_digest}: "
            f"{_CONSEQUENCE} (config.yaml in the run folder has them) or the corpus, or set a new run_dir"
        )


def _check_settings(saved_digest: str, config: Settings, checkpoint: Path) -> None:
    if saved_digest == config.digest():
        return
    saved = checkpoint.parent.parent / "config.yaml"
    changed = _changed(saved, config)
    listed = "\n  ".join(changed) if changed else f"unknown: {saved} is missing or not that run's"
    raise ValueError(
        f"{checkpoint} was trained with other settings: {_CONSEQUENCE}, or set a new run_dir\n  {listed}"
    )


def _changed(saved: Path, config: Settings) -> list[str]:
    """A line for every setting that differs from the file's; empty if the file cannot be read."""
    try:
        before = _flat(load_config(type(config), str(saved), []).trained_settings())
    except (ValueError, OSError):
        return []
    now, missing = _flat(config.trained_settings()), object()
    return [
        f"{key}: {before.get(key, 'absent')!r} there, {now.get(key, 'absent')!r} now"
        for key in dict.fromkeys([*before, *now])
        if before.get(key, missing) != now.get(key, missing)
    ]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{dotted key: value}, as settings are overridden."""
    branches = tree.items() if isinstance(tree, dict) else enumerate(tree)
    flat: dict[str, Any] = {}
    for key, value in branches:
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
