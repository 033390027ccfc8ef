"""Storage writer and reader of torch.distributed.checkpoint for our folders, without pickle.

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
from sharded_lamb.checkpoint import durable, manifest, tensorfile
from sharded_lamb.checkpoint.errors import CheckpointError, picklable
from sharded_lamb.checkpoint.manifest import Chunk, Manifest, SavedTensor, read_manifest, replaced
from sharded_lamb.checkpoint.tensorfile import Item, Place, Written

ABANDONED_S = 900.0
"""Seconds without a write after which a part folder belongs to a dead save."""
_CHECKPOINT_FILES = re.compile(
    r"manifest\.json|SHA256SUMS|shard-\d{5,}\.safetensors|\.nfs.*"
)  # .nfs…: deleted files that are still open on NFS


@dataclass(frozen=True, slots=True)
class ManifestHeader:
    """The manifest's fields beside tensors and files; see `Manifest`."""

    written_by: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    groups: tuple[Mapping[str, Any], ...] = ()
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    extra: Any = None


@dataclass(frozen=True, slots=True)
class _Stored:
    """The place of one written item, and its file."""

    place: Place
    file: Written


class PostSaveError(OSError):
    """The checkpoint was written, but the post-save step failed."""


def aside(target: Path, token: str) -> Path:
    """Returns the folder a save writes to until it is whole. ``token`` tells concurrent saves apart."""
    return target.with_name(f".{target.name}.{token}.part")


class Writer(StorageWriter):
    """Writes one file per rank into a part folder and renames it to ``path`` when whole.

    Args:
        path: the checkpoint's folder, on storage that all ranks see. An existing checkpoint there is replaced.
        header: the manifest's fields beside tensors; the first rank's is written.
        written: called on the first rank with the folder, after the rename.
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
        """Does nothing: the part folder is made after all ranks have planned."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        for item in plan.items:
            if item.type == WriteItemType.BYTE_IO:
                raise TypeError(
                    f"{item.index.fqn} is not a tensor, and would be pickled: checkpoints hold tensors; pass plain "
                    f"data to sharded_lamb.checkpoint.save(extra=)"
                )
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        ranks = self.header.written_by.get("ranks", len(plans))
        if len(plans) != ranks:  # torch saves each rank's parts alone once there is no process group
            raise RuntimeError(f"the parts of {len(plans)} ranks came, of {ranks}")
        check_replaceable(self.target)
        self._part = part = aside(self.target, uuid.uuid4().hex[:8])
        durable.make_folder(part)
        _remove_abandoned(part, self.target)
        return [replace(plan, storage_data=(rank, part.name)) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        stored: list[WriteResult] = []
        if plan.items:
            rank, part = plan.storage_data
            path = self.target.with_name(part) / f"shard-{rank:05d}.safetensors"
            if path.parent.name not in _listed(self.target.parent):
                raise OSError(
                    f"{path.parent}, made by the first rank, does not exist on host {socket.gethostname()}: "
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
            size = (part / file.file).stat().st_size
            if size != file.bytes:
                raise OSError(
                    f"{part / file.file} has {size:,} bytes, but a rank wrote {file.bytes:,}: checkpoints need a "
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
            durable.sync_file(out)
        sums = {name: file.sha256 for name, file in files.items()}
        manifest.write_sums(part, {**sums, manifest.MANIFEST: tensorfile.sha256(part / manifest.MANIFEST)})
        durable.sync_folder(part)
        faults.point("checkpoint-rename")
        put_in_place(part, self.target)
        if self.written is not None:
            try:
                self.written(self.target)
            except OSError as error:
                raise PostSaveError(error.errno, error.strerror or str(error)) from error
            except Exception as error:
                raise picklable(error) from error

    def abandon(self) -> None:
        """Removes the part folder of a failed save; on the first rank."""
        if self._part is not None:
            shutil.rmtree(self._part, ignore_errors=True)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)


def _listed(folder: Path) -> list[str]:
    """Returns the folder's entries. Listing makes NFS ask its server instead of this host's cache."""
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
        data = planner.resolve_data(write)
        assert isinstance(data, torch.Tensor)
        return data

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
    """Resolves links: renames need the folder itself."""
    return Path(os.path.realpath(path))


def _remove_abandoned(part: Path, target: Path) -> None:
    """Removes part folders of dead saves to ``target``: those unwritten for `ABANDONED_S` before ``part`` was made."""
    for other in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * 8}.part"):
        try:
            times = [path.stat().st_mtime for path in (other, *other.iterdir())]
            if part.stat().st_mtime - max(times) > ABANDONED_S:
                shutil.rmtree(other, ignore_errors=True)
        except OSError:  # renamed meanwhile
            continue


def check_replaceable(target: Path) -> None:
    """Raises FileExistsError if ``target`` holds anything but a checkpoint, which replacing it would delete."""
    if not target.exists():
        return
    names = os.listdir(target) if target.is_dir() else [target.name]
    unexpected = sorted(
        name for name in names if not target.is_dir() or _CHECKPOINT_FILES.fullmatch(name) is None
    )
    if unexpected:
        raise FileExistsError(
            errno.EEXIST,
            f"{target} holds files that are not part of a checkpoint ({', '.join(unexpected[:5])}), and saving there "
            f"would delete them: move them, or name a folder of the checkpoint's own",
        )


def put_in_place(part: Path, target: Path) -> None:
    """Renames a whole checkpoint to its name.

    An existing one is exchanged atomically if the file system can. Elsewhere a crash between two renames leaves the
    old one under the name that `Checkpoints.recover` restores it from.
    """
    old = replaced(target)
    if target.exists() and durable.exchange(part, target):
        old = part
    elif target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        part.rename(target)
    else:
        part.rename(target)
    durable.sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


class Reader(StorageReader):
    """Reads the checkpoints of `Writer`, each rank the rows it needs. `manifest.check_files` verifies hashes."""

    def __init__(self, path: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        self.folder, self._manifest = Path(path), manifest

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
                f"{self.folder}: the part of {index.fqn} that was read has shape {tuple(box.shape)}, expected "
                f"{tuple(target.shape)}"
            )
        target.copy_(box)
        planner.commit_tensor(item, target)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return isinstance(checkpoint_id, str | os.PathLike)
