"""How torch.distributed.checkpoint writes and reads our folders: a storage writer and reader without pickle.

Both also work with `torch.distributed.checkpoint.save` and ``load`` directly, for state dicts of tensors::

    dcp.save(state, storage_writer=Writer("folder"))
    dcp.load(state, storage_reader=Reader("folder"))
"""

import errno
import glob
import os
import re
import shutil
import socket
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from sharded_lamb import faults
from sharded_lamb.checkpoint import manifest, tensorfile
from sharded_lamb.checkpoint.errors import CheckpointError, tellable
from sharded_lamb.checkpoint.manifest import Chunk, Manifest, SavedTensor, read_manifest, replaced
from sharded_lamb.checkpoint.tensorfile import Item, Place, Written

ABANDONED_S = 900.0
"""Seconds without a write after which what is written aside is of a save that died."""
_OURS = re.compile(
    r"manifest\.json|SHA256SUMS|shard-\d{5,}\.safetensors|\.nfs.*"
)  # .nfs…: of files that are open


@dataclass(frozen=True, slots=True)
class ManifestHeader:
    """What a manifest says beside tensors; `Manifest` has the fields' meanings."""

    written_by: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[Mapping[str, Any], ...] = ()
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    extra: Any = None


@dataclass(frozen=True, slots=True)
class _Stored:
    """Where one item of a plan went."""

    place: Place
    file: Written


class AfterwardsError(OSError):
    """The checkpoint is written; what was to follow it could not be done."""


def aside(target: Path, token: str) -> Path:
    """Where a checkpoint is written until it is whole: another save's into the same place lies elsewhere."""
    return target.with_name(f".{target.name}.{token}.part")


class Writer(StorageWriter):
    """Writes a checkpoint aside, a file a rank, and renames it when it is whole.

    Args:
        path: the checkpoint's folder, on storage that all ranks see. One that is there is replaced, when the new one is
            whole.
        header: what the manifest says beside tensors; of the first rank.
        written: called on the first rank with the folder once it is whole and in its place.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        header: ManifestHeader | None = None,
        written: Callable[[Path], None] | None = None,
    ) -> None:
        self.target, self.header, self.written = _real(path), header or ManifestHeader(), written
        self._part: Path | None = None  # on the first rank

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.target = _real(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing is made before all ranks have planned."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(
                    f"{item.index.fqn} is not a tensor, and would be pickled: checkpoints hold tensors, and plain "
                    f"data in sharded_lamb.checkpoint.save(extra=)"
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        check_replaceable(self.target)
        self._part = part = aside(self.target, uuid.uuid4().hex[:8])
        tensorfile.make_folder(part)
        _remove_abandoned(part, self.target)
        return [replace(plan, storage_data=(rank, part.name)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        stored: list[WriteResult] = []
        if plan.items:
            rank, part = plan.storage_data
            path = self.target.with_name(part) / f"shard-{rank:05d}.safetensors"
            if path.parent.name not in _listed(self.target.parent):
                raise OSError(
                    f"{path.parent}, which the first rank has made, is not there on host {socket.gethostname()}: "
                    f"checkpoints need a folder that all ranks see"
                )
            faults.point("checkpoint-write")
            items = [_item(write, planner) for write in plan.items]
            file, places = tensorfile.write(path, items)
            stored = [
                WriteResult(write.index, item.bytes, _Stored(place, file))
                for write, item, place in zip(plan.items, items, places, strict=True)
            ]
        future: Future[list[WriteResult]] = Future()
        future.set_result(stored)
        return future

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        stored = {result.index: result.storage_data for rank in results for result in rank}
        files = {one.file.file: one.file for one in stored.values()}
        part = self._part
        assert part is not None
        _listed(part)
        for file in files.values():
            found = (part / file.file).stat().st_size
            if found != file.bytes:
                raise OSError(
                    f"{part / file.file} has {found:,} bytes where a rank wrote {file.bytes:,}: checkpoints need a "
                    f"folder that all ranks see"
                )
        tensors = {
            name: _saved_tensor(name, entry, stored)
            for name, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        header = self.header
        text = Manifest(
            tensors,
            header.written_by,
            header.aliases,
            header.groups,
            header.optimizer,
            header.extra,
            {name: file.bytes for name, file in files.items()},
        ).text()
        faults.point("checkpoint-manifest")
        with (part / manifest.MANIFEST).open("wb") as out:
            out.write(text.encode())
            tensorfile.sync_file(out)
        sums = {name: file.sha256 for name, file in files.items()}
        manifest.write_sums(part, {**sums, manifest.MANIFEST: tensorfile.sha256(part / manifest.MANIFEST)})
        tensorfile.sync_folder(part)
        faults.point("checkpoint-rename")
        put_in_place(part, self.target)
        if self.written is not None:
            try:
                self.written(self.target)
            except OSError as error:
                raise AfterwardsError(error.errno, error.strerror or str(error)) from error
            except Exception as error:
                raise tellable(error) from error

    def abandon(self) -> None:
        """Remove what a failed save left; on the first rank."""
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)


def _listed(folder: Path) -> list[str]:
    """What is in a folder now: listing it makes NFS ask its server what this host may remember otherwise."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _item(write: WriteItem, planner: SavePlanner) -> Item:
    data = write.tensor_data
    assert data is not None
    sizes, offsets, whole = tuple(data.chunk.sizes), tuple(data.chunk.offsets), tuple(data.size)
    at = "" if sizes == whole else "@" + ",".join(map(str, offsets))

    def tensor() -> torch.Tensor:
        found = planner.resolve_data(write)
        assert isinstance(found, torch.Tensor)
        return found

    return Item(write.index.fqn + at, sizes, data.properties.dtype, tensor)


