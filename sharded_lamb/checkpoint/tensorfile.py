"""Tensors in safetensors files (https://huggingface.co/docs/safetensors), written and read a part at a time.

The format is a length, a JSON header and the tensors' bytes; anything that reads safetensors reads these. Written here
because hashing and bounded memory come with it: no more than a tensor of one file is ever held twice.
"""

import ctypes
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.checkpoint.errors import CheckpointError

CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
PIECE = 8 << 20
"""Bytes that are hashed, written or read at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [begin, end) of a file of a checkpoint, counted from the file's start."""

    file: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Written:
    """A file as it was written."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a file. ``tensor`` gives it when it is its turn, on any device and with any strides."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def make_folder(path: Path) -> None:
    """With its parents, synced: a crash must not take them back. Raises FileExistsError where it is there."""
    if not path.parent.is_dir():
        with suppress(FileExistsError):  # made at the same time
            make_folder(path.parent)
    path.mkdir()
    sync_folder(path.parent)


def exchange(one: Path, other: Path) -> bool:
    """Swap the names of two files or folders at once; False where it cannot be done (NFS, other than Linux)."""
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    at_fdcwd, rename_exchange = -100, 2
    return renameat2 is not None and not renameat2(
        at_fdcwd, os.fsencode(one.absolute()), at_fdcwd, os.fsencode(other.absolute()), rename_exchange
    )


def write(path: Path, items: Sequence[Item]) -> tuple[Written, list[Place]]:
    """Write and sync a file; where each item lies in it.

    Raises:
        TypeError: a dtype that safetensors does not know.
        OSError: it could not be written.
    """
    header, places, at = {}, [], 0
    for item in items:
        if item.dtype not in CODES:
            raise TypeError(
                f"{item.key} is {item.dtype}, which safetensors files cannot hold: one of {[*CODES]} can be"
            )
        header[item.key] = {
            "dtype": CODES[item.dtype],
            "shape": item.shape,
            "data_offsets": [at, at + item.bytes],
        }
        places.append((at, at := at + item.bytes))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    hashed = hashlib.sha256()
    with path.open("wb") as file:
        head = len(text).to_bytes(8, "little") + text
        file.write(head)
        hashed.update(head)
        for item in items:
            for piece in _pieces(item):
                file.write(piece)
                hashed.update(piece)
        faults.point("checkpoint-fsync")
        sync_file(file)
    written = Written(path.name, start + at, hashed.hexdigest())
    return written, [Place(path.name, start + begin, start + end) for begin, end in places]


def _pieces(item: Item) -> Iterator[memoryview]:
    tensor = item.tensor().detach().cpu().contiguous()
    assert tuple(tensor.shape) == item.shape, (item.key, tensor.shape, item.shape)
    assert tensor.dtype == item.dtype, (item.key, tensor.dtype, item.dtype)
    if tensor.numel():
        raw = _bytes_of(tensor.reshape(-1).view(torch.uint8))
        for begin in range(0, len(raw), PIECE):
            yield raw[begin : begin + PIECE]


def _bytes_of(flat: Tensor) -> memoryview:
    raw: Any = flat.numpy()
    return memoryview(raw)


def sync_file(file: BinaryIO) -> None:
    """Not before it is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Names in a folder survive a power cut once it is synced."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read(
    folder: Path,
    place: Place,
    dtype: torch.dtype,
    sizes: Sequence[int],
    offsets: Sequence[int],
    lengths: Sequence[int],
) -> Tensor:
    """The box [offsets, offsets + lengths) of a tensor of ``sizes`` that lies at ``place``; a CPU tensor.

    Read are the rows of the first axis that the box touches.

    Raises:
        CheckpointError: the file is shorter than that.
    """
    if place.end - place.begin != math.prod(sizes) * dtype.itemsize:
        raise CheckpointError(
            f"{folder / place.file}: a tensor of shape {tuple(sizes)} and {dtype} cannot lie in bytes "
            f"[{place.begin}, {place.end}): its manifest is damaged"
        )
    row = math.prod(sizes[1:]) * dtype.itemsize
    first, rows = (offsets[0], lengths[0]) if sizes else (0, 1)
    flat = torch.empty(rows * row, dtype=torch.uint8, device="cpu")
    if len(flat):
        _fill(folder / place.file, _bytes_of(flat), place.begin + first * row)
    found = flat.view(dtype).view(rows, *sizes[1:]) if sizes else flat.view(dtype).view(())
    for axis in range(1, len(sizes)):
        found = found.narrow(axis, offsets[axis], lengths[axis])
    return found


def _fill(path: Path, into: memoryview, at: int) -> None:
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(at)
            filled = 0
            while filled < len(into):
                got = file.readinto(into[filled : filled + PIECE])
                if not got:
                    raise CheckpointError(f"{path} ends before byte {at + len(into)}: it is truncated")
                filled += got
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is missing") from error


def sha256(path: Path) -> str:
    """Raises OSError where it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
