"""`save`, `async_save` and `AsyncSave`."""

import hashlib
import logging
import os
import platform
import traceback
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
from sharded_lamb.checkpoint.storage import ManifestHeader, PostSaveError, Writer
from sharded_lamb.core.host_values import as_tensor
from sharded_lamb.core.rule import MOMENTS
from sharded_lamb.kernels.state_format import OF_WEIGHTS
from sharded_lamb.optim.lamb import Lamb
from sharded_lamb.optim.sharded_state import ShardedOptimizer

logger = logging.getLogger("sharded_lamb")


@dataclass(frozen=True)
class _Snapshot:
    """The input of one save on this rank."""

    tensors: dict[str, Tensor]  # this rank's parts; live memory, not copies
    header: ManifestHeader
    ranks: RankGroup
    buffers: frozenset[str]  # the keys of ``tensors`` that are buffers, which every rank holds whole


def save(
    path: str | os.PathLike[str],
    model: nn.Module,
    optimizer: Any = None,
    extra: Mapping[str, Any] | None = None,
    *,
    written: Callable[[Path], None] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> None:
    """Writes a checkpoint that any number of ranks in any stage can `load`. Collective; every rank writes its parts.

    The files are written aside, synced and renamed when whole; until then an existing checkpoint of that name stays.

    Args:
        path: the checkpoint's folder, on storage that all ranks see. An existing checkpoint there is replaced.
        model: saves parameters and buffers, under the names of the unwrapped model.
        optimizer: `Lamb` or `ShardedLamb`, also as Accelerate, Fabric or Lightning wrap it: saves moments, masters,
            step counts, group options, ``max_grad_norm`` and ``skipped_steps``. None: weights only.
        extra: {name: value}: plain data, tensors, or objects with ``state_dict`` and ``load_state_dict`` such as a
            scheduler or GradScaler. The first rank's are saved; DTensors are saved from all ranks.
        written: called on the first rank with the folder, after the rename.
        process_group: the ranks of this model; default: the optimizer's ranks, without an optimizer all.

    Collectives: gathers, scatters and broadcasts of small objects on a gloo group of its own; no tensor is sent.

    Raises:
        OSError: the checkpoint could not be written (a full disk, a folder that other ranks do not see).
        FileExistsError: ``path`` holds something that is not part of a checkpoint.
        TypeError, ValueError: ``extra`` or the model cannot be saved, or ranks disagree on path, model or optimizer.
        Every error is raised on every rank.
    """
    snapshot = _snapshot(path, model, optimizer, extra, process_group)
    writer = Writer(path, snapshot.header, written)
    try:
        with warnings.catch_warnings():
            _quieten()
            _write(snapshot, writer, snapshot.ranks.group)
    except CheckpointException as error:
        _raise_together(error, writer, snapshot.ranks)


class AsyncSave:
    """A save in progress. Only `result` raises its errors, which the first rank logs: call it before the next save."""

    def __init__(self, future: "Future[Any]", writer: Writer, ranks: RankGroup) -> None:
        self._future, self._writer, self._ranks = future, writer, ranks
        self.reported = False  # whether `result` has returned or raised
        ranks.pending.append(writer.target)

    def done(self) -> bool:
        """Returns whether `result` would return or raise at once. Ranks may differ briefly."""
        return self._future.done()

    def result(self) -> Path:
        """Waits for the save and returns its folder. Raises the errors of `save`, on every call."""
        try:
            self._future.result()
        except CheckpointException as error:
            _raise_together(error, self._writer, self._ranks)
        finally:
            # An interrupt ends only the wait; the save continues, and stays pending.
            if self._future.done() and not self.reported:
                self.reported = True
                self._ranks.pending.remove(self._writer.target)
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
    """Like `save`, but returns once this rank's parts are copied to CPU memory; a thread writes them. Collective.

    One save at a time: call `AsyncSave.result` before the next save or load, and before ``destroy_process_group``.

    Raises:
        TypeError, ValueError, MemoryError: as `save`, before anything is written. `AsyncSave.result` raises the rest;
        RuntimeError, if the process group was destroyed meanwhile.
    """
    snapshot = _snapshot(path, model, optimizer, extra, process_group)
    # Staging fails on all ranks or on none, before the thread communicates.
    staged: Any = snapshot.ranks.each(lambda: DefaultStager(_staging()).stage(snapshot.tensors))
    writer = Writer(path, snapshot.header, written)
    _quieten()  # permanently: filters are per process, and training may change them meanwhile
    thread = ThreadPoolExecutor(1, thread_name_prefix="sharded_lamb checkpoint")
    future = thread.submit(
        _write_behind, replace(snapshot, tensors=staged), writer, snapshot.ranks.async_group()
    )
    thread.shutdown(wait=False)
    return AsyncSave(future, writer, snapshot.ranks)


def _staging() -> StagingOptions:
    """Beside a GPU through pinned memory, which takes half the time (`gpu_check/results`)."""
    pins: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return StagingOptions(
        use_pinned_memory=pins,
        use_shared_memory=False,
        use_async_staging=False,
        use_non_blocking_copy=pins,
    )


def _write(snapshot: _Snapshot, writer: Writer, group: dist.ProcessGroup | None) -> None:
    dcp_save(
        snapshot.tensors,
        storage_writer=writer,
        planner=DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
        process_group=group,
        no_dist=group is None,
    )


def _write_behind(snapshot: _Snapshot, writer: Writer, group: dist.ProcessGroup | None) -> None:
    """`_write` for a save whose errors the program may never ask for."""
    try:
        _write(snapshot, writer, group)
    except (Exception, CheckpointException) as error:  # the latter is a BaseException
        failures = unwrapped(error) if isinstance(error, CheckpointException) else {}
        lost = None
        if group is not None and not dist.is_initialized():
            writer.abandon()
            lost = RuntimeError(
                f"the save of {writer.target} was not completed here: the process group was destroyed during it; call "
                f"AsyncSave.result(), or Checkpoints.wait(), before destroy_process_group()"
            )
        if snapshot.ranks.rank == 0:
            why = lost or next(iter(failures.values()), error)
            logger.error("checkpoint %s failed, and AsyncSave.result() raises why: %s", writer.target, why)
        # Frames of tracebacks hold the process group, whose threads must end before the interpreter finalizes.
        for raised in (error, *failures.values()):
            traceback.clear_frames(raised.__traceback__)
        del group
        if lost is not None:
            raise lost from None
        raise


def _quieten() -> None:
    """Ignores torch's warning about saving from a single process, which is intended."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def _raise_together(error: CheckpointException, writer: Writer, ranks: RankGroup) -> None:
    """Raises the errors of `save` on every rank, and removes what the failed save wrote."""
    if ranks.rank == 0:
        writer.abandon()
    ranks.raise_together({rank: _named(raised, writer.target) for rank, raised in unwrapped(error).items()})


def _named(error: Exception, target: Path) -> Exception:
    if not isinstance(error, OSError):
        return error
    why = error.strerror or error
    if isinstance(error, PostSaveError):
        return OSError(error.errno, f"checkpoint {target} was written, but the post-save step failed: {why}")
    return OSError(
        error.errno, f"checkpoint {target} could not be written: {why}; earlier checkpoints are untouched"
    )


def prepared(
    path: str | os.PathLike[str], optimizer: Any, group: Any
) -> tuple[RankGroup, Path, Lamb | ShardedOptimizer | None]:
    """Returns (ranks, folder, optimizer) once all ranks agree on path and optimizer. Collective: three all-gathers."""
    ranks = ranks_of(optimizer, group)

    def own() -> tuple[Path, Lamb | ShardedOptimizer | None]:
        ranks.check_no_pending_save()
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
    # Buffers are saved from the first rank only: running statistics differ between ranks.
    own = {name: tensor for name, tensor in snapshot.tensors.items() if name not in snapshot.buffers}
    return replace(snapshot, tensors=own)


def _collected(ranks: RankGroup, model: nn.Module, optimizer: Any, extra: Mapping[str, Any]) -> _Snapshot:
    if isinstance(optimizer, ShardedOptimizer):
        optimizer.register_replaced()
        optimizer.synchronize()
    model_parts = parts.ModelParts.of(model)
    tensors = {f"model.{name}": tensor for name, tensor in model_parts.tensors.items()}
    groups: list[dict[str, Any]] = []
    optimizer_wide: dict[str, Any] = {}
    extra_tensors = ExtraTensors(ranks.rank == 0)
    if optimizer is not None:
        names = parts.names_of_groups(optimizer, model_parts)
        packed = optimizer.local_state_dict()
        flat = [name for group in names for name in group]
        for place, state in packed["state"].items():
            tensors |= {
                f"optimizer.{flat[place]}.{kind}": as_tensor(value)
                for kind, value in state.items()
                if kind in ("step", *MOMENTS, *OF_WEIGHTS)
            }
        for number, (group, own_names) in enumerate(zip(optimizer.param_groups, names, strict=True)):
            options = plain.encoded(parts.options_of(group), f"options of group {number}", extra_tensors)
            groups.append({"names": own_names, "options": options})
        optimizer_wide = {
            "max_grad_norm": optimizer.max_grad_norm,
            "skipped_steps": getattr(optimizer, "skipped_steps", 0),
            "step": parts.steps_taken(packed["state"]),
        }
        if (rounded_to := parts.gather_dtype_of(optimizer)) is not None:
            optimizer_wide["gather_dtype"] = rounded_to
    unexpected = [name for name in extra if not isinstance(name, str)]
    if unexpected:
        raise TypeError(f"extra has the name {unexpected[0]!r}: names must be strings")
    states = {name: _state_of(value) for name, value in extra.items()}
    encoded = plain.encoded(states, "extra", extra_tensors)
    if model_parts.plain:
        optimizer_wide["model"] = plain.encoded(model_parts.plain, "model", extra_tensors)
    stage = optimizer.stages if isinstance(optimizer, ShardedOptimizer) else None
    header = ManifestHeader(
        written_by(ranks.size, type(optimizer).__name__ if optimizer else None, stage),
        model_parts.aliases,
        tuple(groups),
        optimizer_wide,
        encoded,
    )
    buffers = frozenset(f"model.{name}" for name in model_parts.buffers)
    return _Snapshot({**tensors, **extra_tensors.tensors}, header, ranks, buffers)


def _state_of(value: Any) -> Any:
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        return value.state_dict()
    return value


class ExtraTensors:
    """Collects the tensors among plain data: plain tensors on the first rank, DTensors on every rank."""

    def __init__(self, is_first: bool) -> None:
        self.is_first = is_first
        self.tensors: dict[str, Tensor] = {}
        self._names: set[str] = set()

    def __call__(self, path: str, tensor: Tensor) -> str:
        """Stores a tensor and returns its unique name in the checkpoint."""
        first, number = path if path.startswith("extra") else f"extra.{path}", 2
        name = first
        while name in self._names:
            name, number = f"{first}#{number}", number + 1
        self._names.add(name)
        if self.is_first or isinstance(tensor, DTensor):
            self.tensors[name] = tensor.detach()
        return name


def written_by(ranks: int, optimizer: str | None, stage: str | None) -> dict[str, Any]:
    """Returns the manifest's ``written_by``: versions, number of ranks, optimizer and stage."""
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