def _saved_tensor(
    name: str, entry: TensorStorageMetadata, stored: Mapping[MetadataIndex, _Stored]
) -> SavedTensor:
    chunks = [
        Chunk(tuple(chunk.offsets), tuple(chunk.sizes), stored[MetadataIndex(name, chunk.offsets)].place)
        for chunk in entry.chunks
    ]
    return SavedTensor(tuple(entry.size), entry.properties.dtype, tuple(chunks))


def _real(path: str | os.PathLike[str]) -> Path:
    """Not the link that leads there: it is no folder to be renamed."""
    return Path(os.path.realpath(path))


def _remove_abandoned(part: Path, target: Path) -> None:
    """What saves into the same place left that died: nothing in it was written for a while when ``part`` was made."""
    for other in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.part"):
        try:
            times = [path.stat().st_mtime for path in (other, *other.iterdir())]
            if part.stat().st_mtime - max(times) > ABANDONED_S:
                shutil.rmtree(other, ignore_errors=True)
        except OSError:  # it is just being renamed
            continue


def check_replaceable(target: Path) -> None:
    """Raises FileExistsError where something is that is no checkpoint: replacing would delete it."""
    if not target.exists():
        return
    found = os.listdir(target) if target.is_dir() else [target.name]
    others = sorted(name for name in found if not target.is_dir() or _OURS.fullmatch(name) is None)
    if others:
        raise FileExistsError(
            errno.EEXIST,
            f"there is something at {target} that is no part of a checkpoint ({', '.join(others[:5])}), and saving "
            f"there would delete it: move it, or name a folder of the checkpoint's own",
        )


def put_in_place(part: Path, target: Path) -> None:
    """Rename a whole checkpoint to its name. One that is there is exchanged for it at once where the file system can;
    elsewhere, a crash between two renames leaves the old one where `Checkpoints.recover` finds it."""
    old = replaced(target)
    if target.exists() and tensorfile.exchange(part, target):
        old = part
    elif target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        part.rename(target)
    else:
        part.rename(target)
    tensorfile.sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


class Reader(StorageReader):
    """Reads what `Writer` wrote, each rank the rows that it needs. Hashes: `manifest.check_files`."""

    def __init__(self, path: str | os.PathLike[str], found: Manifest | None = None) -> None:
        self.folder, self._manifest = Path(path), found

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        if checkpoint_id is not None:
            self.folder, self._manifest = Path(checkpoint_id), None

    @property
    def manifest(self) -> Manifest:
        if self._manifest is None:
            self._manifest = read_manifest(self.folder)
        return self._manifest

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        entries: dict[str, Any] = {}
        saved: dict[MetadataIndex, Chunk] = {}
        for name, tensor in self.manifest.tensors.items():
            chunks = [
                ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes))
                for chunk in tensor.chunks
            ]
            properties = TensorProperties(dtype=tensor.dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            for chunk in tensor.chunks:
                saved[MetadataIndex(name, chunk.offsets)] = chunk
        return Metadata(entries, storage_data=saved)

    def set_up_storage_reader(
        self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any
    ) -> None:
        self._metadata = metadata

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in sorted(plan.items, key=self._order):
            if item.type == LoadItemType.BYTE_IO:
                raise TypeError(f"{item.dest_index.fqn} is not a tensor in {self.folder}")
            self._read(item, planner)
        future: Future[None] = Future()
        future.set_result(None)
        return future

    def _order(self, item: ReadItem) -> tuple[str, int]:
        chunk: Chunk = self._metadata.storage_data[item.storage_index]
        return chunk.place.file, chunk.place.begin

    def _read(self, item: ReadItem, planner: LoadPlanner) -> None:
        index = item.storage_index
        entry = self._metadata.state_dict_metadata[index.fqn]
        assert isinstance(entry, TensorStorageMetadata)
        chunk: Chunk = self._metadata.storage_data[index]
        box = tensorfile.read(
            self.folder,
            chunk.place,
            entry.properties.dtype,
            chunk.sizes,
            item.storage_offsets,
            item.lengths,
        )
        target = planner.resolve_tensor(item).detach()
        if target.shape != box.shape:
            raise CheckpointError(
                f"{self.folder}: the part of {index.fqn} that was read has shape {tuple(box.shape)} where "
                f"{tuple(target.shape)} was expected"
            )
        target.copy_(box)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)
