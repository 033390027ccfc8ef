"""`save` and `async_save`."""

import hashlib
import logging
import os
import platform
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.distributed.tensor import DTensor

from sharded_lamb.checkpoint import parts, plain
from sharded_lamb.checkpoint.rank_group import RankGroup, ranks_of, unwrapped
from sharded_lamb.checkpoint.storage import AfterwardsError, ManifestHeader, Writer
from sharded_lamb.optim.lamb import Lamb
from sharded_lamb.optim.sharded_state import ShardedOptimizer

logger = logging.getLogger("sharded_lamb")


@dataclass(frozen=True)
class _Snapshot:
    """What is saved. ``tensors`` are live memory: this rank's parts."""

    tensors: dict[str, Tensor]
    header: ManifestHeader
    ranks: RankGroup
    buffers: frozenset[str]  # of ``tensors``: those that are no parameters, and whole on each rank


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    written: Callable[[Path], None] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Write a checkpoint that any number of ranks in any stage can `load`. Collective; every rank writes its parts.

    Args:
        path: the checkpoint's folder, on storage that all ranks see; replaced, once the new one is whole, if it is
            there.
        model: its parameters and buffers. Names are as the bare model has them, whatever wraps it.
        optimizer: `Lamb` or `ShardedLamb`: moments, masters, step counts, options of groups, ``max_grad_norm``,
            ``skipped_steps``; None: weights only.
        extra: {name: plain data, tensors, or an object with ``state_dict`` and ``load_state_dict`` such as a
            scheduler or GradScaler}, of the first rank. (DTensors are of all ranks.)
        written: called on the first rank once the checkpoint is whole and in its place.
        process_group: the ranks that have this model; default: the optimizer's, without one all.

    It is written aside, synced and renamed when whole; until then a checkpoint of that name stays as it was.

    Collectives: gathers and scatters of plans, on a gloo group of its own; no tensor is sent.

    Raises:
        OSError: it could not be written (a full disk, a folder that other ranks do not see), on every rank.
        FileExistsError: there is something at ``path`` that is no checkpoint.
        TypeError, ValueError: something in ``extra`` or the model cannot be saved, or ranks have other paths or models;
            on every rank.
    """
    snapshot = _snapshot(path, model, optimizer, extra, process_group)
    writer = Writer(path, snapshot.header, written)
    try:
        with warnings.catch_warnings():
            _quieten()
            _write(snapshot, writer, snapshot.ranks.group)
    except CheckpointException as error:
        _explain(error, writer, snapshot.ranks)


class AsyncSave:
    """A checkpoint that is being written. `result` must be called, or nobody learns that it could not be written."""

    def __init__(self, future: "Future[Any]", writer: Writer, ranks: RankGroup) -> None:
        self._future, self._writer, self._ranks = future, writer, ranks
        self.told = False  # `result` has returned or raised
        ranks.behind.append(writer.target)

    def done(self) -> bool:
        """Whether `result` would not wait. Ranks may differ for a moment."""
        return self._future.done()

    def result(self) -> Path:
        """The folder, once it is whole. Raises what `save` raises, every time."""
        try:
            self._future.result()
        except CheckpointException as error:
            _explain(error, self._writer, self._ranks)
        finally:
            # Not done where an interrupt came while it was waited for: it goes on.
            if self._future.done() and not self.told:
                self.told = True
                self._ranks.behind.remove(self._writer.target)
        return self._writer.target


def async_save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    written: Callable[[Path], None] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> AsyncSave:
    """As `save`, behind training: returns when this rank's parts are copied to CPU memory. Collective.

    One at a time: wait for its `AsyncSave.result` before the next.
    """
    snapshot = _snapshot(path, model, optimizer, extra, process_group)
    # On all ranks or on none: before anything communicates behind training.
    staged: Any = snapshot.ranks.each(
        lambda: DefaultStager(StagingOptions(False, False, False, False)).stage(snapshot.tensors)
    )
    writer = Writer(path, snapshot.header, written)
    _quieten()  # for good: filters are the whole process's, and training may set some meanwhile
    thread = ThreadPoolExecutor(1, thread_name_prefix="sharded_lamb checkpoint")
    future = thread.submit(_write, replace(snapshot, tensors=staged), writer, snapshot.ranks.group_behind())
    thread.shutdown(wait=False)
    return AsyncSave(future, writer, snapshot.ranks)


def _write(snapshot: _Snapshot, writer: Writer, group: dist.ProcessGroup | None) -> None:
    dcp_save(
        snapshot.tensors,
        storage_writer=writer,
        planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
        no_dist=group is None,
    )


def _quieten() -> None:
    """Without torch's remarks on saving from one process, which is meant."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _explain(error: CheckpointException, writer: Writer, ranks: RankGroup) -> None:
    """Raises what `save` raises."""
    if ranks.rank == 0:
        writer.abandon()
    ranks.raise_together({rank: _named(found, writer.target) for rank, found in unwrapped(error).items()})


def _named(found: Exception, target: Path) -> Exception:
    if not isinstance(found, OSError):
        return found
    why = found.strerror or found
    if isinstance(found, AfterwardsError):
        return OSError(found.errno, f"checkpoint {target} is written, but what follows was not done: {why}")
    return OSError(
        found.errno, f"checkpoint {target} could not be written: {why}; those before it are untouched"
    )


