"""The manifest and hashes of a checkpoint folder.

::

    step-00000200/manifest.json              tensors and the places of their parts; options; extra data
                  shard-00000.safetensors    the parts that rank 0 wrote, and so on
                  SHA256SUMS                 hashes of all files, written last: `sha256sum -c SHA256SUMS` checks them

Nothing is pickled: a checkpoint from an untrusted source may be wrong, but cannot run code.
"""

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sharded_lamb.checkpoint import durable, tensorfile
from sharded_lamb.checkpoint.errors import CheckpointError
from sharded_lamb.checkpoint.plain import tensor_names
from sharded_lamb.checkpoint.tensorfile import Place

FORMAT = "sharded_lamb.checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in vars(torch).values()
    if isinstance(dtype, torch.dtype)
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor and the place of its elements, row-major."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: Place


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A saved tensor: boxes that cover each of its elements once."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Manifest:
    """Tensors are called ``model.NAME``, ``optimizer.NAME.KIND`` and ``extra.…``; NAME is the unwrapped model's."""

    tensors: Mapping[str, SavedTensor]
    written_by: Mapping[str, Any]  # versions, ranks, optimizer
    aliases: Mapping[str, str]  # {other name of a tied parameter: first name}
    groups: tuple[Mapping[str, Any], ...]  # {"names": [...], "options": {...}}; JSON
    optimizer: Mapping[str, Any]  # optimizer-wide options and counts; JSON
    extra: Any  # JSON; see `plain`
    files: Mapping[str, int]  # {name: bytes}

    @property
    def model_names(self) -> list[str]:
        return [name.removeprefix("model.") for name in self.tensors if name.startswith("model.")]

    def kinds(self) -> dict[str, dict[str, SavedTensor]]:
        """Returns {parameter: {kind of state: tensor}}."""
        kinds: dict[str, dict[str, SavedTensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer."):
                parameter, kind = name.removeprefix("optimizer.").rsplit(".", 1)
                kinds.setdefault(parameter, {})[kind] = tensor
        return kinds

    def text(self) -> str:
        """Returns the manifest as JSON, with a line per tensor: only without indentation does Python encode in C."""
        tensors = (
            f"{json.dumps(name)}: "
            + json.dumps(
                {
                    "shape": tensor.shape,
                    "dtype": str(tensor.dtype).removeprefix("torch."),
                    "chunks": [
                        {
                            "at": chunk.offsets,
                            "shape": chunk.sizes,
                            "file": chunk.place.file,
                            "bytes": [chunk.place.begin, chunk.place.end],
                        }
                        for chunk in tensor.chunks
                    ],
                }
            )
            for name, tensor in self.tensors.items()
        )
        whole = {
            "format": FORMAT,
            "version": VERSION,
            "written_by": self.written_by,
            "files": self.files,
            "groups": self.groups,
            "optimizer": self.optimizer,
            "extra": self.extra,
            "aliases": self.aliases,
        }
        opened = json.dumps(whole, indent=1).removesuffix("\n}")
        return f'{opened},\n "tensors": {{\n  ' + ",\n  ".join(tensors) + "\n }\n}"


def replaced(target: Path) -> Path:
    """Returns the temporary name of a checkpoint while a new one replaces it."""
    return target.with_name(f".{target.name}.old")


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """Reads the manifest and verifies its hash.

    Raises:
        CheckpointError: the checkpoint is missing, its manifest is damaged, or its format is newer.
    """
    folder = Path(folder)
    _check_hash(folder, MANIFEST, read_sums(folder))
    try:
        whole = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if whole["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {whole['format']!r}, expected {FORMAT!r}")
        if whole["version"] > VERSION:
            raise CheckpointError(
                f"{folder} has format version {whole['version']}, written by sharded_lamb "
                f"{whole['written_by'].get('sharded_lamb')}, and this release reads up to version {VERSION}: upgrade "
                f"sharded_lamb"
            )
        return _parsed(whole)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{folder / MANIFEST} is not a manifest: {type(error).__name__}: {error}"
        ) from error


def _parsed(whole: dict[str, Any]) -> Manifest:
    files = {_plain_name(name): _natural([size])[0] for name, size in whole["files"].items()}
    tensors = {name: _saved_tensor(name, entry, files) for name, entry in whole["tensors"].items()}
    for group in whole["groups"]:
        if not all(isinstance(name, str) for name in group["names"]) or not isinstance(
            group["options"], dict
        ):
            raise ValueError(f"{group!r} is not a parameter group")
    for other, first in whole["aliases"].items():
        if f"model.{first}" not in tensors:
            raise ValueError(f"{other!r} is another name of {first!r}, which is missing")
    missing = [
        name
        for name in tensor_names([whole["extra"], whole["optimizer"], whole["groups"]])
        if name not in tensors
    ]
    if missing:
        raise ValueError(f"tensor {missing[0]!r} is missing")
    return Manifest(
        tensors,
        dict(whole["written_by"]),
        whole["aliases"],
        tuple(whole["groups"]),
        dict(whole["optimizer"]),
        None if whole["extra"] is None else dict(whole["extra"]),
        files,
    )


def _saved_tensor(name: str, entry: Mapping[str, Any], files: Mapping[str, int]) -> SavedTensor:
    """Raises ValueError unless the chunks cover the tensor once and are within their files."""
    shape, dtype = _natural(entry["shape"]), _DTYPES[entry["dtype"]]
    chunks = []
    for saved in entry["chunks"]:
        at, sizes, (begin, end) = _natural(saved["at"]), _natural(saved["shape"]), _natural(saved["bytes"])
        chunk = Chunk(at, sizes, Place(_plain_name(saved["file"]), begin, end))
        inside = len(at) == len(sizes) == len(shape) and all(
            low + size <= whole for low, size, whole in zip(at, sizes, shape, strict=True)
        )
        if not inside or end - begin != math.prod(sizes) * dtype.itemsize or end > files[chunk.place.file]:
            raise ValueError(f"a part of {name!r} is outside the tensor or its file: {saved!r}")
        chunks.append(chunk)
    covered = sum(math.prod(chunk.sizes) for chunk in chunks)
    if covered != math.prod(shape) or len({chunk.offsets for chunk in chunks}) != len(chunks):
        raise ValueError(
            f"the parts of {name!r} hold {covered} of its {math.prod(shape)} elements, or some twice"
        )
    return SavedTensor(shape, dtype, tuple(chunks))


def _natural(numbers: Sequence[Any]) -> tuple[int, ...]:
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{numbers!r} should be integers >= 0")
    return tuple(numbers)


def _plain_name(name: str) -> str:
    """Raises ValueError unless ``name`` is a file in the folder itself: a manifest must not name files elsewhere."""
    if name != Path(name).name or name in ("", ".", ".."):
        raise ValueError(f"it names the file {name!r}, which is not in its own folder")
    return name


def digest(folder: Path) -> str:
    """Returns a hash over all files, computed from their listed hashes. Raises CheckpointError."""
    return hashlib.sha256(repr(sorted(read_sums(folder).items())).encode()).hexdigest()[:16]


def write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    """Writes and syncs `SHA256SUMS`."""
    with (folder / SUMS).open("wb") as file:
        file.write("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())).encode())
        durable.sync_file(file)


def read_sums(folder: Path) -> dict[str, str]:
    """Returns {file: sha256}.

    Raises:
        CheckpointError: the folder or `SHA256SUMS` is missing or damaged.
    """
    if not folder.is_dir():
        if (replaced(folder) / SUMS).is_file():
            raise CheckpointError(
                f"{folder} is missing: a save that would have replaced it was interrupted. The old checkpoint is "
                f"whole: mv {replaced(folder)} {folder}"
            )
        raise CheckpointError(f"{folder} does not exist: name a checkpoint folder, such as RUN/step-00001000")
    try:
        *lines, rest = (folder / SUMS).read_bytes().decode("ascii").split("\n")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {SUMS}: its save did not finish, or it is not a checkpoint of sharded_lamb"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{folder / SUMS} cannot be read: {error}") from error
    if rest:
        raise CheckpointError(f"{folder / SUMS} is damaged: its last line is cut off")
    sums = {}
    for line in lines:
        digest, separator, name = line.partition("  ")
        if not separator or len(digest) != 64:
            raise CheckpointError(f"{folder / SUMS} is damaged: {line!r} is not a hash and a name")
        try:
            sums[_plain_name(name)] = digest
        except ValueError as error:
            raise CheckpointError(f"{folder / SUMS} is damaged: {error}") from error
    return sums


def unlisted_files(folder: Path, sums: Mapping[str, str]) -> list[str]:
    """Returns the sorted names in the folder that `SHA256SUMS` does not list."""
    return sorted(path.name for path in folder.iterdir() if path.name not in (*sums, SUMS))


def _check_hash(folder: Path, name: str, sums: Mapping[str, str]) -> None:
    if name not in sums:
        raise CheckpointError(f"{folder / SUMS} is damaged: it does not list {name}")
    try:
        digest = tensorfile.sha256(folder / name)
    except OSError as error:
        raise CheckpointError(f"{folder / name} cannot be read: {error.strerror}") from error
    if digest != sums[name]:
        raise CheckpointError(
            f"{folder / name} does not have the hash it was written with: it was damaged or changed"
        )


def check_files(
    folder: Path, manifest: Manifest, *, part: int = 0, parts: int = 1, hashes: bool = True
) -> None:
    """Verifies the sizes of all files, and the hashes of every ``parts``-th file from ``part`` on.

    Raises:
        CheckpointError: a file is missing, truncated or damaged; the message names the first one.
    """
    sums = read_sums(folder)
    for number, (name, size) in enumerate(sorted(manifest.files.items())):
        try:
            actual = (folder / name).stat().st_size
        except OSError as error:
            raise CheckpointError(f"{folder / name} is missing: {error.strerror}") from error
        if actual != size:
            raise CheckpointError(
                f"{folder / name} has {actual:,} bytes, but was written with {size:,}: it is "
                + ("truncated" if actual < size else "damaged")
            )
        if hashes and number % parts == part:
            _check_hash(folder, name, sums)


def problem_with(folder: str | os.PathLike[str], *, hashes: bool = True) -> str | None:
    """Returns why a checkpoint cannot be used, or None. Reads every file.

    Args:
        hashes: verify the hashes of all files; False: the manifest's hash and the sizes of files only.
    """
    try:
        check_files(Path(folder), read_manifest(folder), hashes=hashes)
    except CheckpointError as error:
        return str(error)
    return None
