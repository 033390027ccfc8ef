"""Tensors in safetensors files (https://huggingface.co/docs/safetensors), written and read a part at a time.

The format is a length, a JSON header and the tensors' bytes; any safetensors reader reads these files. A tensor of a
dtype without a code there (complex128) is a tensor of bytes, with one more axis; the manifest has its dtype.

The safetensors library is not used, since it is no dependency of the core, and has little to do here. `read` takes
places from the verified manifest, parses no header, and raises an error for a truncated file; ``safe_open`` maps the
file, so that a later truncation kills the process. `write` hashes as it writes and holds one tensor at a time;
``save_file`` needs all of them.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sharded_lamb import faults
from sharded_lamb.checkpoint import durable
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
    torch.complex64: "C64",
}
PIECE = 8 << 20
"""Bytes hashed, written or read at once."""


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes [begin, end) of a file of a checkpoint, counted from the file's start."""

    file: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class Written:
    """Name, size and hash of a written file."""

    file: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor of a file. ``tensor`` returns it when it is written, on any device and with any strides."""

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    tensor: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write(path: Path, items: Sequence[Item]) -> tuple[Written, list[Place]]:
    """Writes and syncs a file; returns its size and hash, and each item's place in it.

    Raises:
        OSError: the file could not be written.
    """
    header, places, at = {}, [], 0
    for item in items:
        has_code = item.dtype in CODES
        header[item.key] = {
            "dtype": CODES[item.dtype] if has_code else "U8",
            "shape": item.shape if has_code else (*item.shape, item.dtype.itemsize),
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
        durable.sync_file(file)
    written = Written(path.name, start + at, hashed.hexdigest())
    return written, [Place(path.name, start + begin, start + end) for begin, end in places]


def _pieces(item: Item) -> Iterator[memoryview]:
    tensor = item.tensor().detach().cpu().resolve_conj().resolve_neg().contiguous()
    assert tuple(tensor.shape) == item.shape, (item.key, tensor.shape, item.shape)
    assert tensor.dtype == item.dtype, (item.key, tensor.dtype, item.dtype)
    if tensor.numel():
        raw = _bytes_of(tensor.reshape(-1).view(torch.uint8))
        for begin in range(0, len(raw), PIECE):
            yield raw[begin : begin + PIECE]


def _bytes_of(flat: Tensor) -> memoryview:
    raw: Any = flat.numpy()
    return memoryview(raw)


def read(
    folder: Path,
    place: Place,
    dtype: torch.dtype,
    sizes: Sequence[int],
    offsets: Sequence[int],
    lengths: Sequence[int],
) -> Tensor:
    """Returns the box [offsets, offsets + lengths) of the tensor of shape ``sizes`` at ``place``; a CPU tensor.

    Reads only the rows of the first axis that the box touches.

    Raises:
        CheckpointError: the file is missing or truncated, or ``place`` has another size than the tensor.
    """
    if place.end - place.begin != math.prod(sizes) * dtype.itemsize:
        raise CheckpointError(
            f"{folder / place.file}: a tensor of shape {tuple(sizes)} and {dtype} does not fit bytes "
            f"[{place.begin}, {place.end}): its manifest is damaged"
        )
    row = math.prod(sizes[1:]) * dtype.itemsize
    first, rows = (offsets[0], lengths[0]) if sizes else (0, 1)
    flat = torch.empty(rows * row, dtype=torch.uint8, device="cpu")
    if len(flat):
        _fill(folder / place.file, _bytes_of(flat), place.begin + first * row)
    box = flat.view(dtype).view(rows, *sizes[1:]) if sizes else flat.view(dtype).view(())
    for axis in range(1, len(sizes)):
        box = box.narrow(axis, offsets[axis], lengths[axis])
    return box


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
    """Returns the file's hash, in hexadecimal. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