def prepared(
    path: str | os.PathLike[str], optimizer: Any, group: Any
) -> tuple[RankGroup, Path, Lamb | ShardedOptimizer | None]:
    """The ranks of a save or load, once they agree on what they were called with. Collective."""
    ranks = ranks_of(optimizer, group)

    def own() -> tuple[Path, Lamb | ShardedOptimizer | None]:
        ranks.check_free()
        return Path(path).absolute(), None if optimizer is None else parts.checked_optimizer(optimizer)

    folder, known = ranks.each(own)
    ranks.agree("the path", str(folder))
    stage = f" of stage {known.stages}" if isinstance(known, ShardedOptimizer) else ""
    ranks.agree("the optimizer", f"{type(known).__name__}{stage}" if known is not None else "none")
    return ranks, folder, known


def _snapshot(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any,
    extra: Mapping[str, Any] | None,
    group: Any,
) -> _Snapshot:
    ranks, _, known = prepared(path, optimizer, group)
    snapshot = ranks.each(lambda: _collected(ranks, model, known, extra or {}))
    weights = [
        (name, tuple(tensor.shape), str(tensor.dtype))
        for name, tensor in snapshot.tensors.items()
        if name.startswith("model.")
    ]
    digest = hashlib.sha256(repr(weights).encode()).hexdigest()[:16]
    ranks.agree("the model", f"{len(weights)} tensors (names, shapes and dtypes: {digest})")
    groups = [group["names"] for group in snapshot.header.groups]
    digest = hashlib.sha256(repr(groups).encode()).hexdigest()[:16]
    ranks.agree("the optimizer", f"{len(groups)} parameter groups (names: {digest})")
    if ranks.rank == 0:
        return snapshot
    # Buffers are the first rank's, all of them: running statistics differ between ranks, and belong together.
    own = {name: tensor for name, tensor in snapshot.tensors.items() if name not in snapshot.buffers}
    return replace(snapshot, tensors=own)


def _collected(ranks: RankGroup, model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> _Snapshot:
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.synchronize()
    found = parts.ModelParts.of(model)
    tensors = {f"model.{name}": tensor for name, tensor in found.tensors.items()}
    groups: list[dict[str, Any]] = []
    wide: dict[str, Any] = {}
    kept = Kept(ranks.rank == 0)
    if optimizer is not None:
        names = parts.names_of_groups(optimizer, found)
        packed = optimizer.state_dict()
        flat = [name for group in names for name in group]
        for place, state in packed["state"].items():
            tensors |= {
                f"optimizer.{flat[place]}.{kind}": torch.as_tensor(value)
                for kind, value in state.items()
                if kind in ("step", "master", *parts.KINDS)
            }
        for number, (group, held) in enumerate(zip(optimizer.param_groups, names, strict=True)):
            options = plain.encoded(parts.options_of(group), f"options of group {number}", kept)
            groups.append({"names": held, "options": options})
        wide = {
            "max_grad_norm": optimizer.max_grad_norm,
            "skipped_steps": getattr(optimizer, "skipped_steps", 0),
            "step": parts.steps_taken(packed["state"]),
        }
    odd = [name for name in extra if not isinstance(name, str)]
    if odd:
        raise TypeError(f"extra has the name {odd[0]!r}: names are strings")
    states = {name: _state_of(value) for name, value in extra.items()}
    encoded = plain.encoded(states, "extra", kept)
    if found.plain:
        wide["model"] = plain.encoded(found.plain, "model", kept)
    stage = optimizer.stages if isinstance(optimizer, ShardedOptimizer) else None
    header = ManifestHeader(
        written_by(ranks.size, type(optimizer).__name__ if optimizer else None, stage),
        found.aliases,
        tuple(groups),
        wide,
        encoded,
    )
    buffers = frozenset(f"model.{name}" for name in found.buffers)
    return _Snapshot({**tensors, **kept.tensors}, header, ranks, buffers)


def _state_of(value: Any) -> Any:
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return value.state_dict()
    return value


class Kept:
    """Tensors among plain data: the first rank writes plain ones, all ranks their parts of DTensors."""

    def __init__(self, is_first: bool) -> None:
        self.is_first = is_first
        self.tensors: dict[str, Tensor] = {}
        self._names: set[str] = set()

    def __call__(self, path: str, tensor: Tensor) -> str:
        first, number = path if path.startswith("extra") else f"extra.{path}", 2
        name = first
        while name in self._names:
            name, number = f"{first}#{number}", number + 1
        self._names.add(name)
        if self.is_first or isinstance(tensor, DTensor):
            self.tensors[name] = tensor.detach()
        return name


def written_by(ranks: int, optimizer: str | None, stage: str | None) -> dict[str, Any]:
    """What a checkpoint says of its writer."""
    try:
        own = version("sharded-lamb")
    except PackageNotFoundError:  # run from a source tree
        own = "unknown"
    return {
        "sharded_lamb": own,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "ranks": ranks,
        "optimizer": optimizer,
        "stage": stage,
    }
